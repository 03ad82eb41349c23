"""Make a plan from what the command line says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlqwen.planning.cheapest_change import Change, cheapest_change, setting_words
from rlqwen.planning.gpus import Cluster
from rlqwen.planning.layout_search import find_best
from rlqwen.planning.plan_report import plan_values, report_plan
from rlqwen.planning.plan_target import count_rows, is_model, measure, read_target
from rlqwen.planning.run_plan import RunPlan, RunPlanner
from rlqwen.planning.workload import Workload
from rlqwen.preflight.check_report import CheckReport
from rlqwen.preflight.model_size import ModelSize
from rlqwen.preflight.parallel_layout import ParallelLayout


@dataclass(frozen=True)
class MadePlan:
    """A plan, and where it does not fit the cheapest change that does."""

    plan: RunPlan
    size: ModelSize
    change: Change | None
    is_mean_known: bool
    notes: tuple[str, ...] = ()
    settings: str = ""
    """What `--best` chose other than the recipe says."""

    def report(self) -> CheckReport:
        """Return the plan for people."""
        report = report_plan(self.plan, self.size, change=self.change, is_mean_known=self.is_mean_known)
        report.warnings += self.notes
        if self.settings:
            report.facts.insert(2, ("settings", self.settings))
        return report

    def values(self) -> dict[str, Any]:
        """Return the plan for programs, as JSON values."""
        return plan_values(self.plan, self.size, self.change) | {"settings": self.settings}


def make_plan(
    target: str,
    overrides: Sequence[str] = (),
    *,
    gpus: str,
    layout: str | None = None,
    best: bool = False,
    num_rows: int | None = None,
    mean_tokens: float | None = None,
) -> MadePlan:
    """Plan a recipe or a model on GPUs such as `16xH100-80G`.

    `layout`: such as `fsdp=16,ep=8`; None: the recipe's. `best`: the fastest layout that fits, or the given one if none does.
    Raises ConfigError or ModelError for what does not exist or does not divide.
    """
    cluster = Cluster.parse(gpus)
    recipe = read_target(target, overrides)
    size = measure(recipe)
    ranks = RunPlanner.train_ranks(recipe, cluster)
    chosen = ParallelLayout.parse(layout, ranks) if layout else ParallelLayout.of(recipe.train.parallel, ranks)
    chosen.check(size.text_config)
    if num_rows is None and not is_model(target) and recipe.train.max_steps < 0:
        num_rows = count_rows(recipe)
    work = Workload.of(recipe, size.facts.context, chosen, num_rows=num_rows, mean=mean_tokens)
    planner = RunPlanner(recipe, size, cluster, work)
    given = planner.plan(chosen)
    found = find_best(planner) if best else None
    plan = found or given
    notes = () if found or not best else (f"--best: none of the layouts fits; this is {chosen}",)
    if missing := plan.layout.missing:
        notes = (*notes, _missing_note(missing, find_best(planner, runnable=True) if best else None))
    change = None if plan.fits else cheapest_change(planner, plan)
    settings = setting_words(given, plan) if best else ""
    return MadePlan(plan, size, change, mean_tokens is not None, notes, settings)


def _missing_note(missing: Sequence[str], runnable: RunPlan | None) -> str:
    note = f"this version of rlqwen has no {' and '.join(missing)}: the layout is planned, and cannot be run yet"
    if runnable is None:
        return note
    speed = runnable.tokens_per_second
    return f"{note}; the fastest that it runs is {runnable.layout}, with {speed:,.0f} tokens/s ({runnable.layout.keys})"
