"""Find the layers that names in `target_modules` mean, experts, routers and shared experts included.

transformers keeps the experts of a layer in two fused parameters and its router in a class of its own. PEFT reaches
both by `target_parameters` alone. Its own mapping of names covers some of Qwen's mixtures, loses their shared experts,
and takes experts and routers into `all-linear`; so rlqwen resolves names here, by the same rules for all models.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rlqwen.errors import ModelError
from rlqwen.models.vision_language import exclusion, towers

ALL_LINEAR = "all-linear"
_FUSED = {
    "gate_up_proj": frozenset({"gate_up_proj", "gate_proj", "up_proj"}),
    "down_proj": frozenset({"down_proj"}),
}
"""Parameter of the experts -> names of the projections in it."""
_REMAPPED = {
    model_type: frozenset({"gate", "gate_proj", "up_proj", "down_proj"})
    for model_type in ("qwen2_moe", "qwen3_moe", "qwen3_next")
}
"""Model type -> last parts of names that PEFT 0.21 takes for experts and routers, with any prefix."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def resolve_targets(model: PreTrainedModel, config: Any) -> list[str]:
    """Rewrite the targets of a LoraConfig in place in a form that PEFT takes literally, and return notes for the user.

    Modules outside the text model, such as a vision tower, are excluded.

    Raises ModelError for a target that matches nothing, with similar names, and for options that fused weights lack.
    """
    outside = towers(model)
    if outside:
        config.exclude_modules = exclusion(outside, config.exclude_modules)
    if config.target_modules is None:
        return []
    layers = _Layers(model, config, outside)
    given = config.target_modules
    names = [given] if isinstance(given, str) else sorted(given)
    is_pattern = isinstance(given, str) and given != ALL_LINEAR and not re.fullmatch(r"[\w.]+", given)
    modules: set[str] = set()
    parameters: set[str] = set()
    for name in names:
        matched, fused = layers.all_linear() if name == ALL_LINEAR else layers.find(name, is_pattern)
        if not matched and not fused:
            raise ModelError(f"target_modules: {layers.unknown(name)}")
        modules |= matched
        parameters |= fused
    parameters |= layers.given_parameters(config.target_parameters or ())
    layers.check_effect(modules | {name.removesuffix(".weight") for name in parameters})
    if layers.is_plain and (given == ALL_LINEAR or ALL_LINEAR not in names):
        config.target_modules = given if is_pattern or not isinstance(given, str) or given == ALL_LINEAR else names
        return []
    parameters |= {layers.weight_of(name) for name in modules if layers.is_remapped(name)}
    modules = {name for name in modules if not layers.is_remapped(name)}
    _check_fused(config, parameters)
    config.target_modules = _shortest(modules, layers.module_names)
    config.target_parameters = _shortest(parameters, layers.parameter_names) or None
    return layers.notes(names, parameters)


