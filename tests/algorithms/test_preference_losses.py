"""Test the losses of DPO and its relatives by hand and against TRL's own code."""

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from rlqwen.algorithms.losses.preference import Answers, AnswerTotals, answer_logps, kto_kl, read_answers
from rlqwen.config import DPOConfig
from rlqwen.config.dpo import LossName
from rlqwen.packing.batch import Branch, PackedBatch, Tree, pack
from tests.losses import preference_loss
from tests.narrowing import present

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL's import warns about the version of vLLM
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

LENGTHS = (5, 3, 1, 4, 6, 6, 2, 7)
"""Lengths of the answers of four pairs, each chosen answer before its rejected one."""
PROMPT = 2


def make_batch(
    lengths: tuple[int, int] | tuple[int, int, int] | tuple[int, ...] = LENGTHS,
    *,
    seed: int = 0,
    labels: list[bool] | None = None,
) -> tuple[PackedBatch, Tensor, Tensor, Tensor]:
    """Return pairs, and per token the logprobs of policy and reference and the log of the sum of p^2."""
    generator = torch.Generator().manual_seed(seed)
    if labels is None:
        labels = [True, False] * (len(lengths) // 2)
    branches = [
        Branch([7] * length, per_sequence={"label": label}) for length, label in zip(lengths, labels, strict=True)
    ]
    batch = pack([Tree([1] * PROMPT, branches)])
    logp = -torch.rand(sum(lengths), generator=generator) * 3
    ref = logp + torch.randn(sum(lengths), generator=generator) * 0.5
    log_sum_sq_probs = -torch.rand(sum(lengths), generator=generator) * 2
    return batch, logp.requires_grad_(), ref, log_sum_sq_probs


def our_loss(
    batch: PackedBatch, logp: Tensor, ref: Tensor, log_sum_sq_probs: Any, config: DPOConfig, **options: Any
) -> Any:
    ref_logp_S = answer_logps(ref, batch, config.ld_alpha) if config.needs_reference else None
    answers = read_answers(
        logp,
        batch,
        ref_logp_S=ref_logp_S,
        ld_alpha=config.ld_alpha,
        log_sum_sq_probs_N=log_sum_sq_probs if config.use_weighting else None,
    )
    return preference_loss(answers, config, AnswerTotals.of([batch], paired=True), **options)


def padded(values: Any, batch: PackedBatch) -> tuple[Tensor, Any]:
    """Return (S, longest) values, zero after the end of a sequence, and the mask of tokens."""
    mask = torch.arange(max(LENGTHS)) < batch.lengths_S[:, None]
    return torch.zeros(mask.shape).masked_scatter(mask, values), mask


class FakeModel(torch.nn.Module):
    """Return given logprobs in the layout of TRL's fused head."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor, log_sum_sq_probs: Any = None) -> None:
        super().__init__()
        self.log_probs, self.log_sum_sq_probs = log_probs, log_sum_sq_probs

    def forward(self, **inputs: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs, log_sum_sq_probs=self.log_sum_sq_probs, entropy=zeros, mean_logits=zeros,
            is_top1=zeros.bool(),
        )  # fmt: skip


def trl_inputs(batch: PackedBatch, *rows_of_values: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return TRL's padded batch, with all chosen answers before all rejected ones, and the values in this layout."""
    order = [*range(0, batch.num_sequences, 2), *range(1, batch.num_sequences, 2)]
    before = torch.zeros(batch.num_sequences, PROMPT - 1)
    laid_out = [torch.cat([before, padded(values, batch)[0][order]], dim=1) for values in rows_of_values]
    mask = padded(rows_of_values[0], batch)[1][order]
    completion_mask = torch.cat([torch.zeros(len(order), PROMPT, dtype=torch.long), mask.long()], dim=1)
    ids = torch.zeros_like(completion_mask)
    return {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": completion_mask}, laid_out


ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x
)


def trl_loss(
    batch: PackedBatch, logp: Tensor, ref: Any, log_sum_sq_probs: Any, config: Any
) -> tuple[Any, defaultdict[Any, list[Any]]]:
    """Return (loss, metrics) of TRL's DPOTrainer._compute_loss."""
    inputs, (logps, refs, log_sums) = trl_inputs(batch, logp, ref, log_sum_sq_probs)
    model = FakeModel(logps, log_sums)
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    trainer: Any = SimpleNamespace(
        model=model, accelerator=ACCELERATOR, aux_loss_enabled=False, ld_alpha=config.ld_alpha,
        precompute_ref_logps=False, args=SimpleNamespace(
            gradient_checkpointing_kwargs=None, discopop_tau=config.discopop_tau
        ), ref_model=FakeModel(refs), f_divergence_type=config.f_divergence_type,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef, loss_types=config.loss_type,
        loss_weights=config.loss_weights or [1.0] * len(config.loss_type), beta=config.beta,
        label_smoothing=config.label_smoothing, use_weighting=config.use_weighting, _metrics=metrics,
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    compute_loss: Any = DPOTrainer._compute_loss
    return compute_loss(trainer, model, inputs, False), metrics["train"]


REFERENCE_LOSSES = sorted(set(get_args(LossName)) - {"simpo", "cpo", "orpo", "kto"})
OF_DIFFERENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"]
SMOOTHING = {"exo_pair": {"label_smoothing": 1e-3}}
VARIANTS = [
    *({"loss_type": name, **SMOOTHING.get(name, {})} for name in REFERENCE_LOSSES),
    *({"loss_type": name, "label_smoothing": 0.1} for name in ("robust", "exo_pair", "aot", "aot_unpaired")),
    *({"loss_type": name, "beta": 0.5, "ld_alpha": 0.3, **SMOOTHING.get(name, {})} for name in REFERENCE_LOSSES),
    *(
        {"loss_type": name, "f_divergence_type": divergence, **SMOOTHING.get(name, {})}
        for name in OF_DIFFERENCE
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
    {"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    *(
        {"loss_type": name, "use_weighting": True, **SMOOTHING.get(name, {})}
        for name in REFERENCE_LOSSES
        if name not in ("aot", "aot_unpaired", "sft", "hinge")  # TRL's weighted hinge has no backward pass
    ),
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["aot", "sigmoid_norm"], "ld_alpha": 0.0},
]


def name_of(options: dict[Any, Any]) -> str:
    return "-".join(str(value) for value in options.values())


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_equals_trl(options: Any) -> None:
    config = DPOConfig(**options)
    results: list[tuple[Tensor, Tensor, Mapping[str, Any]]] = []
    for function in (our_loss, trl_loss):
        batch, logp, ref, log_sum_sq_probs = make_batch()
        loss, found = function(batch, logp, ref, log_sum_sq_probs, config)
        loss.backward()
        results.append((loss.detach(), present(logp.grad), found))
    (ours, our_grad, metrics), (theirs, their_grad, their_metrics) = results
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, atol=1e-6, rtol=1e-5)
    if config.loss_type != ["sft"]:  # here TRL uses a reference only for logging
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert metrics[key].item() == pytest.approx(their_metrics[key][0], abs=1e-5)
    for key in ("logps/chosen", "logps/rejected"):
        assert metrics[key].item() == pytest.approx(their_metrics[key][0], rel=1e-5)


def trl_cpo_loss(batch: PackedBatch, logp: Tensor, config: DPOConfig, trl_type: str) -> Any:
    """Return (loss, metrics) of TRL's CPOTrainer.get_batch_loss_metrics."""
    answers = read_answers(logp, batch)
    sums = answers.mean_logp_S if trl_type == "simpo" else answers.logp_S
    nll = -logp[batch.per_sequence["label"][batch.sequence_N]].mean()
    logits = torch.zeros(1)
    trainer: Any = SimpleNamespace(
        accelerator=ACCELERATOR, alpha=0.0, loss_type=trl_type, beta=config.beta,
        simpo_gamma=config.simpo_gamma, label_smoothing=config.label_smoothing, aux_loss_enabled=False,
        cpo_alpha=config.cpo_alpha if "cpo" in config.loss_type else float("sft" in config.loss_type),
        concatenated_forward=lambda *_: (sums[::2], sums[1::2], logits, logits, nll),
    )  # fmt: skip
    trainer.cpo_loss = lambda *logps: CPOTrainer.cpo_loss(trainer, *logps)
    get_batch_loss_metrics: Any = CPOTrainer.get_batch_loss_metrics
    return get_batch_loss_metrics(trainer, None, {})


@pytest.mark.parametrize(
    ("options", "trl_type"),
    [
        ({"loss_type": "simpo", "simpo_gamma": 0.5}, "simpo"),
        ({"loss_type": "simpo", "beta": 2.0, "label_smoothing": 0.1}, "simpo"),
        ({"loss_type": ["simpo", "sft"], "simpo_gamma": 1.0}, "simpo"),
        ({"loss_type": "cpo", "cpo_alpha": 0.0}, "sigmoid"),
        ({"loss_type": "cpo", "cpo_alpha": 1.0, "label_smoothing": 0.2}, "sigmoid"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else value,
)
def test_simpo_and_cpo_equal_trl(options: dict[str, Any], trl_type: str) -> None:
    config = DPOConfig(**options)
    results = []
    for ours in (True, False):
        batch, logp, ref, log_sum_sq_probs = make_batch()
        loss, metrics = (
            our_loss(batch, logp, ref, log_sum_sq_probs, config)
            if ours
            else trl_cpo_loss(batch, logp, config, trl_type)
        )
        loss.backward()
        results.append((loss.detach(), logp.grad, metrics["rewards/margins"], metrics["rewards/accuracies"]))
    torch.testing.assert_close(results[0][:2], results[1][:2], atol=1e-6, rtol=1e-5)
    assert [float(value) for value in results[0][2:]] == pytest.approx(results[1][2:], abs=1e-5)


def test_orpo_equals_trl() -> None:
    """Add the likelihood term here: TRL's covers prompt and answer, ours only the answer, as in the paper."""
    config = DPOConfig(loss_type="orpo", beta=0.3)
    batch, logp, ref, log_sum_sq_probs = make_batch()
    loss, _ = our_loss(batch, logp, ref, log_sum_sq_probs, config)
    mean_logp_S = read_answers(logp, batch).mean_logp_S
    trainer: Any = SimpleNamespace(accelerator=ACCELERATOR, beta=0.3)
    odds_ratio_loss: Any = ORPOTrainer.odds_ratio_loss
    ratio, *_ = odds_ratio_loss(trainer, mean_logp_S[::2], mean_logp_S[1::2])
    expected = -logp[batch.per_sequence["label"][batch.sequence_N]].mean() - ratio.mean()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(value, logp)[0] for value in (loss, expected)))


def kto_numbers(labels: list[bool]) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Return labeled answers, and KL answers with a mean log-ratio above 0, so that it is not clamped."""
    batch, logp, ref, _ = make_batch(labels=labels)
    kl_batch, kl_logp, kl_ref, _ = make_batch(seed=3)
    return batch, logp, ref, kl_batch, kl_logp, answer_logps(kl_ref, kl_batch, None) - kl_batch.lengths_S


def our_kto_loss(
    config: Any, batch: PackedBatch, logp: Tensor, ref: Any, kl_batch: Any, kl_logp: Any, kl_ref_logp_S: Any
) -> Any:
    kl = kto_kl(read_answers(kl_logp, kl_batch, ref_logp_S=kl_ref_logp_S))
    answers = read_answers(logp, batch, ref_logp_S=answer_logps(ref, batch, None))
    return preference_loss(answers, config, AnswerTotals.of([batch], paired=False), kl=kl)


def trl_kto_loss(
    config: Any, batch: PackedBatch, logp: Tensor, ref: Any, kl_batch: Any, kl_logp: Any, kl_ref_logp_S: Any
) -> tuple[Any, dict[Any, Tensor]]:
    """Return (loss, metrics) of TRL's KTOTrainer._compute_loss."""
    logps, mask = padded(logp, batch)
    refs, _ = padded(ref, batch)
    before = torch.zeros(len(mask), PROMPT - 1)
    model = FakeModel(torch.cat([before, logps], 1))
    completion_mask = torch.cat([torch.zeros(len(mask), PROMPT, dtype=torch.long), mask.long()], dim=1)
    kl_logp_S = answer_logps(kl_logp, kl_batch, None)
    recorded: dict[str, Any] = {"train": defaultdict(list)}
    trainer: Any = SimpleNamespace(
        model=model, ref_model=FakeModel(torch.cat([before, refs], 1)), accelerator=ACCELERATOR, calculate_KL=True,
        aux_loss_enabled=False, precompute_ref_logps=False, loss_type="kto", beta=config.beta,
        desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight, _metrics=recorded,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda which, _: kl_logp_S if which is model else kl_ref_logp_S,
    )  # fmt: skip
    inputs = dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), completion_mask)
    compute_loss: Any = KTOTrainer._compute_loss
    loss = compute_loss(trainer, model, inputs | {"label": batch.per_sequence["label"]}, False)
    assert recorded["train"]["kl"][0] > 0
    return loss, {key: torch.tensor(values[0]) for key, values in recorded["train"].items() if values}


