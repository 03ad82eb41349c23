"""Use a sequence-classification model as a reward. Imports torch only when the model is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlqwen.errors import ModelError
from rlqwen.models.hub import check_vocabulary, pinned, split_revision


class RewardModel:
    """Score prompt and completion with the single logit of a classification model, as TRL does.

    Conversations are rendered with the tokenizer's chat template.

    Args:
        model: a folder or hub id, which `load` loads, onto a GPU if there is one; or a torch module that takes
            `input_ids` and `attention_mask` and returns an object with `logits` (B, 1), which stays on its device.
        tokenizer: None: the model's own.
        batch_size: number of completions per forward.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, batch_size: int = 16) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._is_loaded = False

    @property
    def name(self) -> str:
        """Return the last part of the model's path, as TRL names reward models."""
        path = self._path()
        return Path(split_revision(path)[0]).name if path else type(self._model).__name__

    def load(self, default_tokenizer: Any = None) -> None:
        """Load a model that was given by path. `default_tokenizer` is for modules without a path. Raises ModelError."""
        if self._is_loaded:
            return
        from transformers import AutoTokenizer

        path = self._path()
        if isinstance(self._model, str):
            self._model = _load_model(self._model)
        if self._tokenizer is None:
            if path:
                try:
                    name, revision = split_revision(path)
                    self._tokenizer = AutoTokenizer.from_pretrained(
                        name, revision=revision or "main", trust_remote_code=False
                    )
                except (OSError, ValueError) as error:
                    raise ModelError(f"reward model {path!r}: its tokenizer cannot be loaded: {error}") from error
            elif default_tokenizer is not None:
                self._tokenizer = default_tokenizer
            else:
                raise ModelError(f"reward model {self.name!r} is a module without a path: pass its tokenizer")
        from rlqwen.models.loading import text_tokenizer  # which imports transformers

        self._tokenizer = text_tokenizer(self._tokenizer)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if getattr(self._model, "config", None) is not None:
            # The classification head looks for the last token that is not padding.
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
            check_vocabulary(self._tokenizer, self._model.config, f"reward model {path or self.name!r}")
        self._model.eval()
        self._is_loaded = True

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """Return one reward per completion."""
        import torch

        from rlqwen.data.encoding import encode
        from rlqwen.data.reward_tokenization import reward_model_segments

        pieces = [
            reward_model_segments(self._tokenizer, prompt, completion, is_sampled=True)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        rows = [{"input_ids": row.token_ids} for row in encode(self._tokenizer, pieces)]
        device = next(self._model.parameters()).device
        rewards: list[float] = []
        for start in range(0, len(rows), self._batch_size):
            inputs = self._tokenizer.pad(
                rows[start : start + self._batch_size], padding_side="right", return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self._model(
                    input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device)
                ).logits
            rewards += logits[:, 0].float().tolist()
        return rewards

    def _path(self) -> str:
        if isinstance(self._model, str):
            return self._model
        return str(getattr(getattr(self._model, "config", None), "_name_or_path", ""))


def _load_model(path: str) -> Any:
    import torch

    from rlqwen.models.model_classes import load_scalar

    name, arguments = pinned(path)
    try:
        model: Any
        model, has_head = load_scalar(name, **arguments)
    except ModelError as error:
        raise ModelError(f"reward model {path!r}: {error}") from error
    if not has_head:
        raise ModelError(
            f"reward model {path!r} lacks weights (score.weight), so its scores would be random; "
            "use a model that was trained as a reward model, with one label"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
