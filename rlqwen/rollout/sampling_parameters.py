"""Make the parameters and the seeds of a run's sampling from its config."""

import hashlib
from collections.abc import Sequence

from rlqwen.config import OnlineConfig
from rlqwen.config.generation import GenerationKwargs
from rlqwen.errors import ConfigError
from rlqwen.types import Sampling


def sampling_of(args: OnlineConfig, ends: Sequence[int]) -> Sampling:
    """Return the sampling parameters; `ends`: token ids that end a completion in any case."""
    more = args.generation_kwargs
    return Sampling(
        max_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=more.presence_penalty,
        frequency_penalty=more.frequency_penalty,
        stop=tuple(more.stop),
        stop_token_ids=tuple(dict.fromkeys([*ends, *more.stop_token_ids])),
        min_tokens=more.min_tokens,
        bad_words=tuple(more.bad_words),
        logit_bias=tuple(more.logit_bias.items()),
        allowed_token_ids=tuple(more.allowed_token_ids),
    )


def refuse_unknown_tokens(drawn: GenerationKwargs, vocabulary: int) -> None:
    """Raise ConfigError if a setting names a token that the model lacks."""
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        unknown = [token for token in getattr(drawn, name) if not 0 <= token < vocabulary]
        if unknown:
            raise ConfigError(
                f"generation_kwargs.{name} names token {unknown[0]}, and the model has tokens 0 to {vocabulary - 1}"
            )


def sampling_seed(run_seed: int, draw: str, place: int, sample: int) -> int:
    """Return a 63-bit seed for one completion: the same arguments give the same completion on any worker."""
    digest = hashlib.blake2b(f"{run_seed}/{draw}/{place}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