@pytest.mark.parametrize("labels", [[True, False] * 4, [True] * 6 + [False] * 2])
def test_kto_equals_trl(labels: list[bool]) -> None:
    config = DPOConfig(loss_type="kto", desirable_weight=1.2, undesirable_weight=0.7)
    results = []
    for function in (our_kto_loss, trl_kto_loss):
        numbers = kto_numbers(labels)
        loss, metrics = function(config, *numbers)
        loss.backward()
        results.append((loss.detach(), numbers[1].grad, metrics))
    torch.testing.assert_close(results[0][:2], results[1][:2], atol=1e-6, rtol=1e-5)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        torch.testing.assert_close(results[0][2][key], results[1][2][key], check_dtype=False)


def one_pair(chosen: float, rejected: float, **options: Any) -> tuple[Any, list[Any] | Any]:
    """Return loss and gradients of a pair of one-token answers with these log-ratios."""
    batch, _, _, _ = make_batch((1, 1))
    logp = torch.tensor([chosen - 2.0, rejected - 2.0], requires_grad=True)
    loss, _ = our_loss(batch, logp, torch.full((2,), -2.0), None, DPOConfig(**options))
    loss.backward()
    return loss.item(), present(logp.grad).tolist()


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("options", "expected"),
    # Log-ratios 0.5 and -0.3, so h = 0.8 with beta 1.
    [
        ({"loss_type": "sigmoid"}, -log_sigmoid(0.8)),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, -0.9 * log_sigmoid(0.8) - 0.1 * log_sigmoid(-0.8)),
        ({"loss_type": "hinge"}, 0.2),
        ({"loss_type": "ipo"}, (0.8 - 0.5) ** 2),
        ({"loss_type": "sppo_hard"}, (0.5 - 0.5) ** 2 + (-0.3 + 0.5) ** 2),
        ({"loss_type": "sft"}, 1.5),
        ({"loss_type": "simpo", "simpo_gamma": 0.2}, -log_sigmoid(0.6)),
        ({"loss_type": "sigmoid", "reference_free": True}, -log_sigmoid(0.8)),
        ({"loss_type": "sigmoid", "f_divergence_type": "forward_kl"}, -log_sigmoid(math.exp(0.3) - math.exp(-0.5))),
        ({"loss_type": ["hinge", "ipo"], "loss_weights": [2.0, 10.0]}, 0.4 + 0.9),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else "",
)
def test_losses_match_a_hand_calculation(options: dict[str, Any], expected: list[int]) -> None:
    assert one_pair(0.5, -0.3, beta=1.0, **options)[0] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", sorted(set(get_args(LossName)) - {"kto", "sft", "apo_down"}))
