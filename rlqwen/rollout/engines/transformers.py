"""Plain sampling in the trainer's own process, from the policy's own weights: for machines without vLLM."""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from rlqwen.config import RolloutConfig
from rlqwen.data.control_tokens import CompletionReader
from rlqwen.errors import ConfigError
from rlqwen.rollout.engine import Engine
from rlqwen.rollout.engines.transformers_shaping import Shaping, StopTexts
from rlqwen.types import Canary, Completion, Group, GroupRequest


class TransformersEngine:
    """Groups drawn by `generate`, several prompts at a time; there is nothing to sync, only a version to count."""

    def __init__(
        self, policy: Any, tokenizer: PreTrainedTokenizerBase, *, max_model_length: int, max_num_seqs: int
    ) -> None:
        """Sample from `policy`, whose `generation_model()` is a context manager that returns the model in eval mode."""
        self.version = 0
        self._policy = policy
        self._tokenizer = tokenizer
        self._reader = CompletionReader(tokenizer)
        self._max_model_length = max_model_length
        self._max_num_seqs = max_num_seqs

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        """See RolloutEngine."""
        for request in requests:
            if len(request.prompt.token_ids) >= self._max_model_length:
                raise ConfigError(
                    f"prompt {request.prompt.index} has {len(request.prompt.token_ids)} tokens, which leaves no room "
                    f"for a completion in the context of {self._max_model_length}; set train.max_prompt_length"
                )
        # Prompts of like length together: the fewer pad tokens.
        pending = deque(sorted(requests, key=lambda request: len(request.prompt.token_ids)))
        while pending:
            batch = [pending.popleft()]
            while pending and pending[0].sampling == batch[0].sampling and self._fits(batch, pending[0]):
                batch.append(pending.popleft())
            yield from self._sample(batch)

    def load_weights(
        self, version: int, weights: Iterable[tuple[str, Tensor]], canary: Canary | None
    ) -> dict[str, float]:
        """Count the version only: the weights are the policy's own, so `weights` and `canary` are not read."""
        self.version = version
        return {"sync/bytes": 0.0}

    def cancel(self) -> None:
        """See RolloutEngine; nothing runs in another thread."""

    def close(self) -> None:
        """Nothing to end."""

    def _fits(self, batch: list[GroupRequest], request: GroupRequest) -> bool:
        if request.sampling.repetition_penalty != 1 and len(request.prompt.token_ids) != len(batch[0].prompt.token_ids):
            return False  # The penalty would see the pad tokens.
        return sum(len(other.seeds) for other in batch) + len(request.seeds) <= self._max_num_seqs

    def _sample(self, batch: list[GroupRequest]) -> Iterator[Group]:
        sampling = batch[0].sampling
        rows = [request.prompt.token_ids for request in batch for _ in request.seeds]
        prompt_length = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad
        with self._policy.generation_model() as model, _own_defaults(model):
            device = model.device
            ids_BT = torch.tensor([[pad] * (prompt_length - len(row)) + row for row in rows], device=device)
            mask_BT = torch.tensor([[0] * (prompt_length - len(row)) + [1] * len(row) for row in rows], device=device)
            shaping = Shaping(sampling, prompt_length, self._tokenizer)
            seeds = [seed for request in batch for seed in request.seeds]
            sampler = _SeededSampler(seeds, shaping, greedy=sampling.temperature == 0)
            texts = StopTexts(sampling, prompt_length, self._tokenizer, len(rows)) if sampling.stop else None
            room = self._max_model_length - prompt_length
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=min(sampling.max_tokens, room),
                eos_token_id=list(sampling.stop_token_ids) or None,
                pad_token_id=pad,
            )
            output_BT = model.generate(
                ids_BT,
                attention_mask=mask_BT,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([] if texts is None else [texts]),
                synced_gpus=False,  # the weights are whole: other ranks do not generate
            )
        chosen_BT, logp_BT = output_BT[:, prompt_length:], torch.stack(sampler.logp_T, dim=1)
        ends_B = [None] * len(rows) if texts is None else texts.lengths_B
        completions_B = self._completions(chosen_BT.tolist(), logp_BT.tolist(), set(sampling.stop_token_ids), ends_B)
        for request in batch:
            yield Group(request.prompt, [next(completions_B) for _ in request.seeds], self.version)

    def _completions(
        self,
        token_ids_B: list[list[int]],
        logp_B: list[list[float]],
        stop: set[int],
        ends_B: Sequence[int | None] | None = None,
    ) -> Iterator[Completion]:
        """Yield completions; `ends_B`: tokens up to the end of a stop text, if there is one."""
        ends_B = ends_B or [None] * len(token_ids_B)
        ids_B = [row[:end] for row, end in zip(token_ids_B, ends_B, strict=True)]
        lengths_B = [next((place + 1 for place, token in enumerate(ids) if token in stop), None) for ids in ids_B]
        ids_B = [ids[:length] for ids, length in zip(ids_B, lengths_B, strict=True)]
        parts = zip(ids_B, lengths_B, ends_B, logp_B, self._reader.texts(ids_B), strict=True)
        for ids, length, end, logp, text in parts:
            is_finished = length is not None or end is not None
            yield Completion(ids, logp[: len(ids)], "stop" if is_finished else "length", text)


@contextlib.contextmanager
def _own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Keep `generate` from filling in arguments, such as penalties and stop tokens, from the model's generation config."""
    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved


class _SeededSampler(LogitsProcessor):
    """Turns greedy decoding into sampling, each row from its own generator.

    The largest of logprob plus Gumbel noise is a draw from the distribution (the Gumbel-max trick, arXiv 1411.0030),
    so a completion depends on its seed and prompt alone and not on its neighbors in the batch.
    """

    def __init__(self, seeds_B: Sequence[int], shaping: Shaping, *, greedy: bool) -> None:
        self.generators_B = [torch.Generator().manual_seed(seed) for seed in seeds_B]
        self.logp_T: list[Tensor] = []
        """(B,) float32 for each decoded token."""
        self.greedy = greedy
        self.shaping = shaping

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp_BV = self.shaping(input_ids, scores).log_softmax(dim=-1)
        noisy_BV = logp_BV
        if not self.greedy:
            width = logp_BV.shape[-1]
            uniform_BV = torch.stack([torch.rand(width, generator=generator) for generator in self.generators_B])
            noisy_BV = logp_BV - (-uniform_BV.to(logp_BV.device).clamp_min(1e-20).log()).log()
        self.logp_T.append(logp_BV.gather(-1, noisy_BV.argmax(dim=-1, keepdim=True)).squeeze(-1))
        return noisy_BV


class Transformers(Engine):
    """Sample with transformers in the trainer's own process."""

    title = "transformers"

    @classmethod
    def build(
        cls, config: RolloutConfig, *, policy: Any, tokenizer: PreTrainedTokenizerBase, max_model_length: int
    ) -> TransformersEngine:
        return TransformersEngine(
            policy, tokenizer, max_model_length=max_model_length, max_num_seqs=config.max_num_seqs
        )
