"""Sample completions of a model and score them as they arrive; score answers from the data in the same form."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.progress import track

from rlqwen.config import OnlineConfig
from rlqwen.data import DataReport, tokenize_prompts
from rlqwen.data.references import own_answer
from rlqwen.errors import DataError
from rlqwen.evaluation.eval_config import EvalConfig
from rlqwen.evaluation.eval_model import EvalModel, policy_of
from rlqwen.models.loading import load_generation_config, stop_token_ids
from rlqwen.preflight import prompt_room
from rlqwen.reporting.console import TerminalConsole
from rlqwen.rewards import Scorer
from rlqwen.rollout import RolloutEngine, build_engine
from rlqwen.rollout.engine import engine_class
from rlqwen.rollout.sampling_parameters import sampling_seed
from rlqwen.types import Completion, Group, GroupRequest, Prompt, Sampling

Row = dict[str, Any]
_LINE_EVERY_S = 60.0


def sample(model: EvalModel, rows: Sequence[Row], config: EvalConfig, scorer: Scorer, groups: list[Group]) -> None:
    """Fill `groups` with a group for each prompt, in the order of the rows; after a failure it holds what came before.

    The same config gives the same completions, and two models get the same seeds. The engine is closed at the end.
    """
    prompts, report = _prompts(model, rows, config)
    scorer.columns |= {column for prompt in prompts for column in prompt.columns}
    sampling = Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        stop_token_ids=stop_token_ids(model.facts.tokenizer, load_generation_config(model.folder), report.end_of_turn),
    )
    requests = [
        GroupRequest(
            prompt,
            tuple(sampling_seed(config.seed, "eval", prompt.index, k) for k in range(config.num_samples)),
            sampling,
        )
        for prompt in prompts
    ]
    with _engine(model, prompts, config) as engine:
        for group in _with_progress(engine.generate(requests), len(requests), TerminalConsole(stderr=True)):
            scorer.submit(group)
            groups.append(group)
        scorer.wait()
    groups.sort(key=lambda group: group.prompt.index)


def _with_progress(arriving: Iterable[Group], total: int, console: TerminalConsole) -> Iterator[Group]:
    """Yield groups and show how many came: by a bar in a terminal, else by a line per minute."""
    if console.is_terminal:
        yield from track(arriving, "sampling", total, console=console)
        return
    last = time.monotonic()
    for number, group in enumerate(arriving, 1):
        if (now := time.monotonic()) - last >= _LINE_EVERY_S:
            last = now
            console.print(f"sampled {number:,} of {total:,} prompts")
        yield group


def own_answers(rows: Sequence[Row]) -> list[str]:
    """Return the answer of each row; DataError for a row without one."""
    answers = []
    for number, row in enumerate(rows):
        answer = own_answer(row, f"row {number}")
        if answer is None:
            raise DataError(
                f"row {number} has no answer of its own to compare with: --against data needs a column 'completion', or "
                "messages that end in an assistant turn; map one with --column completion=NAME"
            )
        answers.append(answer)
    return answers


def given_answers(
    model: EvalModel, rows: Sequence[Row], config: EvalConfig, scorer: Scorer, answers: Sequence[str]
) -> list[Group]:
    """Score `answers`, one per row, as if each had been sampled `config.num_samples` times.

    The tokenizer of `model` makes their token ids.
    """
    groups = []
    for prompt in _prompts(model, rows, config)[0]:
        text = answers[prompt.index]
        ids = model.facts.tokenizer(text, add_special_tokens=False)["input_ids"]
        groups.append(Group(prompt, [Completion(ids, [], "stop", text)] * config.num_samples, policy_version=0))
    scorer.score(groups)
    return groups


def _prompts(model: EvalModel, rows: Sequence[Row], config: EvalConfig) -> tuple[Sequence[Prompt], DataReport]:
    return tokenize_prompts(
        rows,
        model.facts.tokenizer,
        max_prompt_length=prompt_room(model.facts.context, OnlineConfig(max_completion_length=config.max_tokens)),
        chat_template_kwargs=config.chat_template_kwargs,
    )


@contextmanager
def _engine(model: EvalModel, prompts: Sequence[Prompt], config: EvalConfig) -> Iterator[RolloutEngine]:
    with ExitStack() as stack:
        policy = None if engine_class(config.rollout).in_workers else stack.enter_context(policy_of(model.folder))
        engine = build_engine(
            config.rollout,
            model_path=model.folder,
            tokenizer=model.facts.tokenizer,
            policy=policy,
            compute_dtype=model.facts.dtype,
            max_model_length=max(len(prompt.token_ids) for prompt in prompts) + config.max_tokens,
            seed=config.seed,
        )
        stack.callback(engine.close)
        yield engine
