"""Call a plugin's function with what its signature names."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from rlqwen.errors import ConfigError
from rlqwen.plugins.registry import Registry, nearest


class NamedCall:
    """A function whose parameters are found by name: inputs of each call, settings of the config, a user's arguments.

    Example:
        call = NamedCall.find(LOSSES, "my_loss.py:soft_clip", inputs=("ratio", "advantage"), settings={"epsilon": 0.2})
        loss_N = call({"ratio": ratio_N, "advantage": advantage_N})     # soft_clip(ratio, advantage, epsilon=0.2)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        label: str,
        *,
        inputs: Collection[str],
        settings: Mapping[str, Any],
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Bind settings and arguments, and check the rest of the signature.

        Args:
            label: what messages call the function, such as `loss 'clipped'`.
            inputs: names of what every call will give.
            settings: values by name, of which the function takes those that it names.
            arguments: values by name, all of which the function must name; they come before settings.

        Raises ConfigError if a parameter without a default is found nowhere, or if an argument is not a parameter.
        """
        parameters = _parameters(function, label)
        given = dict(arguments or {})
        own = [name for name in parameters if name not in inputs]
        for name in given:
            if name not in own:
                near = nearest(name, own)
                hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(own) or 'none'}"
                raise ConfigError(f"{label} has no argument {name!r}; {hint}")
        self.label = label
        self.inputs = tuple(name for name in parameters if name in inputs)
        """Inputs that the function names."""
        self._function = function
        self._bound = {name: settings[name] for name in own if name in settings} | given
        missing = [
            name for name in own if name not in self._bound and parameters[name].default is inspect.Parameter.empty
        ]
        if missing:
            raise ConfigError(
                f"{label} needs {', '.join(map(repr, missing))}, which is neither among what it is called with here "
                f"({', '.join(inputs)}) nor a setting of this trainer; give it as an argument, or a default"
            )

    @classmethod
    def find(
        cls,
        registry: Registry,
        spec: str,
        *,
        inputs: Collection[str],
        settings: Mapping[str, Any],
        arguments: Mapping[str, Any] | None = None,
    ) -> "NamedCall":
        """Resolve `spec` in a registry, and check its signature; see the constructor."""
        found = registry.locate(spec)
        label = f"{registry.noun} {found.name!r} ({found.origin})"
        if not callable(found.value):
            raise registry.error(f"{label} is not callable: it is a {type(found.value).__name__}")
        return cls(found.value, label, inputs=inputs, settings=settings, arguments=arguments)

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Call the function with those of `inputs` that it names."""
        return self._function(**{name: inputs[name] for name in self.inputs}, **self._bound)


def _parameters(function: Callable[..., Any], label: str) -> dict[str, inspect.Parameter]:
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{label} has no readable signature ({error}); wrap it in a function") from error
    for name, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(f"{label}: parameter {name!r} is positional-only; it is called by name")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind not in variadic}
