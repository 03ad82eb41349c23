"""A tiny random Qwen, built on the spot: what the quickstart and the tests train, with no model hub.

Example:
    folder = build_tiny_qwen3("models/tiny", seed=0)
    AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

The tokenizer has Qwen's pre-tokenizer (every digit is a token of its own), Qwen's special tokens and Qwen3's chat
template; its vocabulary is the 256 bytes and the few words that the quickstart needs, so any text can be encoded.
"""

import hashlib
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from rlqwen.config.base import ArgumentsConfig
from rlqwen.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

PREFIX = "builtin:"
BUILTIN_MODELS = ("tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe")

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
_TRAINING_TEXT = (
    "system\nuser\nassistant\n\\boxed{1}\n\n + = ? - *\n\nthe answer is\n\nAnswer: ones tens carry and so\n"
)


class TinyModelConfig(ArgumentsConfig):
    """Shape of the tiny model; the defaults give about a million parameters."""

    model_type: Literal["qwen2", "qwen3", "qwen3_moe"] = "qwen3"
    hidden_size: int = Field(default=128, ge=32)
    num_layers: int = Field(default=4, ge=1)
    intermediate_size: int = Field(default=512, ge=32)
    """Of a dense layer; the experts of a qwen3_moe model have `moe_intermediate_size`."""
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=32, multiple_of=32)
    """vLLM's attention on CPU takes multiples of 32."""
    max_length: int = Field(default=1024, ge=32)
    """Tokens of context."""
    tie_word_embeddings: bool = True
    num_experts: int = Field(default=8, ge=2)
    """This and the next two: qwen3_moe only, experts in every layer."""
    num_experts_per_tok: int = Field(default=2, ge=1)
    moe_intermediate_size: int = Field(default=64, ge=32)
    initializer_range: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _heads_fit(self) -> "TinyModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.model_type == "qwen2" and self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(
                f"a qwen2 model needs num_heads x head_dim = hidden_size "
                f"({self.num_heads} x {self.head_dim} is not {self.hidden_size})"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}"
            )
        return self


def build_tiny_qwen3(path: str | Path, *, seed: int = 0, **options: Any) -> Path:
    """Write a tiny random model and its tokenizer to the folder `path`; the same arguments give the same bytes.

    `options` are the fields of TinyModelConfig; ConfigError names a wrong one. The global random state of torch is
    left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    shape = TinyModelConfig(**options)
    path = Path(path)
    tokenizer = build_tokenizer(shape.max_length)
    stop_ids = [tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TURN, END_OF_TEXT)]
    config = _model_config(shape, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=stop_ids[1], do_sample=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def build_tokenizer(max_length: int = 1024) -> "PreTrainedTokenizerBase":
    """Byte-level BPE of fewer than 600 tokens with Qwen's special tokens and Qwen3's chat template."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    plain = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        [_TRAINING_TEXT], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    added = SPECIAL_TOKENS + MARKUP_TOKENS
    tokenizer = Qwen2Tokenizer(
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
    tokenizer.chat_template = read_trl_template("qwen3")
    return tokenizer


def read_trl_template(name: str) -> str:
    """Text of the chat template that TRL ships as `name`; read as package data, because importing TRL takes seconds."""
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("trl is not installed, and its chat templates are needed; pip install 'trl>=1.16,<2'")
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def resolve_model_path(path: str, cache_dir: str | Path, **init_kwargs: Any) -> str:
    """`path` as it is, or, for `builtin:NAME`, the folder under `cache_dir` where that model has been built.

    `init_kwargs` are `seed` and the fields of TinyModelConfig, and count for a built-in model only. A folder of the
    same arguments is used again. Raises ModelError for an unknown name, ConfigError for an unknown argument.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in BUILTIN_MODELS:
        known = ", ".join(PREFIX + model for model in BUILTIN_MODELS)
        raise ModelError(f"there is no built-in model {path!r}; there are: {known}")
    seed = init_kwargs.pop("seed", 0)
    shape = TinyModelConfig(**({"model_type": name.removeprefix("tiny-").replace("-", "_")} | init_kwargs))
    key = f"{shape.model_dump_json()} {seed} {_TRAINING_TEXT}"
    folder = Path(cache_dir) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            built = build_tiny_qwen3(Path(scratch) / "model", seed=seed, **shape.model_dump())
            try:
                built.rename(folder)
            except OSError:
                # Another process, building the same files at the same time, was first.
                if not folder.is_dir():
                    raise
    return str(folder)


def _model_config(shape: TinyModelConfig, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedConfig":
    from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

    fields: dict[str, Any] = {
        # Rounded up, as Qwen's own, so that the head's matrix has a friendly width.
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_length,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "initializer_range": shape.initializer_range,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.model_type == "qwen2":
        return Qwen2Config(**fields)
    if shape.model_type == "qwen3_moe":
        experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        fields |= {name: getattr(shape, name) for name in experts} | {"norm_topk_prob": True}
        return Qwen3MoeConfig(**fields, head_dim=shape.head_dim)  # type: ignore[call-arg]  # among its others
    return Qwen3Config(head_dim=shape.head_dim, **fields)