class _Layers:
    """Hold the layers of one model that adapters can be put on, by full name."""

    def __init__(self, model: PreTrainedModel, config: Any, outside: Iterable[str]) -> None:
        """Take the names of modules outside the text model in `outside`."""
        self._model = model
        self._config = config
        named = dict(model.named_modules())
        prefixes = tuple(f"{name}." for name in outside)
        self._in_tower = {name for name in named if f"{name}.".startswith(prefixes)}
        self.experts = {name for name, module in named.items() if _is_experts(module)} - self._in_tower
        self.routers = set(_routers(model)) - self._in_tower
        self._modules = {
            name: module
            for name, module in named.items()
            if name and name not in self._in_tower | self.experts | self.routers
        }
        self.module_names = [*self._modules]
        self.parameter_names = [name for name, _ in model.named_parameters() if not name.startswith(prefixes)]
        self._remapped = _REMAPPED.get(model.config.get_text_config().model_type, frozenset())

    @property
    def is_plain(self) -> bool:
        """Return whether PEFT reads the names correctly by itself."""
        return not (self.experts or self.routers or self._in_tower)

    def find(self, name: str, is_pattern: bool) -> tuple[set[str], set[str]]:
        """Return the modules and the parameters that a name, the end of one, or a regular expression means."""
        pattern = re.compile(name if is_pattern else rf"(.*\.)?{re.escape(name)}")
        fits = pattern.fullmatch
        modules = {key for key in self._modules if fits(key)}
        parameters = {f"{key}.weight" for key in self.routers if fits(key) or fits(f"{key}.weight")}
        for experts in self.experts:
            for parameter, projections in _FUSED.items():
                named = any(fits(f"{experts}.{projection}") for projection in projections)
                if named or fits(experts):
                    parameters.add(f"{experts}.{parameter}")
        return self._kept(modules), self._kept(parameters)

    def all_linear(self) -> tuple[set[str], set[str]]:
        """Return the linear layers except the head; experts and routers do not count as such."""
        head = self._model.get_output_embeddings()
        linear = {key for key, module in self._modules.items() if isinstance(module, nn.Linear) and module is not head}
        return self._kept(linear), set()

    def given_parameters(self, names: Iterable[str]) -> set[str]:
        """Return the full names of `target_parameters`; ModelError for one that matches nothing."""
        found: set[str] = set()
        for name in names:
            matched = {key for key in self.parameter_names if _ends_in(key, (name,))}
            if not matched:
                raise ModelError(f"target_parameters: {self.unknown(name)}")
            found |= matched
        return found

    def is_remapped(self, name: str) -> bool:
        """Return whether PEFT would take the linear layer `name` for something else, so that its weight must be named."""
        return name.rpartition(".")[2] in self._remapped

    def weight_of(self, name: str) -> str:
        """Return the name of the weight of a linear layer; ModelError for a quantized one, which has none to adapt."""
        if not self._modules[name].weight.is_floating_point():
            raise ModelError(
                f"target_modules: PEFT cannot put an adapter on the quantized {name} of this mixture of experts; name the "
                "attention's projections alone, or load the model without quantization"
            )
        return f"{name}.weight"

    def unknown(self, name: str) -> str:
        """Return what is wrong with a name that matches nothing."""
        if any(_ends_in(key, (name,)) for key in self._in_tower):
            return f"{name!r} is part of the vision tower, which gets no adapter; leave it out"
        linear = {key.rpartition(".")[2] for key, module in self._modules.items() if isinstance(module, nn.Linear)}
        known = linear | ({"experts", *_FUSED["gate_up_proj"], *_FUSED["down_proj"]} if self.experts else set())
        known |= {key.rpartition(".")[2] for key in self.routers}
        nearest = difflib.get_close_matches(name.rpartition(".")[2], known, 3, 0.5)
        there = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(sorted(known))}"
        return f"{name!r} matches nothing that the {type(self._model).__name__} has for this adapter; {there}"

    def check_effect(self, names: set[str]) -> None:
        """Raise ModelError for an adapter that no forward would run."""
        for name in sorted(names):
            if isinstance(self._modules.get(name), nn.Conv1d):
                raise ModelError(without_effect(name))

    def notes(self, names: Iterable[str], parameters: set[str]) -> list[str]:
        """Return what `all-linear` left out, and a projection that came with another."""
        adapted = {name.rpartition(".")[0] for name in parameters}
        if ALL_LINEAR in names and not self.experts & adapted:
            fused = sum(weight.numel() for name, weight in self._model.named_parameters() if self._holds(name))
            share = fused / sum(weight.numel() for weight in self._model.parameters())
            left_out = (
                f"the adapter on all-linear leaves out experts ({share:.0%} of the parameters, fused in a weight per layer) "
                "and routers; target_modules: [all-linear, experts] adapts the experts too"
            )
            return [left_out]
        last = {name.rpartition(".")[2] for name in names}
        if self.experts & adapted and len(last & {"gate_proj", "up_proj"}) == 1 and "experts" not in last:
            return ["gate_proj and up_proj of the experts are one weight, so that the adapter is on both"]
        return []

    def _holds(self, parameter: str) -> bool:
        return parameter.rpartition(".")[0] in self.experts

    def _kept(self, names: set[str]) -> set[str]:
        """Return those of `names` that the config neither excludes nor leaves to other layers."""
        return {name for name in names if not self._is_left_out(name)}

    def _is_left_out(self, name: str) -> bool:
        owner, _, last = name.rpartition(".")
        keys = [owner, name] if last in _FUSED and owner in self.experts else [name.removesuffix(".weight")]
        excluded = self._config.exclude_modules or ()
        saved = self._config.modules_to_save or ()
        for key in keys:
            if isinstance(excluded, str):
                if re.fullmatch(excluded, key):
                    return True
            elif _ends_in(key, excluded):
                return True
            if _ends_in(key, saved):
                return True
        layers = self._config.layers_to_transform
        if layers is None:
            return False
        match = _LAYER.search(name)
        return match is None or int(match[1]) not in ([layers] if isinstance(layers, int) else layers)


def without_effect(name: str) -> str:
    """Return why the convolution `name` of a delta-net layer gets no adapter."""
    return (
        f"{name}: the delta-net layer reads the weight of its convolution and does not call it, so that an adapter on it "
        "would have no effect; leave conv1d out of the targets, or put it into modules_to_save to train it whole"
    )


def _ends_in(key: str, names: Iterable[str]) -> bool:
    """Return whether a dotted name is one of `names`, or ends in one."""
    return any(key == name or key.endswith(f".{name}") for name in names)


def _is_experts(module: nn.Module) -> bool:
    """Return whether the module holds the fused weights of experts."""
    return all(getattr(module._parameters.get(name), "ndim", 0) == 3 for name in _FUSED)


def _routers(model: PreTrainedModel) -> Iterator[str]:
    """Return the names of modules that choose experts and are not linear layers."""
    for name, module in model.named_modules():
        if hasattr(module, "top_k") and "weight" in module._parameters and not isinstance(module, nn.Linear):
            yield name


def _check_fused(config: Any, parameters: set[str]) -> None:
    """Raise ModelError for what PEFT cannot do with an adapter on a parameter."""
    if not parameters:
        return
    where = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in parameters}))
    faults = {
        f"lora_dropout={config.lora_dropout:g}": bool(config.lora_dropout),
        "use_dora=true": config.use_dora,
        f"init_lora_weights={config.init_lora_weights}": config.init_lora_weights in ("pissa", "olora"),
        "lora_bias=true": config.lora_bias,
    }
    for fault, is_there in faults.items():
        if is_there:
            raise ModelError(
                f"{fault}: PEFT does not support this for adapters on {where}, which are parameters without a linear "
                "layer of their own; leave it out, or take them out of the targets"
            )


def _shortest(names: set[str], among: list[str]) -> list[str]:
    """Return ends of `names`, such as `mlp.experts.down_proj`, if they match no others of `among`; else full names."""
    short: set[str] = set()
    for count in (1, 2, 3):
        for end in {".".join(name.split(".")[-count:]) for name in names}:
            same = {name for name in among if _ends_in(name, (end,))}
            if same <= names and not any(name in short for name in same):
                short.add(end)
                names = names - same
    return sorted(short | names)
