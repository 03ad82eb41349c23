"""Write the tables of the recipe reference from the config models: key, type, default, and the field's docstring.

`mkdocs build` calls `on_page_markdown` for each page; `python -m docs.generate_reference` prints the reference. It needs
pydantic and no torch.
"""

import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlqwen import config as configs
from rlqwen.config.generation import GenerationKwargs
from rlqwen.config.watch import SymptomConfig

MARKER = "<!-- docs/generate_reference.py writes the tables here -->"

CHAPTERS: dict[str, dict[str, type[BaseModel]]] = {
    "The recipe": {"Top of the recipe": configs.Recipe},
    "The model": {
        "model": configs.ModelConfig,
        "model.lora": configs.LoraSettings,
        "model.quantization": configs.QuantizationSettings,
    },
    "The data": {
        "data": configs.DataConfig,
        "data.train, data.eval": configs.SourceConfig,
        "data.train.sampled": configs.SampledPairsConfig,
        "data.cleaning": configs.CleaningConfig,
        "data.cleaning.near_duplicates": configs.NearDuplicatesConfig,
        "data.cleaning.drop_patterns, keep_patterns": configs.PatternConfig,
    },
    "The rewards": {"rewards": configs.RewardSpec, "scoring": configs.ScoringConfig},
    "Algorithms": {
        "train, algorithm sft": configs.SFTConfig,
        "train.eval_generation": configs.EvalGenerationConfig,
        "train, algorithm reward": configs.RewardConfig,
        "train, algorithm dpo": configs.DPOConfig,
        "train, algorithm ppo": configs.PPOConfig,
        "train.critic": configs.CriticConfig,
        "train, algorithm grpo": configs.GRPOConfig,
        "train, algorithm distillation": configs.DistillationConfig,
    },
    "What algorithms share": {
        "train, all algorithms": configs.TrainerConfig,
        "train, reward and dpo": configs.PreferenceConfig,
        "train, dpo and grpo": configs.SyncedReference,
        "train, ppo, grpo and distillation": configs.OnlineConfig,
        "train.generation_kwargs": GenerationKwargs,
    },
    "The rollouts": {"rollout": configs.RolloutConfig},
    "Several GPUs": {"parallel": configs.ParallelConfig},
    "The monitor": {"train.watch": configs.WatchConfig},
}
HEADINGS = {model: heading for chapter in CHAPTERS.values() for heading, model in chapter.items()}


def reference() -> str:
    """Return the reference in Markdown."""
    lines: list[str] = []
    for chapter, sections in CHAPTERS.items():
        lines += [f"## {chapter}", ""]
        for heading, model in sections.items():
            lines += [f"### {heading}", "", *_section(model)]
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the reference in the place of the marker; mkdocs calls this for each page."""
    return markdown.replace(MARKER, reference()) if MARKER in markdown else markdown


def _section(model: type[BaseModel]) -> Iterator[str]:
    model.model_rebuild()  # resolves names of models that are defined further down
    yield _prose(inspect.getdoc(model) or "")
    yield ""
    parents = [base for base in model.__bases__ if base in HEADINGS]
    if parents:
        yield f"Also takes the keys of {' and of '.join(_link(base) for base in parents)}."
        yield ""
    own = {name: field for name, field in model.model_fields.items() if name in inspect.get_annotations(model)}
    symptoms = {name: kind for name, field in own.items() if (kind := _symptom(field)) is not None}
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in own.items():
        if name not in symptoms:
            cells = (f"`{name}`", _type(field), _default(field), _prose(field.description or ""))
            yield f"| {' | '.join(cells)} |"
    yield ""
    if symptoms:
        yield "Each symptom is a section with these keys, a number, which sets its threshold, or `off`:"
        yield ""
        yield "| symptom | what it is | keys and defaults |"
        yield "|---|---|---|"
        for name, kind in symptoms.items():
            keys = (_symptom_key(key, field) for key, field in kind.model_fields.items())
            yield f"| `{name}` | {_prose(inspect.getdoc(kind) or '')} | {'<br>'.join(keys)} |"
        yield ""
        yield "`steps`: consecutive steps that must show the symptom before it counts. `action`: null means `watch.action`."
        yield ""


def _symptom_key(key: str, field: FieldInfo) -> str:
    """Write a symptom's key; `steps` and `action`, which all symptoms have, are explained once below the table."""
    meaning = "" if key in ("steps", "action") else f" {_prose(field.description or '')}"
    return f"`{key}: {_plain(field)}`{meaning}"


def _symptom(field: FieldInfo) -> type[SymptomConfig] | None:
    kinds = [kind for kind in typing.get_args(field.annotation) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, SymptomConfig)), None)


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if hasattr(limit, name)
    ]
    return ", ".join([_annotation(field.annotation), *bounds])


def _annotation(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _annotation(inner[0])
    if origin is typing.Literal:
        return " or ".join(f"`{_value(value)}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_annotation(one) for one in inner))
    if origin is list:
        return f"list of {_annotation(inner[0])}"
    if origin is dict:
        return "mapping" if inner[1] is Any else f"mapping of {_annotation(inner[0])} to {_annotation(inner[1])}"
    if annotation is configs.TrainerConfig:
        return "section, by `algorithm`"
    if annotation in HEADINGS:
        return f"section {_link(annotation)}"
    return {str: "text", int: "integer", float: "number", bool: "`true` or `false`", type(None): "`null`"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    factory = field.default_factory
    if isinstance(factory, type) and issubclass(factory, BaseModel):
        return "its defaults"
    return f"`{_plain(field)}`"


def _plain(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    return "required" if value is PydanticUndefined else _value(value)


def _value(value: Any) -> str:
    """Write a value as YAML does."""
    if isinstance(value, list):
        return f"[{', '.join(_value(one) for one in value)}]"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _link(model: type[BaseModel]) -> str:
    heading = HEADINGS[model]
    return f"[{heading}](#{slug(heading)})"


def slug(heading: str) -> str:
    """Return the anchor that mkdocs gives a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def _prose(text: str) -> str:
    """Join the lines of a docstring, and protect what Markdown and tables would read as their own signs."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return " ".join(paragraphs).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference())
