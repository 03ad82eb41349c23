"""Evaluate SFT by what the policy writes."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlqwen.config import OnlineConfig, SFTConfig
from rlqwen.data import tokenize_prompts
from rlqwen.evaluation.metrics.text_metrics import TextMeasure
from rlqwen.models.loading import stop_token_ids
from rlqwen.models.policy import Policy
from rlqwen.preflight import prompt_room
from rlqwen.rollout.engines.transformers import TransformersEngine
from rlqwen.rollout.group_metrics import describe_groups
from rlqwen.rollout.sampling_parameters import sampling_seed
from rlqwen.types import Group, GroupRequest, Sampling

_LENGTHS = ("completions/mean_length", "completions/truncated")


class GenerationEvaluation:
    """Sample a completion for each prompt of an evaluation set, and compare it with the right answers.

    transformers samples in this process, with the same seeds at every evaluation.
    """

    def __init__(
        self, rows: Sequence[dict[str, Any]], policy: Policy, tokenizer: PreTrainedTokenizerBase, args: SFTConfig
    ) -> None:
        """Take normalized `rows`; DataError for one without a prompt or a right answer."""
        assert args.eval_generation is not None
        config = args.eval_generation
        rows = rows[: config.limit]
        self.measure = TextMeasure(config.metrics, rows, reference=config.reference, labels=config.labels)
        context = policy.text_config.max_position_embeddings
        prompts, report = tokenize_prompts(
            rows,
            tokenizer,
            max_prompt_length=prompt_room(context, OnlineConfig(max_completion_length=config.max_tokens)),
            chat_template_kwargs=args.chat_template_kwargs,
        )
        self.engine = TransformersEngine(policy, tokenizer, max_model_length=context, max_num_seqs=config.max_num_seqs)
        stop_ids = stop_token_ids(tokenizer, policy.generation_config, report.end_of_turn)
        sampling = Sampling(config.max_tokens, temperature=config.temperature, stop_token_ids=stop_ids)
        self.requests = [
            GroupRequest(prompt, (sampling_seed(args.seed, "eval", prompt.index, 0),), sampling) for prompt in prompts
        ]

    @property
    def keys(self) -> list[str]:
        """Return the names of the metrics that `metrics` returns."""
        return [*self.measure.keys, *_LENGTHS]

    def sample(self) -> list[Group]:
        """Return a completion of the current policy for each prompt, in the order of the rows."""
        return sorted(self.engine.generate(self.requests), key=lambda group: group.prompt.index)

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return the text metrics, and how long completions are."""
        lengths = describe_groups(groups)
        return self.measure.compute(groups).values | {key: lengths[key] for key in _LENGTHS}
