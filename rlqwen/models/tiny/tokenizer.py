"""Build the tokenizer of a tiny Qwen: 256 bytes, a few words, Qwen's special tokens and one of Qwen's chat templates."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rlqwen.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
# Ids rise in this order from the end of the byte-level vocabulary, as in Qwen3.
SPECIAL_TOKENS = (
    END_OF_TEXT, "<|im_start|>", END_OF_TURN, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Single tokens that decoding keeps even where special tokens are skipped.
MARKUP_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

# Byte-pair merges are learned from this text alone: each of its words becomes one token, anything else is bytes.
TRAINING_TEXT = "system\nuser\nassistant\n\\boxed{1}\n\n + = ? - *\n\nthe answer is\n\nAnswer: ones tens carry and so\n"


def build_tokenizer(
    max_length: int = 1024, template: str = "qwen3", *, is_qwen3_5: bool = False
) -> "PreTrainedTokenizerBase":
    """Build a byte-level BPE of fewer than 600 tokens with Qwen's special tokens.

    `template`: TRL's name of its chat template. `is_qwen3_5`: split text as Qwen3.5 does, which keeps combining marks
    with their letters.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer, Qwen3_5Tokenizer

    tokenizer_class = Qwen3_5Tokenizer if is_qwen3_5 else Qwen2Tokenizer
    plain = tokenizer_class().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        [TRAINING_TEXT], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    added = SPECIAL_TOKENS + MARKUP_TOKENS
    tokenizer: PreTrainedTokenizerBase = tokenizer_class(
        vocab=learned["vocab"] | {token: len(learned["vocab"]) + i for i, token in enumerate(added)},
        merges=[tuple(pair) for pair in learned["merges"]],  # type: ignore[misc]
        unk_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    tokenizer.chat_template = read_trl_template(template)
    return tokenizer


def read_trl_template(name: str) -> str:
    """Return the chat template that TRL ships as `name`, read as package data, because importing TRL takes seconds."""
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("trl is not installed, and its chat templates are needed; pip install 'trl>=1.16,<2'")
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text("utf-8")
