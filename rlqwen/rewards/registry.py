"""Find rewards by entry point, module or file, check which columns they need, and select their arguments.

A reward function follows TRL's protocol: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`; its
signature names the arguments that it takes. A name refers to such a function, or to a factory that returns one. A class,
or a callable that takes none of `prompts`, `completions`, `completion_ids` and no `**kwargs`, is a factory. The arguments
in a recipe are bound to a function, or passed to a factory.

A function may have an attribute `required_columns`: tuples of column names, of each of which the data must have one.
Parameters without a default are always required. A function with a true attribute `isolated` runs untrusted code and is
called only in an isolated worker. Reward models (a torch module, a model folder) are not resolved here.

Example:
    reward = resolve("accuracy", {"plain": True})
    check_columns(reward, ["prompt", "solution"], where="train.jsonl")
    reward.function(**call_arguments(reward, prompts, completions, completion_ids, {"solution": ["4", "4"]}))
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlqwen.errors import RewardSpecError
from rlqwen.plugins.kinds import REWARDS
from rlqwen.plugins.registry import nearest

__all__ = [
    "REWARDS",
    "Reward",
    "call_arguments",
    "check_columns",
    "check_rows",
    "resolve",
    "taken_columns",
    "unique_names",
]

PROTOCOL = ("prompts", "completions", "completion_ids")
"""Arguments that every reward may take."""

_ONLY_IN_TRL = ("trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True, slots=True)
class Reward:
    """Hold a reward function and what its signature says."""

    name: str
    """Name of the reward in metrics."""
    function: Callable[..., Any]
    origin: str
    """Package and version, module, or file."""
    is_async: bool
    parameters: tuple[str, ...]
    """Parameters of the signature, without those that arguments are bound to."""
    required: tuple[str, ...]
    """The `parameters` without a default."""
    accepts_any_column: bool
    """Whether it takes `**kwargs` and therefore gets every column."""
    bound: tuple[str, ...] = ()
    """Parameters that arguments are bound to; columns of these names are not passed."""
    column_choices: tuple[tuple[str, ...], ...] = ()
    """The data must have one column of each tuple."""
    isolated: bool = False
    """Whether it must run in an isolated worker."""


def resolve(reward: str | Callable[..., Any], args: Mapping[str, Any] | None = None) -> Reward:
    """Return the reward that a user named or passed, with `args` bound to it or passed to its factory.

    Raises RewardSpecError if there is none, if it fails to import, or if `args` do not fit.
    """
    args = dict(args or {})
    if isinstance(reward, str):
        found = REWARDS.locate(reward)
        candidate, name, origin = found.value, found.name, found.origin
    elif callable(reward):
        candidate, name, origin = reward, _name_of(reward), str(getattr(reward, "__module__", None))
    else:
        raise RewardSpecError(f"a reward is a name or a callable (value given: {reward!r})")
    if not callable(candidate):
        raise RewardSpecError(f"reward {name!r} ({origin}) is not callable: it is a {type(candidate).__name__}")
    if _is_function(candidate, name):
        return _describe(_bind(candidate, args, name), name, origin)
    if not isinstance(reward, str) and not args:
        raise RewardSpecError(
            f"reward {name!r} takes none of {', '.join(PROTOCOL)} and no **kwargs; "
            f"if it is a factory of reward functions, call it and pass what it returns"
        )
    made = _call_factory(candidate, args, name)
    if not callable(made) or not _is_function(made, name):
        raise RewardSpecError(
            f"reward {name!r} ({origin}) takes none of {', '.join(PROTOCOL)}, so it counts as a factory, "
            f"but what it returns is not a reward function: {made!r}"
        )
    return _describe(made, name, origin)


def _is_function(candidate: Callable[..., Any], name: str) -> bool:
    if isinstance(candidate, type):
        return False
    parameters = _signature(candidate, name).parameters.values()
    return any(parameter.name in PROTOCOL or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _bind(function: Callable[..., Any], args: dict[str, Any], name: str) -> Callable[..., Any]:
    """Bind `args`. Refuse a name that only `**kwargs` would accept, because that would hide a typo."""
    if not args:
        return function
    _check_args(args, [one for one in _named_parameters(function, name) if one not in PROTOCOL], name)
    return functools.partial(function, **args)


def _call_factory(factory: Callable[..., Any], args: dict[str, Any], name: str) -> Any:
    parameters = _named_parameters(factory, name)
    _check_args(args, parameters, name)
    missing = [one for one, parameter in parameters.items() if one not in args and parameter.default is parameter.empty]
    if missing:
        raise RewardSpecError(f"reward {name!r} needs args: {', '.join(missing)}")
    try:
        return factory(**args)
    except Exception as error:
        raise RewardSpecError(f"reward {name!r} refuses args {args}: {type(error).__name__}: {error}") from error


def _check_args(args: Iterable[str], known: Collection[str], name: str) -> None:
    for arg in args:
        if arg not in known:
            near = nearest(arg, known)
            hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise RewardSpecError(f"reward {name!r} has no argument {arg!r}; {hint}")


def _describe(function: Callable[..., Any], name: str, origin: str) -> Reward:
    bound: set[str] = set()
    inner = function
    while isinstance(inner, functools.partial):
        bound |= set(inner.keywords)
        inner = inner.func
    parameters = {one: value for one, value in _named_parameters(function, name).items() if one not in bound}
    return Reward(
        name=name,
        function=function,
        origin=origin,
        is_async=inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__),
        parameters=tuple(parameters),
        required=tuple(one for one, value in parameters.items() if value.default is value.empty),
        accepts_any_column=any(
            value.kind is value.VAR_KEYWORD for value in _signature(function, name).parameters.values()
        ),
        bound=tuple(sorted(bound)),
        column_choices=tuple(tuple(choice) for choice in getattr(inner, "required_columns", ())),
        isolated=bool(getattr(inner, "isolated", False)),
    )


def _named_parameters(function: Callable[..., Any], name: str) -> dict[str, inspect.Parameter]:
    parameters = _signature(function, name).parameters
    for one, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise RewardSpecError(f"reward {name!r}: parameter {one!r} is positional-only; rewards are called by name")
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {one: parameter for one, parameter in parameters.items() if parameter.kind in named}


def _signature(function: Callable[..., Any], name: str) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise RewardSpecError(f"reward {name!r} has no readable signature ({error}); wrap it in a function") from error


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__)).strip("<>")


def unique_names(names: Sequence[str]) -> list[str]:
    """Append `_2`, `_3`, ... to repeated names, because metrics are keyed by name."""
    unique: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate in unique or (candidate != name and candidate in names):
            candidate, number = f"{name}_{number}", number + 1
        unique.append(candidate)
    return unique


def check_columns(reward: Reward, columns: Collection[str], where: str) -> None:
    """Raise RewardSpecError if the data in `where` lacks a column that the reward requires."""
    for one in reward.required:
        if one in _ONLY_IN_TRL and one not in columns:
            raise RewardSpecError(
                f"reward {reward.name!r} ({reward.origin}) requires {one!r}, which TRL's trainer passes and "
                f"rlqwen does not, because rewards run in their own processes; give the parameter a default"
            )
    there = ", ".join(sorted(columns)) or "none"
    for choice in _column_choices(reward):
        if not any(one in columns for one in choice):
            raise RewardSpecError(
                f"reward {reward.name!r} ({reward.origin}) needs a column {' or '.join(map(repr, choice))}, which "
                f"{where} lacks; columns there: {there}. If one of them is meant, map it in the recipe: "
                f"data.train.columns: {{{choice[0]}: name_of_that_column}}"
            )


def check_rows(rewards: Sequence[Reward], rows: Iterable[Mapping[str, Any]], where: str) -> tuple[set[str], list[str]]:
    """Check that each column that a reward requires is in some row of `where`.

    Rows of several tasks need not have all of them: a reward gets None for a column that a row lacks.

    Returns:
        The names of all columns, and one line per reward about rows that lack a column that it requires.

    Raises:
        RewardSpecError: no row has a required column.
    """
    columns: set[str] = set()
    filled: Counter[frozenset[str]] = Counter()
    for row in rows:
        columns.update(row)
        filled[frozenset(name for name, value in row.items() if value is not None)] += 1
    lines = []
    for reward in rewards:
        check_columns(reward, columns, where)
        for choice in _column_choices(reward):
            count = sum(number for names, number in filled.items() if names.isdisjoint(choice))
            if count:
                lines.append(
                    f"reward {reward.name!r} is given None in {count:,} of {filled.total():,} rows of {where}, which have "
                    f"no {' and no '.join(map(repr, choice))}"
                )
    return columns, lines


def taken_columns(rewards: Iterable[Reward]) -> set[str] | None:
    """Return the columns that at least one reward takes; None if a reward takes every column."""
    taken: set[str] = set()
    for reward in rewards:
        if reward.accepts_any_column:
            return None
        taken.update(reward.parameters, *reward.column_choices)
    return taken


def _column_choices(reward: Reward) -> list[tuple[str, ...]]:
    """Return tuples of columns; the data must have one column of each tuple."""
    return [(one,) for one in reward.required if one not in PROTOCOL] + list(reward.column_choices)


def call_arguments(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments that the signature of `reward.function` names, or all of them if it takes `**kwargs`.

    All sequences, including columns, have one element per completion.
    """
    everything = dict(columns) | {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    if reward.accepts_any_column:
        return {name: value for name, value in everything.items() if name not in reward.bound}
    return {name: everything[name] for name in reward.parameters if name in everything}
