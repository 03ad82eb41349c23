"""Test DPO and its relatives: learning, micro-batches, references and their cache, refusals and the command line."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlqwen import DPOConfig, DPOTrainer
from rlqwen.algorithms.losses.preference import PreferenceLoss
from rlqwen.cli import main
from rlqwen.config import QuantizationSettings, Recipe
from rlqwen.config.dpo import LossName
from rlqwen.errors import ConfigError, DataError, ModelError
from rlqwen.models.quantization import bitsandbytes_config
from rlqwen.models.reference_cache import CACHE_VARIABLE, digest_weights
from rlqwen.packing.batch import pack
from rlqwen.reporting.curves import choose_panels
from rlqwen.reporting.sinks import read_metrics
from tests.narrowing import instance_of, present

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def pairs(count: int = 12) -> list[dict[str, list[dict[str, Any]]]]:
    """Return pairs with prompts of many lengths; good answers end in b, bad ones in a."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{i}{'x' * (i % 5)}"}],
            "chosen": [{"role": "assistant", "content": f"{i}b" * (1 + i % 2)}],
            "rejected": [{"role": "assistant", "content": f"{i}a" * (1 + i % 3)}],
        }
        for i in range(count)
    ]


def labeled(count: int = 12) -> list[dict[str, bool | str]]:
    return [
        {"prompt": f"say {i}:", "completion": " yes" if i % 3 else " no", "label": bool(i % 3)} for i in range(count)
    ]


