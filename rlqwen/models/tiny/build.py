"""Build a tiny random Qwen in a folder.

Example:
    folder = build_tiny_qwen3("models/tiny", seed=0)
    AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
"""

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.errors import ModelError
from rlqwen.models.tiny.configs import model_config
from rlqwen.models.tiny.extras import add_mtp_weights, write_processor_files
from rlqwen.models.tiny.shape import TinyModelConfig
from rlqwen.models.tiny.tokenizer import END_OF_TEXT, END_OF_TURN, TRAINING_TEXT, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PREFIX = "builtin:"
_TYPES = {
    "tiny-qwen2": "qwen2",
    "tiny-qwen3": "qwen3",
    "tiny-qwen3-moe": "qwen3_moe",
    "tiny-qwen3-next": "qwen3_next",
    "tiny-qwen3.5": "qwen3_5",
    "tiny-qwen3.5-text": "qwen3_5_text",
    "tiny-qwen3.5-moe": "qwen3_5_moe",
    "tiny-qwen3.5-moe-text": "qwen3_5_moe_text",
}
BUILTIN_MODELS = tuple(_TYPES)


def build_tiny_qwen3(path: str | Path, *, seed: int = 0, **options: Any) -> Path:
    """Write a tiny random model and its tokenizer to the folder `path`; the same arguments give the same bytes.

    `options` are the fields of TinyModelConfig; ConfigError names a wrong one. A model with a vision tower is written
    whole, under the names of real checkpoints; AutoModelForCausalLM reads its text model. The global random state of
    torch is left as it was.
    """
    import torch
    from transformers import GenerationConfig

    shape = TinyModelConfig(**options)
    path = Path(path)
    tokenizer = build_tokenizer(shape.max_length, shape.template, is_qwen3_5=shape.model_type.startswith("qwen3_5"))
    stop_ids = [tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TURN, END_OF_TEXT)]
    config = model_config(shape, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _random_model(config, has_vision=shape.has_vision)
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=stop_ids[1], do_sample=True)
    # Qwen3.5's checkpoints keep a layer's experts in one tensor, as transformers does; older ones, one by one.
    model.save_pretrained(path, save_original_format=not shape.model_type.startswith("qwen3_5_moe"))
    if shape.has_mtp:
        add_mtp_weights(path, seed, shape.initializer_range)
    if shape.has_vision:
        write_processor_files(path)
    tokenizer.save_pretrained(path)
    return path


def _random_model(config: "PreTrainedConfig", has_vision: bool) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def resolve_model_path(path: str, cache_dir: str | Path, **init_kwargs: Any) -> str:
    """Return `path` unchanged, or, for `builtin:NAME`, the folder under `cache_dir` with that model, built if needed.

    `init_kwargs` are `seed` and the fields of TinyModelConfig, for a built-in model only. The same arguments give the
    same folder again. Raises ModelError for an unknown name, ConfigError for an unknown argument.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in _TYPES:
        known = ", ".join(PREFIX + model for model in BUILTIN_MODELS)
        raise ModelError(f"there is no built-in model {path!r}; there are: {known}")
    seed = init_kwargs.pop("seed", 0)
    shape = TinyModelConfig(**({"model_type": _TYPES[name]} | init_kwargs))
    key = f"{shape.model_dump_json()} {seed} {TRAINING_TEXT}"
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
