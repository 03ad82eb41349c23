"""Make preference pairs of a model's own answers: sample, score, and pair better answers with worse ones.

Example:
    recipe = sample_pairs(load_recipe("quickstart_dpo"), print)   # its data are files now, under output_dir/pairs

A policy learns most from answers that it can give itself, right and wrong; answers of other models are far from both.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlqwen.config import Recipe, SampledPairsConfig, SourceConfig
from rlqwen.data import load_rows
from rlqwen.data.generated_rows import GENERATORS
from rlqwen.errors import DataError
from rlqwen.evaluation.eval_config import EvalConfig, split_column, split_names
from rlqwen.evaluation.eval_model import find_model
from rlqwen.evaluation.sampling import sample
from rlqwen.preflight.reward_check import check_reward_columns, resolve_rewards
from rlqwen.rewards import Scorer
from rlqwen.terminal import json_text
from rlqwen.types import Completion, Group

PAIRS_FOLDER = "pairs"
Row = dict[str, Any]


def sample_pairs(recipe: Recipe, announce: Callable[[str], None]) -> Recipe:
    """Sample the pairs that a recipe asks for, and return it with files in their place: `pairs/*.jsonl` of its folder.

    Each line has the prompt, `chosen` and `rejected`, their rewards, and the prompt row's other columns. Raises
    DataError if no prompt has answers of different rewards.
    """
    data = recipe.data
    for part in ("train", "eval"):
        sources = getattr(data, part)
        several = sources if isinstance(sources, list) else [sources] if sources else []
        drawn = [_drawn(recipe, part, number, source, announce) for number, source in enumerate(several)]
        if drawn != several:
            data = data.model_copy(update={part: drawn if isinstance(sources, list) else drawn[0]})
    return recipe if data is recipe.data else recipe.model_copy(update={"data": data})


def _drawn(
    recipe: Recipe, part: str, number: int, source: SourceConfig, announce: Callable[[str], None]
) -> SourceConfig:
    if source.sampled is None:
        return source
    config = source.sampled
    model = config.model or recipe.model.path
    path = Path(recipe.output_dir) / PAIRS_FOLDER / (f"{part}.jsonl" if number == 0 else f"{part}-{number}.jsonl")
    if recipe.train.resume_from_checkpoint and path.is_file():
        announce(f"{part}: pairs that were sampled before are in {path}")
        return source.model_copy(update={"sampled": None, "path": str(path)})
    announce(f"{part}: sampling {config.num_samples} answers to each prompt from {model}, for pairs")
    rows, summary = draw_pairs(model, config)
    write_pairs(path, rows)
    announce(f"{part}: {summary} in {path}")
    return source.model_copy(update={"sampled": None, "path": str(path)})


def sampled_config(
    prompts: str, *, reward_names: str, columns: Sequence[str], limit: int | None, engine: str | None, **options: Any
) -> SampledPairsConfig:
    """Return the config that the command line asks for; `prompts` is a file, folder, hub id or generator."""
    origin = "generator" if prompts in GENERATORS else "path"
    source = {origin: prompts, "columns": dict(split_column(column) for column in columns), "limit": limit}
    rewards = [{"name": name} for name in split_names(reward_names)]
    rollout = {} if engine is None else {"engine": engine}
    return SampledPairsConfig.parse({"prompts": source, "rewards": rewards, "rollout": rollout, **options})


def draw_pairs(model: str, config: SampledPairsConfig) -> tuple[list[Row], str]:
    """Return pairs of answers of `model`, in the order of the prompts, and a line that counts them."""
    prompts = load_rows(config.prompts, seed=config.seed)
    rewards = resolve_rewards(config.rewards)
    check_reward_columns(rewards, prompts, "sampled.prompts")
    sampling = EvalConfig(
        model=model,
        data=config.prompts,
        rewards=config.rewards,
        num_samples=config.num_samples,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        seed=config.seed,
        chat_template_kwargs=config.chat_template_kwargs,
        rollout=config.rollout,
    )
    groups: list[Group] = []
    weights = [spec.weight for spec in config.rewards]
    with tempfile.TemporaryDirectory() as scratch, Scorer(rewards, config.scoring, weights=weights) as scorer:
        sample(find_model(model, Path(scratch)), prompts, sampling, scorer, groups)
    rows = [row for group in groups for row in _pairs_of(group, config)]
    if not rows:
        raise DataError(
            f"sampled: none of {len(groups)} prompts has answers of {model} whose rewards differ by more than "
            f"min_gap={config.min_gap:g}; raise num_samples or temperature, or choose prompts that it gets right at times"
        )
    used = len({json.dumps(row["prompt"], sort_keys=True) for row in rows})
    return (
        rows,
        f"{len(rows)} pairs of {used} prompts; the other {len(groups) - used} prompts got one reward throughout",
    )


def _pairs_of(group: Group, config: SampledPairsConfig) -> Iterator[Row]:
    """Pair the best answer with the worst, the next best with the next worst, and so on."""
    scored = [
        (reward, completion)
        for reward, completion in zip(group.total_rewards_G, group.completions, strict=True)
        if reward is not None
    ]
    ranked = sorted(scored, key=lambda one: one[0], reverse=True)
    for place in range(min(config.pairs_per_prompt, len(ranked) // 2)):
        (high, chosen), (low, rejected) = ranked[place], ranked[-1 - place]
        if high - low <= config.min_gap:
            return
        yield {
            **group.prompt.columns,
            "prompt": group.prompt.content,
            "chosen": _answer(group, chosen),
            "rejected": _answer(group, rejected),
            "chosen_reward": high,
            "rejected_reward": low,
        }


def _answer(group: Group, completion: Completion) -> Any:
    if group.prompt.is_conversational:
        return [{"role": "assistant", "content": completion.text}]
    return completion.text


def write_pairs(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL, whole or not at all; make the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")  # a run that goes on reads it as it is
    partial.write_text("".join(json_text(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
