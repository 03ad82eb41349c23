"""Sample with vLLM, in the only module that calls it: requests in, completions out, weights replaced in place."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from rlqwen.errors import RolloutError
from rlqwen.rollout.engine_placement import ALONE, SHARED
from rlqwen.rollout.engines import vllm_object_store as object_store
from rlqwen.rollout.engines import vllm_qwen3_5 as qwen3_5_classes
from rlqwen.rollout.engines.vllm_adapter import LORA_RANKS, ServedAdapter
from rlqwen.rollout.engines.vllm_cpu_seeds import keep_seeds_of_split_prompts
from rlqwen.rollout.engines.vllm_expert_record import ExpertRecord
from rlqwen.rollout.engines.vllm_in_flight import SPARE_PLACES, KeptRequests
from rlqwen.rollout.engines.vllm_object_store import update_of
from rlqwen.rollout.engines.vllm_served_model import is_qwen3_5, text_view
from rlqwen.rollout.engines.vllm_sleep import SleepCycle, reset_prefix_cache
from rlqwen.rollout.weight_sync import LoadReport, WeightBundle
from rlqwen.rollout.worker_protocol import EngineSettings, Sampled, WeightVersions
from rlqwen.types import Canary, Sampling

# vLLM's CPU kernels take multiples of 32; its default of 128 would share no prefix of a short prompt.
CPU_BLOCK_SIZE = 32
_CANARY_ID = "canary"
_MARGIN_BYTES, _SMALLEST_SHARE = 1024**3, 0.05
"""What the trainer may take besides the optimizer's state, and the smallest share of a GPU that an engine starts with."""