def test_gradients_raise_the_chosen_and_lower_the_rejected_answer(name: str) -> None:
    _, (chosen, rejected) = one_pair(-3.0, 0.0, beta=1.0, loss_type=name, **SMOOTHING.get(name, {}))
    assert chosen < 0 < rejected


def test_apo_down_lowers_both_answers_once_they_are_apart() -> None:
    _, (chosen, rejected) = one_pair(0.0, -2.0, loss_type="apo_down", beta=1.0)
    assert chosen > 0
    assert rejected > 0


def test_kto_raises_good_answers_and_lowers_bad_ones_whatever_their_number() -> None:
    batch, logp, ref, _ = make_batch((2, 3, 4), labels=[True, False, False])
    answers = read_answers(logp, batch, ref_logp_S=answer_logps(ref, batch, None))
    totals = AnswerTotals.of([batch], paired=False)
    loss, metrics = preference_loss(answers, DPOConfig(loss_type="kto"), totals, kl=torch.tensor(0.1))
    loss.backward()
    gradient = present(logp.grad)
    assert (gradient[:2] < 0).all()
    assert (gradient[2:] > 0).all()
    assert "rewards/accuracies" not in metrics


def test_label_smoothing_limits_the_margin_of_a_pair() -> None:
    _, (plain, _) = one_pair(9.0, -9.0, beta=1.0)
    _, (smoothed, _) = one_pair(9.0, -9.0, beta=1.0, label_smoothing=0.1)
    assert plain < 0 < smoothed