def make_trainer(
    model: Path | PreTrainedModel | PeftModel,
    folder: Path,
    *,
    train: list[dict[str, Any]] | None = None,
    eval_dataset: Any | None = None,
    ref_model: PreTrainedModel | None = None,
    peft_config: LoraConfig | None = None,
    **options: Any,
) -> DPOTrainer:
    defaults = {"output_dir": str(folder), "per_device_train_batch_size": 6, "max_steps": 2, "save_strategy": "no"}
    return DPOTrainer(
        str(model) if not isinstance(model, torch.nn.Module) else model,
        ref_model=ref_model,
        args=DPOConfig(**defaults | options),
        train_dataset=pairs() if train is None else train,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_run_learns_to_rank_held_out_pairs_and_completes_its_folder(
    tiny_model_path: Path, tmp_path: Path, peft_config: Any
) -> None:
    rate = 1e-3 if peft_config is None else 2e-2
    trainer = make_trainer(
        tiny_model_path,
        tmp_path / "run",
        train=pairs(24),
        eval_dataset=pairs(30)[24:],
        peft_config=peft_config,
        learning_rate=rate,
        max_steps=12,
        beta=0.5,
        eval_on_start=True,
    )
    trainer.train()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["initial_eval"], summary["final_eval"]
    assert before["eval/rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert after["eval/rewards/margins"] > 0.2
    assert after["eval/rewards/accuracies"] == 1
    assert after["eval/loss"] < before["eval/loss"]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2])
    wanted = {"loss", "logps/chosen", "logps/rejected", "grad_norm", "tokens/trained", "time/step"}
    assert wanted | {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")} <= line.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


@pytest.fixture(scope="module")
def moved_trainer(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Build a trainer whose policy differs from its reference; its `step` keeps the gradients and makes no update."""
    trainer = make_trainer(tiny_model_path, tmp_path_factory.mktemp("moved"), loss_type=["sigmoid", "kto"])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    patch = pytest.MonkeyPatch()
    patch.setattr(trainer, "optimizer", SimpleNamespace(backward=lambda loss: loss.backward()), raising=False)
    patch.setattr(trainer, "update", lambda micro_batches: None)
    return trainer


def gradients(trainer: Any, **options: Any) -> tuple[dict[str, float], list[Tensor | Any]]:
    """Return the metrics and gradients of one step on six pairs."""
    trainer.args = DPOConfig(**options)
    trainer.loss = PreferenceLoss(trainer.args)
    trainer.model.zero_grad()
    metrics = trainer.step(trainer.train_rows[:6])
    return metrics, [parameter.grad.clone() for parameter in trainer.model.parameters()]


LOSSES = [
    *({"loss_type": name} | ({"label_smoothing": 0.01} if name == "exo_pair" else {}) for name in get_args(LossName)),
    {"loss_type": "sigmoid", "use_weighting": True},
    {"loss_type": ["aot", "sft"], "ld_alpha": 0.3},
]


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(map(str, options.values())))
def test_micro_batches_change_only_rounding(moved_trainer: Any, options: Any) -> None:
    whole, whole_grads = gradients(moved_trainer, per_device_train_batch_size=6, **options)
    assert whole["loss"] != 0
    scale = max(1.0, *(grad.abs().max().item() for grad in whole_grads))
    for split in ({"per_device_train_batch_size": 2}, {"max_tokens_per_micro_batch": 20}):
        parts, grads = gradients(moved_trainer, **split, **options)
        for key in whole.keys() - {"time/train"}:
            assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-5), key
        for ours, theirs in zip(grads, whole_grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-6 * scale, rtol=1e-3)


def test_a_packed_pair_has_the_logprobs_of_two_separate_sequences(moved_trainer: Any) -> None:
    model = moved_trainer.model
    moved_trainer.args = DPOConfig()
    row = moved_trainer.train_rows[7].answers
    device = moved_trainer.policy.device
    answers = moved_trainer._answers(pack([row]).to(device))
    model.set_attn_implementation("sdpa")
    try:
        for index, branch in enumerate(row.branches):
            ids = torch.tensor([row.prefix + branch.token_ids], device=device)
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            wanted = logp[len(row.prefix) - 1 :][torch.tensor(branch.loss_mask, device=device)].sum()
            torch.testing.assert_close(answers.logp_S[index], wanted, atol=1e-4, rtol=1e-5)
    finally:
        model.set_attn_implementation("rlqwen_packed")


def test_wpo_weights_use_the_whole_distribution(moved_trainer: Any) -> None:
    """Compute the sum of p^2 from all logits (WPO weights a token by p(token) / sum of p^2)."""
    policy = moved_trainer.policy
    batch = pack([moved_trainer.train_rows[3].answers]).to(policy.device)
    logp_N, log_sum_sq_probs_N = policy.logprobs_and_log_sum_sq_probs(batch)
    logits = policy._hidden(policy.base_model, batch) @ policy.base_model.get_output_embeddings().weight.T
    probs = logits.softmax(-1)
    torch.testing.assert_close(log_sum_sq_probs_N, probs.square().sum(-1).log(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logp_N, policy.logprobs(batch)[0])
    assert not log_sum_sq_probs_N.requires_grad


def references(trainer: Any) -> Any:
    """Move the policy away from the reference, and return the reference's log-probability of every answer."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.policy.trained_parameters:
            parameter += 0.1 * torch.randn_like(parameter)
        answers = trainer._answers(pack([row.answers for row in trainer.train_rows]).to(trainer.policy.device))
    assert (
        answers.logp_S - answers.ref_logp_S
    ).abs().mean() > 0.1  # about 1 for most seeds; single answers can be near 0
    return answers.ref_logp_S


def test_all_kinds_of_reference_agree(tiny_model_path: Path, tmp_path: Path, cache: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    kinds: dict[str, dict[str, Any]] = {
        "copy": {},
        "path": {"ref_model": str(tiny_model_path)},
        "model": {"ref_model": model},
        "adapter off": {"peft_config": LORA},
        "precomputed": {"precompute_ref_log_probs": True},
        "precomputed from a model": {"precompute_ref_log_probs": True, "ref_model": model},
        "precomputed, adapter off": {"precompute_ref_log_probs": True, "peft_config": LORA},
    }
    found = {}
    for name, options in kinds.items():
        trainer = make_trainer(tiny_model_path, tmp_path / name, **options)
        found[name] = references(trainer)
        if name.startswith("precomputed"):
            assert trainer.policy.has_reference is (name == "precomputed, adapter off")
    for name, ref_logp_S in found.items():
        torch.testing.assert_close(ref_logp_S, found["copy"], atol=1e-4, rtol=1e-5, msg=name)
    # All have the same weights and rows, so the others read the cache entry of the first.
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_the_reference_of_a_model_with_a_trained_adapter_is_that_model(tiny_model_path: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_path), LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    start = make_trainer(model, tmp_path / "run")
    with torch.no_grad():
        answers = start._answers(pack([row.answers for row in start.train_rows]).to(start.policy.device))
    torch.testing.assert_close(answers.logp_S, answers.ref_logp_S, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(references(start), answers.ref_logp_S)


@pytest.mark.parametrize("bits", [4, 8])
def test_references_of_quantized_weights(tiny_model_path: Path, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional extra")
    quantized = {"quantization_config": bitsandbytes_config(QuantizationSettings(bits=bits, compute_dtype="float32"))}
    off = make_trainer(
        tiny_model_path, tmp_path / "off", model_init_kwargs=quantized, peft_config=LORA, precompute_ref_log_probs=True
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_path, **quantized), LORA)
    new = make_trainer(model, tmp_path / "new")
    torch.testing.assert_close(references(off), references(new), atol=1e-4, rtol=1e-5)
    moved = make_trainer(instance_of(PeftModel, new.model), tmp_path / "moved")  # its adapter is no longer zero
    with torch.no_grad():
        answers = moved._answers(pack([row.answers for row in moved.train_rows]).to(moved.policy.device))
    torch.testing.assert_close(answers.logp_S, answers.ref_logp_S, atol=1e-4, rtol=1e-5)


def notes(trainer: Any) -> str:
    return "\n".join(trainer.logger.pending_notes)


def test_cached_reference_logprobs_serve_only_equal_runs(tiny_model_path: Path, tmp_path: Path, cache: Path) -> None:
    def run(name: str, model: Path | PreTrainedModel = tiny_model_path, **options: Any) -> Any:
        return make_trainer(model, tmp_path / name, precompute_ref_log_probs=True, eval_dataset=pairs(3), **options)

    first = run("first")
    assert notes(first).count("computing them") == 2
    again = run("again", per_device_train_batch_size=3)
    assert notes(again).count("read from") == 2
    torch.testing.assert_close(references(again), references(first), atol=0, rtol=0)
    for name, options in (
        ("other rows", {"train": pairs(11)}),
        ("other weighting", {"ld_alpha": 0.5}),
        ("other dtype", {"bf16": True}),
    ):
        assert "train: log-probabilities of the reference: none kept" in notes(run(name, **options)), name
    moved = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    with torch.no_grad():
        moved.model.norm.weight[3] += 1e-3
    assert notes(run("other weights", moved)).count("none kept") == 2


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (lambda data, manifest: data.write_bytes(data.read_bytes()[:-4] + b"\0\0\0\0"), "has changed since"),
        (lambda data, manifest: data.write_bytes(b""), "has changed since"),
        (lambda data, manifest: data.unlink(), "cannot be read"),
        (lambda data, manifest: manifest.write_text("{"), "cannot be read"),
        (lambda data, manifest: manifest.write_text(manifest.read_text().replace("float32", "bfloat16")), "belongs to"),
    ],
    ids=["changed", "emptied", "missing", "broken manifest", "stale manifest"],
)
def test_a_damaged_or_stale_cache_entry_is_replaced(
    tiny_model_path: Path, tmp_path: Path, cache: Path, damage: Any, note: str
) -> None:
    first = make_trainer(tiny_model_path, tmp_path / "first", precompute_ref_log_probs=True)
    damage(next(cache.glob("*.safetensors")), next(cache.glob("*.json")))
    second = make_trainer(tiny_model_path, tmp_path / "second", precompute_ref_log_probs=True)
    assert note in notes(second)
    assert "computing them" in notes(second)
    torch.testing.assert_close(references(second), references(first))
    third = make_trainer(tiny_model_path, tmp_path / "third", precompute_ref_log_probs=True)
    assert "read from" in notes(third)


def test_an_unwritable_cache_only_causes_a_note(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    trainer = make_trainer(tiny_model_path, tmp_path / "run", precompute_ref_log_probs=True)
    assert "not kept" in notes(trainer)
    assert references(trainer).isfinite().all()


def test_a_precomputed_reference_trains_like_a_copy_and_is_freed(tiny_model_path: Path, tmp_path: Path) -> None:
    copy = make_trainer(tiny_model_path, tmp_path / "copy", eval_dataset=pairs(4))
    precomputed = make_trainer(
        tiny_model_path, tmp_path / "precomputed", eval_dataset=pairs(4), precompute_ref_log_probs=True
    )
    copy.train()
    precomputed.train()
    for ours, theirs in zip(precomputed.model.parameters(), copy.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    with pytest.raises(ConfigError, match="has freed the reference"):
        precomputed.evaluate(pairs(20)[15:])
    assert precomputed.evaluate(pairs(4))["eval/loss"] == pytest.approx(copy.evaluate()["eval/loss"], rel=1e-4)


def test_another_model_as_reference_is_not_confused_with_the_initial_policy(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    with torch.no_grad():
        other.model.norm.weight *= 1.1
    held = make_trainer(tiny_model_path, tmp_path / "held", ref_model=other)
    freed = make_trainer(
        tiny_model_path, tmp_path / "freed", ref_model=other, eval_dataset=pairs(3), precompute_ref_log_probs=True
    )
    assert abs(held.evaluate(pairs(3))["eval/rewards/chosen"]) > 1e-3
    assert freed.evaluate()["eval/loss"] == pytest.approx(held.evaluate(pairs(3))["eval/loss"], rel=1e-5)
    with pytest.raises(ConfigError, match="has freed the reference"):
        freed.evaluate(pairs(20)[15:])


def test_losses_without_a_reference_load_none(tiny_model_path: Path, tmp_path: Path) -> None:
    for name in ("simpo", "cpo", "orpo", "sft"):
        assert not make_trainer(tiny_model_path, tmp_path / name, loss_type=name).policy.has_reference
    assert not make_trainer(tiny_model_path, tmp_path / "free", reference_free=True).policy.has_reference


def test_kto_learns_from_labeled_answers_and_warns_of_imbalance(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_model_path, tmp_path / "run", train=labeled(), eval_dataset=labeled(6), loss_type="kto",
        learning_rate=1e-3, max_steps=8, eval_on_start=True,
    )  # fmt: skip
    assert any("8 good and 4 bad" in warning for warning in trainer.reports["train"].warnings)
    assert all(present(row.kl_answers).prefix == row.answers.prefix for row in trainer.train_rows)
    trainer.train()
    first, last = ([e for e in trainer.state.log_history if "eval/loss" in e][place] for place in (0, -1))
    assert last["eval/loss"] < first["eval/loss"]
    assert last["eval/rewards/margins"] > 0.1
    assert trainer.state.log_history[1]["kl"] >= 0


def test_kl_answers_belong_to_another_prompt(tiny_model_path: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a:", "completion": f" {i}", "label": True} for i in range(3)]
    rows += [{"prompt": "b:", "completion": " 9", "label": False}]
    trainer = make_trainer(tiny_model_path, tmp_path / "run", train=rows, loss_type="kto")
    answers = [row.answers.branches[0].token_ids for row in trainer.train_rows]
    found = [present(row.kl_answers).branches[0].token_ids for row in trainer.train_rows]
    assert found == [answers[3], answers[3], answers[3], answers[2]]
    with pytest.raises(DataError, match="all rows have the same prompt"):
        make_trainer(tiny_model_path, tmp_path / "one", train=rows[:3], loss_type="kto")


def test_sync_ref_model_updates_the_reference(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_model_path, tmp_path / "run", learning_rate=1e-3, sync_ref_model=True, ref_model_sync_steps=2,
        ref_model_mixup_alpha=1.0, max_steps=3,
    )  # fmt: skip
    start = digest_weights(trainer.policy.reference_weights())
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[1] > 1e-3
    assert margins[2] == pytest.approx(0, abs=1e-4)
    assert digest_weights(trainer.policy.reference_weights()) != start


def test_labeled_answers_are_refused_by_losses_of_pairs(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0 is a single answer with a label, but loss_type sigmoid"):
        make_trainer(tiny_model_path, tmp_path / "run", train=labeled())


def test_unsuitable_references_are_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    with pytest.raises(ModelError, match="are one object"):
        make_trainer(model, tmp_path / "same", ref_model=model)
    with pytest.raises(ConfigError, match="uses no reference"):
        make_trainer(tiny_model_path, tmp_path / "simpo", loss_type="simpo", ref_model=model)
    with pytest.raises(ConfigError, match="given twice"):
        DPOTrainer(str(tiny_model_path), model, DPOConfig(output_dir=str(tmp_path / "two"), ref_model="other"), pairs())
    with pytest.raises(ConfigError, match="sync_ref_model mixes whole weights"):
        make_trainer(tiny_model_path, tmp_path / "sync", peft_config=LORA, sync_ref_model=True)
    model.config.vocab_size += 1
    with pytest.raises(ModelError, match="they must agree"):
        make_trainer(tiny_model_path, tmp_path / "vocabulary", ref_model=model)


RECIPE = """\
algorithm: dpo
model: {{path: {model}}}
data: {{train: {{path: pairs.jsonl}}, eval: {{path: pairs.jsonl, limit: 4}}}}
train:
  loss_type: [sigmoid, sft]
  loss_weights: [1.0, 0.1]
  per_device_train_batch_size: 4
  max_steps: 2
  learning_rate: 1e-3
  eval_strategy: steps
  save_strategy: no
  precompute_ref_log_probs: true
output_dir: runs/dpo
"""


@pytest.fixture
def recipe(tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make a working directory with dpo.yaml and its pairs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    handler = signal.getsignal(signal.SIGTERM)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    Path("dpo.yaml").write_text(RECIPE.format(model=tiny_model_path))
    yield
    signal.signal(signal.SIGTERM, handler)


def test_a_recipe_runs_from_the_command_line(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "dpo.yaml"]) == 0
    assert "4 pairs per update" in capsys.readouterr().out
    assert main(["run", "dpo.yaml"]) == 0
    folder = Path("runs/dpo")
    metrics = json.loads((folder / "summary.json").read_text())["final_eval"]
    assert metrics["eval/loss/sigmoid"] + 0.1 * metrics["eval/loss/sft"] == pytest.approx(metrics["eval/loss"])
    assert (folder / "curves.png").stat().st_size > 0
    assert "margin" in capsys.readouterr().out
    assert [panel.title for panel in choose_panels(read_metrics(folder))] == ["loss", "accuracy", "margin"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.loss_type=dpo", "train.loss_type: unknown loss 'dpo'; did you mean 'ipo'"),
        ("train.loss_weights=[1]", "loss_weights has 1 values for 2 losses (sigmoid, sft)"),
        ("train.loss_type=[exo_pair, sft]", "exo_pair needs label_smoothing above 0"),
        ("train.f_divergence_type=forwardkl", "train.f_divergence_type: input should be 'reverse_kl'"),
        ("train.ref_model=missing/model/folder", "train.ref_model 'missing/model/folder': there is no such folder"),
        ("train.padding_free=true", "every batch is packed without padding already"),
        ("rewards=[accuracy]", "takes no rewards"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_reason(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["run", "dpo.yaml", override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
