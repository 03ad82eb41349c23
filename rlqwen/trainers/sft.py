"""Train on given answers: supervised fine-tuning.

Example:
    trainer = SFTTrainer(model="Qwen/Qwen3-0.6B", train_dataset=load_dataset("trl-lib/Capybara", split="train"))
    trainer.train()
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlqwen.algorithms.loss_metrics import MetricSums, read_scalars
from rlqwen.algorithms.losses import LossCall, Totals, settings_of
from rlqwen.config import SFTConfig
from rlqwen.data import as_rows, load_chat_template, tokenize_sft
from rlqwen.data.sequence_packing import PackedRow, pack_rows
from rlqwen.data.sft_tokenization import SFTJob
from rlqwen.data.streams import StreamedRows
from rlqwen.data.tokenization_job import TokenizationStats
from rlqwen.data.views import Batches, Mapped, View
from rlqwen.errors import ConfigError
from rlqwen.evaluation.generation import GenerationEvaluation
from rlqwen.evaluation.likelihood import Likelihood, measure_likelihood, sequence_tree
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import PackedBatch, Tree
from rlqwen.reporting import CompletionLog
from rlqwen.trainers.base import Trainer
from rlqwen.trainers.item_stream import ItemStream, describe_first
from rlqwen.trainers.micro_batching import add_up, count_tokens, micro_batches, pack_share
from rlqwen.trainers.run_logger import Metrics


class EvalRows(View[PackedRow]):
    """Hold an evaluation set, and the evaluation of the text that the policy generates for it."""

    def __init__(self, rows: Sequence[PackedRow], generation: GenerationEvaluation) -> None:
        self.rows, self.generation = rows, generation
        self.digest: str | None = getattr(rows, "digest", None)

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, place: int) -> PackedRow:
        return self.rows[place]


class SFTTrainer(Trainer[PackedRow, SFTConfig, Policy]):
    """Maximize the likelihood of given answers."""

    algorithm = "sft"
    config_class = SFTConfig
    default_best_metric = "eval/loss"

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: Any = None,
    ) -> None:
        """Take the arguments of TRL's SFTTrainer, with the same meaning.

        Args:
            model: hub id, folder, `builtin:tiny-qwen3`, or a transformers model, which is trained in place.
            train_dataset: a datasets.Dataset or a list of rows: `messages`, `prompt` and `completion`, `text`,
                ShareGPT or Alpaca columns; or, with `max_steps`, a datasets.IterableDataset of them.
            eval_dataset: the same, never trained on.
            processing_class: the tokenizer; None loads the model's.
            peft_config: a peft.LoraConfig; None trains all weights.
        """
        super().__init__(
            model,
            args or SFTConfig(),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        if self.args.chat_template_path is not None:
            self.processing_class.chat_template = load_chat_template(self.args.chat_template_path)
        self.loss = LossCall(
            self.args.loss_type,
            inputs=("logp", "lengths", "sequence"),
            settings=settings_of(self.args),
            arguments=self.args.loss_args,
        )
        self.load_data(train_dataset, eval_dataset)
        if self.eval_rows is not None:
            written = self.eval_rows.generation.keys if isinstance(self.eval_rows, EvalRows) else []
            self.evaluator.best.find_key([f"eval/{key}" for key in ("loss", "perplexity", "tokens", "time", *written)])
        elif self.args.eval_generation is not None:
            raise ConfigError("eval_generation needs rows to write for: give eval_dataset, or data.eval in a recipe")

    def prepare_rows(self, dataset: Any, *, evaluation: bool) -> Sequence[PackedRow]:
        rows = as_rows(dataset)
        tokenized, report = tokenize_sft(rows, self.processing_class, self.args)
        self.reports["eval" if evaluation else "train"] = report
        packed = pack_rows(tokenized, self.args.max_length if self.args.packing else None)
        if not evaluation or self.args.eval_generation is None:
            return packed
        return EvalRows(packed, GenerationEvaluation(rows, self.main_rank.policy, self.processing_class, self.args))

    def prepare_stream(self, rows: StreamedRows) -> Callable[[], ItemStream[PackedRow]]:
        job, capacity = SFTJob(self.processing_class, self.args), self.args.max_length if self.args.packing else None
        self.reports["train"] = describe_first(rows, job)

        def make(start: int, window: list[dict[str, Any]]) -> tuple[Sequence[PackedRow], TokenizationStats]:
            sequences, stats = job.run(start, window, None)
            return pack_rows(sequences, capacity), stats

        return lambda: ItemStream(rows, make)

    def step(self, rows: list[PackedRow]) -> Metrics:
        """Make one update on the mean loss of all target tokens of `rows`."""
        micro_batches = list(self._micro_batches(rows))
        counts = [count for tree in _trees(rows) for count in tree.target_counts]
        totals = Totals(tokens=sum(counts), sequences=len(counts))
        sums: dict[str, Tensor | float] = {}
        collected = MetricSums()
        for micro in micro_batches:
            micro = micro.to(self.policy.device)
            logp_N, _ = self.policy.logprobs(micro)
            loss_N, found = self.loss({"logp": logp_N, "lengths": micro.lengths_S, "sequence": micro.sequence_N})
            collected.add(found)
            loss = loss_N.sum() / max(totals.tokens, 1.0)
            loss = loss + self.router_loss(micro, micro_batches)
            self.optimizer.backward(loss)
            add_up(sums, {"loss": loss})
        self.update(micro_batches)
        add_up(sums, {"tokens/trained": count_tokens(micro_batches)})
        reduced = collected.reduce(self.ranks.gather_shares, tokens=totals.tokens, sequences=totals.sequences)
        return reduced | self.ranks.sum(read_scalars(sums)) | {"tokens/targets": totals.tokens}

    def compute_evaluation(self, rows: Sequence[PackedRow]) -> Metrics:
        """Return the mean loss per target token in nats and its exponential.

        With `eval_generation` the policy also writes answers, which are measured and logged to `completions/`.
        """
        own = measure_likelihood(self.policy, self._shared(rows, self.args.per_device_eval_batch_size))
        likelihood = Likelihood(
            nats=sum(self.ranks.gather_shares(own.nats)),
            tokens=sum(self.ranks.gather_shares(own.tokens)),
        )
        metrics = {"loss": likelihood.loss, "perplexity": likelihood.perplexity, "tokens": float(likelihood.tokens)}
        if isinstance(rows, EvalRows):
            groups = self.main_rank.run(rows.generation.sample)
            if self.ranks.is_main:
                CompletionLog(self.output_dir).write(self.state.global_step, groups, evaluation=True)
            metrics |= rows.generation.metrics(groups)
        return metrics

    def _micro_batches(self, rows: list[PackedRow]) -> Iterator[PackedBatch]:
        """Yield this rank's micro-batches of `rows`."""
        budget = self.args.max_tokens_per_micro_batch
        if budget is not None:
            return micro_batches(_trees(rows), self.ranks, max_tokens=budget)
        return self._shared(rows, self.args.per_device_train_batch_size)

    def _shared(self, rows: Sequence[PackedRow], size: int) -> Iterator[PackedBatch]:
        """Yield this rank's part of `rows` in micro-batches of `size` rows."""
        return pack_share([Mapped(Batches(share, size), _trees) for share in self.ranks.shares(rows)], self.ranks)


def _trees(rows: Sequence[PackedRow]) -> list[Tree]:
    return [sequence_tree(sequence) for row in rows for sequence in row]