def test_discopop_stays_finite_for_a_pair_in_extremely_wrong_order() -> None:
    loss, gradients = one_pair(-2000.0, 0.0, loss_type="discopop")
    assert loss == pytest.approx(200.0)
    assert all(map(math.isfinite, gradients))


def test_orpo_stays_finite_for_an_answer_of_probability_one() -> None:
    loss, gradients = one_pair(2.0, 0.0, loss_type="orpo")
    assert math.isfinite(loss)
    assert all(map(math.isfinite, gradients))


SPLIT = [
    *({"loss_type": name, **SMOOTHING.get(name, {})} for name in sorted(set(get_args(LossName)))),
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.2},
    {"loss_type": "sigmoid", "use_weighting": True},
]


@pytest.mark.parametrize("options", SPLIT, ids=name_of)
def test_every_split_into_micro_batches_gives_the_same_loss(options: Any) -> None:
    """Split the batch, and join the answers again for losses that rank all pairs of the update."""
    config = DPOConfig(**options)
    kl = torch.tensor(0.3)
    batch, logp, ref, log_sum_sq_probs = make_batch()
    whole, whole_metrics = our_loss(batch, logp, ref, log_sum_sq_probs, config, kl=kl)
    whole.backward()

    leaves, answers, start = [], [], 0
    for place in range(0, len(LENGTHS), 2):
        lengths = LENGTHS[place : place + 2]
        token = slice(start, start + sum(lengths))
        part = make_batch(lengths)[0]
        leaves.append(logp.detach()[token].requires_grad_())
        answers.append(
            read_answers(
                leaves[-1],
                part,
                ref_logp_S=answer_logps(ref[token], part, config.ld_alpha) if config.needs_reference else None,
                ld_alpha=config.ld_alpha,
                log_sum_sq_probs_N=log_sum_sq_probs[token] if config.use_weighting else None,
            )
        )
        start = token.stop
    totals = AnswerTotals.of([batch], paired=True)
    parts = [Answers.join(answers)] if config.ranks_pairs else answers
    results = [preference_loss(part, config, totals, kl=kl) for part in parts]
    torch.stack([loss for loss, _ in results]).sum().backward()
    assert sum(loss.item() for loss, _ in results) == pytest.approx(whole.item(), abs=1e-6)
    torch.testing.assert_close(torch.cat([present(leaf.grad) for leaf in leaves]), logp.grad, atol=1e-6, rtol=1e-5)
    for key, value in whole_metrics.items():
        assert sum(metrics[key].item() for _, metrics in results) == pytest.approx(value.item(), abs=1e-5), key


def test_ld_dpo_weights_surplus_tokens_down() -> None:
    batch, logp, _, _ = make_batch((3, 1))
    sums = answer_logps(logp, batch, 0.5)
    assert sums.tolist() == pytest.approx([(logp[0] + 0.5 * logp[1] + 0.5 * logp[2]).item(), logp[3].item()])
