"""Find the metric of an evaluation that a config names."""

import difflib
from collections.abc import Iterable

from rlqwen.errors import ConfigError


def find_metric(given: str, keys: Iterable[str]) -> str:
    """Return the one of `keys` that `metric_for_best_model` names; ConfigError if there is none.

    `eval/` may be left out, and transformers' spelling with `_` for `/` is understood.
    """
    spelled = {key.removeprefix("eval/").replace("/", "_"): key for key in keys}
    name = given.removeprefix("eval/").removeprefix("eval_").replace("/", "_")
    if name not in spelled:
        near = difflib.get_close_matches(name, spelled, n=1)
        hint = f"did you mean {spelled[near[0]]!r}? " if near else ""
        raise ConfigError(
            f"metric_for_best_model={given!r} is not among the evaluation's metrics; "
            f"{hint}there are: {', '.join(sorted(spelled.values()))}"
        )
    return spelled[name]
