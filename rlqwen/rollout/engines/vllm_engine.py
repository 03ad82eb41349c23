"""Sample with vLLM, in the only module that calls it: requests in, completions out, weights replaced in place."""

import json
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
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from rlqwen.errors import RolloutError
from rlqwen.rollout.engine_placement import ALONE, SHARED
from rlqwen.rollout.engines import vllm_object_store as object_store
from rlqwen.rollout.engines import vllm_qwen3_5 as qwen3_5_classes
from rlqwen.rollout.engines.vllm_cpu_seeds import keep_seeds_of_split_prompts
from rlqwen.rollout.engines.vllm_expert_record import ExpertRecord
from rlqwen.rollout.engines.vllm_object_store import update_of
from rlqwen.rollout.engines.vllm_served_model import is_qwen3_5, text_view
from rlqwen.rollout.engines.vllm_sleep import SleepCycle, reset_prefix_cache
from rlqwen.rollout.weight_sync import LoadReport, WeightBundle
from rlqwen.rollout.worker_protocol import EngineSettings, Sampled
from rlqwen.types import Canary, Sampling

# vLLM's CPU kernels take multiples of 32; its default of 128 would share no prefix of a short prompt.
CPU_BLOCK_SIZE = 32
_CANARY_ID = "canary"
_ADAPTER_FILE = "adapter_model.safetensors"
_MARGIN_BYTES, _SMALLEST_SHARE = 1024**3, 0.05
"""What the trainer may take besides the optimizer's state, and the smallest share of a GPU that an engine starts with."""
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM's kernels are laid out for."""


class VllmEngine:
    """An LLMEngine in this process; not thread-safe."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._start_engine(settings.model_path)
        self._must_rebuild = False
        """Set once the weights were wrong after a reload in place and right after a rebuild."""
        self._is_updating = False
        """Whether a weight transfer has started and not finished."""
        self._adapter: LoRARequest | None = None
        """What every request is drawn with."""
        self._prompts: dict[str, list[int]] = {}
        """Of the requests in flight, where experts are recorded."""

    def _start_engine(self, model_path: str) -> None:
        self._llm = _build(self._settings, model_path)
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
        self._llm.add_request(request_id, {"prompt_token_ids": token_ids}, params, lora_request=self._adapter)
        if self._settings.returns_experts:
            self._prompts[request_id] = token_ids

    def step(self) -> Iterator[tuple[str, Sampled]]:
        """Decode one token of every running request; yields those that finished."""
        for output in self._llm.step():
            if output.finished:
                completion: Any = output.outputs[0]  # type: ignore[index]  # nothing is pooled here
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
        self._prompts.clear()
        if self._record is not None:
            self._record.forget_requests()

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
            self._replace_adapter(bundle.tensors(), bundle.version)
            return LoadReport(bundle.version, self._canary_gap(bundle.canary), False, time.monotonic() - started)
        rebuilt = self._must_rebuild and bundle.is_stored
        if not rebuilt:
            self._reload(bundle)
            gap = self._canary_gap(bundle.canary)
            rebuilt = bundle.is_stored and not bundle.accepts(gap)
        if rebuilt:
            self._rebuild(bundle.tensors())
            gap = self._canary_gap(bundle.canary)
            self._must_rebuild = bundle.accepts(gap)
        return LoadReport(bundle.version, gap, rebuilt, time.monotonic() - started)

    def _replace_adapter(self, weights: dict[str, torch.Tensor], version: int) -> None:
        """Load an adapter under a name and id of its own, for vLLM's caches go by these; the one before is removed."""
        self._sleep_cycle.wake()
        if self._adapter is not None:
            self._llm.remove_lora(self._adapter.lora_int_id)
        # The scaling is folded into the weights.
        rank = self._settings.lora_rank
        modules = sorted({name.rsplit(".", 3)[1] for name in weights})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
        number = self._adapter.lora_int_id + 1 if self._adapter else 1
        with tempfile.TemporaryDirectory(prefix="rlqwen-adapter-") as folder:
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
            save_file({name: tensor.clone() for name, tensor in weights.items()}, Path(folder) / _ADAPTER_FILE)
            self._adapter = LoRARequest(f"version-{version}-{number}", number, folder)
            self._llm.add_lora(self._adapter)
        reset_prefix_cache(self._llm)

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
        reset_prefix_cache(self._llm)

    def _rebuild(self, weights: dict[str, torch.Tensor]) -> None:
        with tempfile.TemporaryDirectory(prefix="rlqwen-weights-") as folder:
            for file in Path(self._settings.model_path).glob("*"):
                if file.is_file() and file.suffix not in {".safetensors", ".bin"} and "index" not in file.name:
                    shutil.copy(file, folder)
            save_file({name: tensor.clone() for name, tensor in weights.items()}, Path(folder) / "model.safetensors")
            del self._llm, self._sleep_cycle
            cleanup_dist_env_and_memory()
            self._start_engine(folder)

    def _canary_gap(self, canary: Canary | None) -> float | None:
        """Return the mean absolute difference of this engine's and the trainer's logprobs of the canary; NaN if any is."""
        if canary is None or len(canary.token_ids) < 2:
            return None
        params = SamplingParams(
            max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt: Any = {"prompt_token_ids": list(canary.token_ids)}
        self._llm.add_request(_CANARY_ID, prompt, params, lora_request=self._adapter)
        prompt_logprobs: Any = None
        while self._llm.has_unfinished_requests():
            for output in self._llm.step():
                prompt_logprobs = output.prompt_logprobs  # type: ignore[union-attr]
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
        rank = next(rank for rank in _LORA_RANKS if rank >= settings.lora_rank)
        more |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    if settings.sleep_level and not on_cpu:
        more["enable_sleep_mode"] = True
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
        max_num_seqs=settings.max_num_seqs,
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
