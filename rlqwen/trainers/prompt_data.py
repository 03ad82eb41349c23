"""Tokenize prompts for the trainers that sample, and check that rewards find the columns that they need."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlqwen.config import OnlineConfig
from rlqwen.config.batch_plan import prompt_room
from rlqwen.data import DataReport, as_rows, tokenize_prompts
from rlqwen.data.prompts import PromptJob
from rlqwen.data.streams import StreamedRows
from rlqwen.data.tokenization_job import TokenizationStats
from rlqwen.rewards.registry import Reward, check_rows, taken_columns
from rlqwen.trainers.item_stream import WINDOW, ItemStream, describe_first
from rlqwen.types import Prompt


class PromptData:
    """Turn rows into prompts for one model and one set of rewards."""

    def __init__(
        self,
        args: OnlineConfig,
        rewards: Sequence[Reward],
        *,
        processing_class: PreTrainedTokenizerBase,
        context: int,
        reports: dict[str, DataReport],
    ) -> None:
        """Prepare prompts for a model of `context` positions; fill in `reports` under `train` and `eval`."""
        self.columns: set[str] = set()
        """Names of the columns of all rows, for the scorer."""
        self._args = args
        self._rewards = rewards
        self._processing_class = processing_class
        self._context = context
        self._reports = reports

    @property
    def room(self) -> int:
        """Return the tokens that a prompt may have; ConfigError if the completion leaves none."""
        return prompt_room(self._context, self._args)

    def prepare(self, dataset: Any, name: str) -> Sequence[Prompt]:
        """Tokenize the prompts of a dataset; `name`: `train` or `eval`."""
        prompts, report = tokenize_prompts(
            as_rows(dataset),
            self._processing_class,
            max_prompt_length=self.room,
            overlong=self._args.overlong_prompts,
            chat_template_kwargs=self._args.chat_template_kwargs,
            num_proc=self._args.dataset_num_proc,
        )
        self._check(prompts, report, name)
        return prompts

    def stream(self, rows: StreamedRows) -> Callable[[], ItemStream[Prompt]]:
        """Return a function that starts the prompts of a stream again."""
        job = PromptJob(
            self._processing_class,
            max_prompt_length=self.room,
            overlong=self._args.overlong_prompts,
            chat_template=None,
            chat_template_kwargs=self._args.chat_template_kwargs,
        )
        self._check(job.run(0, rows.first(WINDOW), None)[0], describe_first(rows, job), "train")

        def make(start: int, window: list[dict[str, Any]]) -> tuple[Sequence[Prompt], TokenizationStats]:
            prompts, stats = job.run(start, window, None)
            if self._args.overlong_prompts == "refuse" and stats.report.num_overlong:
                job.finish(stats, None)  # raises the error
            return prompts, stats

        return lambda: ItemStream(rows, make)

    def _check(self, prompts: Sequence[Prompt], report: DataReport, name: str) -> None:
        """Check the columns that the rewards require, and keep the report."""
        columns, lines = check_rows(self._rewards, (prompt.columns for prompt in prompts), f"{name}_dataset")
        self.columns |= columns
        report.warnings += lines
        report.name_unused(taken_columns(self._rewards))
        self._reports[name] = report