class VllmEngine:
    """An LLMEngine in this process; not thread-safe."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._start_engine(settings.model_path, version=0)
        self._must_rebuild = False
        """Set once the weights were wrong after a reload in place and right after a rebuild."""
        self._is_updating = False
        """Whether a weight transfer has started and not finished."""
        self._adapter = ServedAdapter(settings.lora_rank or 0)
        self._prompts: dict[str, list[int]] = {}
        """Of the requests in flight, where experts are recorded."""

    def _start_engine(self, model_path: str, version: int) -> None:
        self._llm = _build(self._settings, model_path)
        self._kept: KeptRequests | None = None
        """The requests, if weights are replaced while some are in flight."""
        if self._settings.updates_in_flight:
            self._kept = KeptRequests(self._llm, num_places=self._settings.max_num_seqs, version=version)
        self._sleep_cycle = SleepCycle(self._llm, self._settings.sleep_level)
        self._record = self._record_experts()

    def _record_experts(self) -> ExpertRecord | None:
        """Return the record of experts for a new engine on a CPU; elsewhere vLLM keeps its own."""
        if not self._settings.returns_experts or not current_platform.is_cpu():
            return None
        if self._settings.tensor_parallel_size > 1:
            raise RolloutError(
                "rollout.routing_replay: vLLM on CPU tells experts of engines of one process alone: set "
                "rollout.tensor_parallel_size to 1"
            )
        (record,) = self._llm.collective_rpc(_record_on)
        return record

    def _experts(self, request_id: str, completion: Any) -> np.ndarray | None:
        """Return the (prompt + sampled - 1, L, K) experts of a finished request, if they were asked for."""
        if not self._settings.returns_experts:
            return None
        prompt = self._prompts.pop(request_id)
        if self._record is not None:
            return self._record.take(request_id, prompt, len(completion.token_ids))
        return completion.routed_experts  # type: ignore[no-any-return]

    def add(self, request_id: str, token_ids: list[int], seed: int, sampling: Sampling) -> None:
        """Queue one completion. Each is a request of its own, so that its seed alone decides it; the prefix cache
        shares the prompt."""
        params = SamplingParams(
            seed=seed,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            min_tokens=sampling.min_tokens,
            bad_words=list(sampling.bad_words),
            logit_bias=dict(sampling.logit_bias) or None,
            allowed_token_ids=list(sampling.allowed_token_ids) or None,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        if self._kept is None:
            self._llm.add_request(
                request_id, {"prompt_token_ids": token_ids}, params, lora_request=self._adapter.request
            )
        else:
            self._kept.add(request_id, token_ids, params)
        if self._settings.returns_experts:
            self._prompts[request_id] = token_ids

    def step(self) -> Iterator[tuple[str, Sampled]]:
        """Decode one token of every running request; yields those that finished."""
        outputs: list[Any] = self._llm.step() if self._kept is None else self._kept.step()
        for output in outputs:
            if output.finished:
                completion = output.outputs[0]
                # With logprobs=0 the flat list holds the sampled token's logprob alone, one a position.
                experts = self._experts(output.request_id, completion)
                yield (
                    output.request_id,
                    (list(completion.token_ids), completion.logprobs.logprobs, _reason(completion), experts),
                )

    def forget_prompts(self) -> None:
        """Empty the prefix cache, which a draw that is to repeat to the bit must not find filled."""
        reset_prefix_cache(self._llm)
        if self._record is not None:
            self._record.forget_prompts()

    def abort(self, request_ids: list[str]) -> None:
        if request_ids:
            self._llm.abort_request(request_ids)
        while self._llm.has_unfinished_requests():
            self._llm.step()
        if self._kept is not None:
            self._kept.forget()
        self._prompts.clear()
        if self._record is not None:
            self._record.forget_requests()

    def hold(self) -> None:
        assert self._kept is not None
        self._kept.hold()

    def take_versions(self, request_id: str) -> WeightVersions:
        assert self._kept is not None
        return self._kept.take_versions(request_id)

    def load(self, bundle: WeightBundle) -> LoadReport:
        """Replace the weights; where the canary disagrees with that, build the engine anew from the same weights.

        Weights that came by `transfer` are in place already, and are only checked: there is no copy to build from. An engine
        that was caught once with other weights than it was sent is always rebuilt.
        """
        started = time.monotonic()
        if self._record is not None:
            self._record.forget_requests()  # the last canary among them
            self._record.forget_prompts()
        if self._settings.lora_rank is not None:
            self._sleep_cycle.wake()
            self._adapter.replace(self._llm, bundle.tensors(), bundle.version)
            self._forget_prefixes()
            return LoadReport(bundle.version, self._check(bundle), False, time.monotonic() - started)
        rebuilt = self._must_rebuild and bundle.is_stored
        if not rebuilt:
            self._reload(bundle)
            gap = self._check(bundle)
            rebuilt = bundle.is_stored and not bundle.accepts(gap)
        if rebuilt:
            self._rebuild(bundle)
            gap = self._check(bundle)
            self._must_rebuild = bundle.accepts(gap)
        return LoadReport(bundle.version, gap, rebuilt, time.monotonic() - started)

    def _forget_prefixes(self) -> None:
        """Have no request that begins from now on find what older weights computed."""
        if self._kept is None:  # else its salt sees to that, while running requests keep their blocks
            reset_prefix_cache(self._llm)

    def _check(self, bundle: WeightBundle) -> float | None:
        """Begin to sample from the weights of `bundle`, which are loaded, and return the canary's gap."""
        if self._kept is not None:
            self._kept.go_on(bundle.version)
        return self._canary_gap(bundle.canary)

    def sleep(self) -> None:
        self._sleep_cycle.sleep()

    def transfer(self, phase: str, **arguments: Any) -> None:
        """Run a phase of vLLM's weight-transfer protocol, a method of its worker, in every process of this engine."""
        self._sleep_cycle.wake_weights()
        if self._is_updating and phase not in ("update_weights", "finish_weight_update"):
            self._llm.collective_rpc("finish_weight_update")  # the trainer gave the last update up
        self._is_updating = False  # vLLM ends the update at an error too
        self._llm.collective_rpc(phase, kwargs=arguments)
        self._is_updating = phase in ("start_weight_update", "update_weights")

    def _reload(self, bundle: WeightBundle) -> None:
        if bundle.is_stored:
            self.transfer("start_weight_update")
            for bucket in bundle.buckets():
                self.transfer("update_weights", **update_of(bucket))
            self.transfer("finish_weight_update")
        self._sleep_cycle.wake()
        self._forget_prefixes()

    def _rebuild(self, bundle: WeightBundle) -> None:
        """Build the engine anew, without requests."""
        with tempfile.TemporaryDirectory(prefix="rlqwen-weights-") as folder:
            for file in Path(self._settings.model_path).glob("*"):
                if file.is_file() and file.suffix not in {".safetensors", ".bin"} and "index" not in file.name:
                    shutil.copy(file, folder)
            save_file(
                {name: tensor.clone() for name, tensor in bundle.tensors().items()}, Path(folder) / "model.safetensors"
            )
            del self._llm, self._sleep_cycle, self._kept
            cleanup_dist_env_and_memory()
            self._start_engine(folder, bundle.version)

    def _canary_gap(self, canary: Canary | None) -> float | None:
        """Return the mean absolute difference of this engine's and the trainer's logprobs of the canary; NaN if any is."""
        if canary is None or len(canary.token_ids) < 2:
            return None
        params = SamplingParams(
            max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        token_ids = list(canary.token_ids)
        if self._kept is None:
            self._llm.add_request(
                _CANARY_ID, {"prompt_token_ids": token_ids}, params, lora_request=self._adapter.request
            )
        else:
            self._kept.add_first(_CANARY_ID, token_ids, params)
        prompt_logprobs: Any = None
        while prompt_logprobs is None:
            outputs: list[Any] = self._llm.step()
            prompt_logprobs = next((one.prompt_logprobs for one in outputs if one.request_id == _CANARY_ID), None)
            if self._kept is not None:
                self._kept.note(outputs)
        ours = [
            position[token].logprob for position, token in zip(prompt_logprobs[1:], canary.token_ids[1:], strict=True)
        ]
        gaps = [abs(mine - theirs) for mine, theirs in zip(ours, canary.logprobs, strict=True)]
        return float(sum(gaps) / len(gaps))


def _build(settings: EngineSettings, model_path: str) -> LLMEngine:
    """Start an engine; what it reads once lies in folders that go away again."""
    with ExitStack() as stack:
        tokenizer_path = None
        if settings.tokenizer_files is not None:
            tokenizer_path = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlqwen-tokenizer-"))
            for name, content in settings.tokenizer_files.items():
                (Path(tokenizer_path) / name).write_bytes(content)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlqwen-text-")))
        return _start(settings, text_view(Path(model_path), scratch / "model"), tokenizer_path)


def _start(settings: EngineSettings, model_path: Path, tokenizer_path: str | None) -> LLMEngine:
    on_cpu = current_platform.is_cpu()
    more: dict[str, Any] = {"block_size": CPU_BLOCK_SIZE} if on_cpu else {}
    if settings.lora_rank is not None:
        rank = next(rank for rank in LORA_RANKS if rank >= settings.lora_rank)
        more |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    if settings.sleep_level and not on_cpu:
        more["enable_sleep_mode"] = True
    if settings.updates_in_flight:
        more["scheduling_policy"] = "priority"
    if settings.returns_experts and not on_cpu:
        more["enable_return_routed_experts"] = True
    if on_cpu:
        keep_seeds_of_split_prompts()
    extension = object_store.WORKER_EXTENSION
    if is_qwen3_5(model_path):
        qwen3_5_classes.register()
        extension = qwen3_5_classes.WORKER_EXTENSION
    if settings.lora_rank is None:
        more["weight_transfer_config"] = WeightTransferConfig(backend=settings.weight_transfer)
    arguments = EngineArgs(
        model=str(model_path),
        load_format="safetensors",  # `auto` falls back to pickle
        tokenizer=tokenizer_path,
        skip_tokenizer_init=tokenizer_path is None,
        generation_config="vllm",
        dtype=settings.dtype,  # type: ignore[arg-type]
        seed=settings.seed,
        max_model_len=settings.max_model_length,
        max_num_seqs=settings.max_num_seqs + SPARE_PLACES * settings.updates_in_flight,
        tensor_parallel_size=settings.tensor_parallel_size,
        # Within a placement group vLLM would start Ray actors of its own, for which the bundle has no room.
        distributed_executor_backend="mp" if settings.tensor_parallel_size > 1 else "uni",
        gpu_memory_utilization=_memory_share(settings),
        enforce_eager=on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        worker_extension_cls=extension,
        **more,
    )
    return LLMEngine.from_engine_args(arguments)


def _memory_share(settings: EngineSettings) -> float:
    """Return the share of the GPU's memory for the engine; where none is given, of what the trainer leaves free."""
    if settings.gpu_memory_utilization is not None:
        return settings.gpu_memory_utilization
    if current_platform.is_cpu():
        return SHARED
    free, total = torch.cuda.mem_get_info()
    share = min(ALONE, (free - settings.reserved_bytes - _MARGIN_BYTES) / total)
    if share < _SMALLEST_SHARE:
        raise RolloutError(
            f"the trainer leaves {free / 1e9:.3g} GB of the GPU's {total / 1e9:.3g} GB free, and will take "
            f"{settings.reserved_bytes / 1e9:.3g} GB more for its optimizer, so that nothing is left for the engine: set "
            "rollout.gpu_memory_utilization, or free memory (model.lora, parallel.zero_stage, rollout.placement=separate)"
        )
    return share


def _record_on(worker: Any) -> ExpertRecord:
    return ExpertRecord(worker, CPU_BLOCK_SIZE)


def _reason(completion: Any) -> Any:
    return "stop" if completion.finish_reason == "stop" else "length"
