"""Seeds on vLLM's CPU engine, where a prompt is computed in several steps.

vLLM samples a token after each step of a prompt, drops it unless the prompt is complete, and sets the request's
generator back by an offset. Generators on CPU have none: vLLM 0.32 stops with "CPU Generator does not use offset" as soon
as a step has no room for the whole of a prompt, or a model with recurrent layers saves its state within one.
"""

import functools
from typing import Any

import numpy as np


@functools.cache
def keep_seeds_of_split_prompts() -> None:
    """Have tokens that will be dropped be drawn from the common generator, not from the request's own."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample_tokens: Any = CPUModelRunner.sample_tokens

    @functools.wraps(sample_tokens)
    def sample_with_whole_prompts(runner: Any, *arguments: Any, **options: Any) -> Any:
        batch = runner.input_batch
        incomplete = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        set_aside = {place: batch.generators.pop(place) for place in incomplete if place in batch.generators}
        try:
            return sample_tokens(runner, *arguments, **options)
        finally:
            batch.generators.update(set_aside)

    CPUModelRunner.sample_tokens = sample_with_whole_prompts  # type: ignore[assignment,method-assign]
