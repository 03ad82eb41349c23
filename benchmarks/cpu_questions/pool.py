"""Compare rlqwen's pool of one worker with vLLM alone on the same requests.

Bare vLLM is its `LLM` class in a process of its own, with the arguments, environment and threads of rlqwen's worker, and
without detokenizing, although the pool returns texts. Both sample the same prompts with the same seeds; vLLM 0.32 crashes on
a CPU if a prompt with a seed is split, so bare vLLM gets rlqwen's workaround.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import GenerationConfig

from cpu_questions.grpo import Workload
from cpu_questions.measuring import Answer, Sizes, progress
from rlqwen.config import RolloutConfig
from rlqwen.rollout import build_engine
from rlqwen.types import GroupRequest, Prompt, Sampling

GROUPS, GROUP = 16, 8
KV_CACHE_GIB = 1
MAX_NUM_SEQS = 128

Request = tuple[list[int], list[int]]
"""Prompt and seeds of a group."""


def answer(sizes: Sizes, folder: Path) -> Iterator[Answer]:
    """Yield the answer."""
    workload = Workload("skewed", sizes, folder)
    config = RolloutConfig(engine="vllm", kv_cache_gib=KV_CACHE_GIB, max_num_seqs=MAX_NUM_SEQS)
    stops: Any = GenerationConfig.from_pretrained(workload.model).eos_token_id
    ends = tuple(stops)
    sampling = Sampling(max_tokens=workload.limit, stop_token_ids=ends)
    pool: Any = build_engine(
        config, model_path=str(workload.model), tokenizer=workload.tokenizer, compute_dtype="float32",
        max_model_length=workload.longest + 1, seed=0,
    )  # fmt: skip
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=bare, args=(there, str(workload.model), workload.longest + 1, ends, workload.limit))
    with mock.patch.dict(os.environ, _environment(pool._settings.num_threads)):
        child.start()
    there.close()  # so that waiting for a child that has died raises EOFError
    try:
        pool.wait_until_ready()
        shares, same = [], []
        for round_ in range(sizes.rounds + 1):
            groups = 2 if sizes.tiny else GROUPS
            texts = [workload.rows[place % len(workload.rows)]["prompt"] for place in range(groups)]
            prompts = [Prompt(place, workload.tokenizer(text).input_ids, text) for place, text in enumerate(texts)]
            seeds = [[1_000 * round_ + 10 * place + sample for sample in range(GROUP)] for place in range(groups)]
            requests = [GroupRequest(prompt, tuple(own), sampling) for prompt, own in zip(prompts, seeds, strict=True)]
            started = time.perf_counter()
            drawn = {group.prompt.index: group for group in pool.generate(requests)}
            ours = time.perf_counter() - started
            here.send([(prompt.token_ids, own) for prompt, own in zip(prompts, seeds, strict=True)])
            theirs, tokens = here.recv()
            own_tokens = [one.token_ids for place in range(groups) for one in drawn[place].completions]
            same.append(sum(a == b for a, b in zip(own_tokens, tokens, strict=True)) / len(tokens))
            # Completions that differ in length are different work: compare tokens per second.
            share = (sum(map(len, own_tokens)) / ours) / (sum(map(len, tokens)) / theirs)
            progress(f"pool {ours:.2f} s, bare vLLM {theirs:.2f} s, {same[-1]:.1%} of the completions equal")
            if round_:
                shares.append(share)
    finally:
        here.close()
        child.join(timeout=30)
        pool.close()
    yield Answer(
        "pool: tokens/s over those of bare vLLM on the same requests", shares, 0.95,
        note=f"{groups} groups of {GROUP}; {min(same):.1%} of the completions equal",
    )  # fmt: skip


def _environment(num_threads: int) -> dict[str, str]:
    """Return the environment of rlqwen's worker, which torch and vLLM read when they are imported."""
    return {
        "OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip


def bare(pipe: Any, model: str, length: int, ends: tuple[int, ...], limit: int) -> None:
    """Serve requests by vLLM alone until the pipe is closed: answer each list of groups with seconds and token ids."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from rlqwen.rollout.engines.vllm_cpu_seeds import keep_seeds_of_split_prompts

    llm = LLM(
        model, dtype="float32", max_model_len=length, max_num_seqs=MAX_NUM_SEQS, block_size=32, enforce_eager=True,
        logprobs_mode="processed_logprobs", skip_tokenizer_init=True, generation_config="vllm", seed=0,
        enable_prefix_caching=True, disable_log_stats=True,
    )  # fmt: skip
    keep_seeds_of_split_prompts()
    while True:
        try:
            groups = pipe.recv()
        except EOFError:
            return
        requests: list[tuple[list[int], int]] = [(ids, seed) for ids, seeds in groups for seed in seeds]
        prompts: Any = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [
            SamplingParams(
                seed=seed,
                max_tokens=limit,
                stop_token_ids=list(ends),
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for _, seed in requests
        ]
        llm.reset_prefix_cache()  # as the worker does before a rollout
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        pipe.send((seconds, [list(output.outputs[0].token_ids) for output in outputs]))
