"""Test which symptoms raise an alert, when, what the alert does to the run, and the webhook."""

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlqwen.config import DistillationConfig, DPOConfig, GRPOConfig, PPOConfig, SFTConfig
from rlqwen.distributed import UpdateResult
from rlqwen.errors import ConfigError, WatchStop
from rlqwen.monitoring import Monitor, Webhook, worst_action
from rlqwen.packing.batch import PackedBatch
from rlqwen.reporting import MetricLogger, read_metrics, read_summary
from rlqwen.reporting.curves import _series
from rlqwen.reporting.end_of_run import alert_lines
from rlqwen.trainers.data_stream import RowStream
from rlqwen.trainers.sft import SFTTrainer
from tests.patience import PATIENCE_S

# Metrics of a healthy GRPO step of the quickstart.
HEALTHY = {
    "loss": -0.0006,
    "grad_norm": 0.13,
    "learning_rate": 1e-4,
    "updates/skipped": 0.0,
    "entropy": 0.06,
    "kl": 0.02,
    "sampling/logp_gap": 3e-7,
    "sampling/logp_missing": 0.0,
    "groups/no_signal": 0.3,
    "reward/mean": 0.8,
    "reward/missing": 0.0,
    "reward/accuracy/mean": math.nan,  # it applies to no completion
    "reward/accuracy/ok": 256.0,
    "reward/accuracy/timeout": 0.0,
    "reward/accuracy/error": 0.0,
    "reward/accuracy/invalid": 0.0,
    "completions/mean_length": 22.0,
    "completions/truncated": 0.01,
    "tokens/trained": 9000.0,
}
SICK = {
    "nonfinite": {"kl": math.nan},
    "skipped": {"updates/skipped": 1.0, "loss": math.nan, "grad_norm": math.nan},
    "mismatch": {"sampling/logp_gap": 0.7},
    "entropy": {"entropy": 0.0005},
    "kl": {"kl": 3.0},
    "grad_norm": {"grad_norm": 20.0},
    "zero_reward": {"reward/mean": 0.0, "completions/truncated": 1.0},
    "no_signal": {"groups/no_signal": 1.0, "tokens/trained": 0.0},
    "reward_failures": {"reward/accuracy/ok": 200.0, "reward/accuracy/timeout": 56.0},
    "runaway_length": {"completions/mean_length": 60.0, "completions/truncated": 0.6},
    "empty": {"completions/mean_length": 1.0},
    "idle": {"learning_rate": 0.0},
    "masked": {"tokens/trained": 0.0},
}


def monitor_after(steps: int, args: GRPOConfig | PPOConfig | None = None, /, **watch: Any) -> Monitor:
    """Return a monitor that has seen `steps` healthy steps."""
    monitor = Monitor(args or GRPOConfig(beta=0.04, watch=watch))
    for step in range(steps):
        assert monitor.observe(step, HEALTHY) == []
    return monitor


@pytest.mark.parametrize("symptom", SICK)
def test_each_symptom_raises_one_alert_with_cause_and_advice(symptom: str) -> None:
    monitor = monitor_after(20)
    for step in range(20, 26):
        alerts = monitor.observe(step, HEALTHY | SICK[symptom])
        if alerts:
            break
    (alert,) = alerts
    limits = getattr(monitor._config, symptom)
    assert alert.symptom == symptom
    assert alert.step == 20 + limits.steps - 1
    assert alert.action == ("stop" if symptom == "nonfinite" else "warn")
    assert alert.diagnosis.cause
    assert all(" -> " in line for line in alert.diagnosis.advice)
    assert set(alert.fields()) == {"symptom", "value", "threshold", "cause", "advice", "action"}


@pytest.mark.parametrize("symptom", SICK)
def test_each_symptom_can_be_switched_off(symptom: str) -> None:
    monitor = monitor_after(20, **{symptom: "off"})
    assert not [alert for step in range(20, 30) for alert in monitor.observe(step, HEALTHY | SICK[symptom])]


def test_the_monitor_can_be_switched_off() -> None:
    monitor = Monitor(GRPOConfig(watch=False))
    sick = {key: value for part in SICK.values() for key, value in part.items()}
    assert not [alert for step in range(10) for alert in monitor.observe(step, sick)]


def test_the_advice_quotes_the_present_value() -> None:
    args = GRPOConfig(learning_rate=3e-4, beta=0.0)
    monitor = monitor_after(10, args)
    alerts = [alert for step in range(3) for alert in monitor.observe(step, HEALTHY | {"entropy": 0.0005})]
    assert alerts[0].diagnosis.advice == [
        "train.learning_rate: 0.0003 -> try 0.0001",
        "train.entropy_coef: 0 -> try 0.001",
        "train.beta: 0 -> try 0.04",
    ]
    monitor = monitor_after(0, PPOConfig(kl_coef=0.05))
    monitor.observe(0, HEALTHY | {"kl": 3.0})
    (alert,) = monitor.observe(1, HEALTHY | {"kl": 3.0})
    assert "train.kl_coef: 0.05 -> try 0.1" in alert.diagnosis.advice


def test_a_symptom_raises_an_alert_again_only_after_clear_steps_without_it() -> None:
    monitor = monitor_after(0, clear_steps=3)
    sick = HEALTHY | SICK["mismatch"]
    seen = [sick, sick, HEALTHY, HEALTHY, sick, HEALTHY, HEALTHY, HEALTHY, sick]
    alerts = [[alert.symptom for alert in monitor.observe(step, metrics)] for step, metrics in enumerate(seen)]
    assert [step for step, symptoms in enumerate(alerts) if symptoms] == [0, 8]
    assert len(monitor.alerts) == 2


def test_an_alert_needs_steps_in_a_row() -> None:
    monitor = monitor_after(0, mismatch={"steps": 3})
    sick = HEALTHY | SICK["mismatch"]
    raised = [
        bool(monitor.observe(step, metrics)) for step, metrics in enumerate([sick, sick, HEALTHY, sick, sick, sick])
    ]
    assert raised == [False] * 5 + [True]


def test_thresholds_come_from_the_recipe() -> None:
    assert monitor_after(0, mismatch=1.0).observe(0, HEALTHY | SICK["mismatch"]) == []
    assert monitor_after(0, mismatch=1e-8).observe(0, HEALTHY)[0].diagnosis.threshold == 1e-8
    assert monitor_after(20, grad_norm=1000).observe(20, HEALTHY | SICK["grad_norm"]) == []


def test_worst_action_is_the_most_severe() -> None:
    monitor = monitor_after(0, mismatch={"action": "rollback"}, action="warn")
    assert worst_action(monitor.observe(0, HEALTHY | SICK["mismatch"] | SICK["skipped"])) == "rollback"
    assert worst_action(monitor.observe(1, HEALTHY | SICK["nonfinite"])) == "stop"
    assert worst_action([]) is None


def test_entropy_alerts_below_the_threshold_or_below_a_share_of_its_start() -> None:
    """The quickstart's entropy falls from 0.066 to 0.007 while its accuracy rises, which is healthy."""
    monitor = monitor_after(5)
    assert not [t for step in range(10) for t in monitor.observe(step, HEALTHY | {"entropy": 0.0068})]
    high = Monitor(GRPOConfig())
    for step in range(5):
        high.observe(step, HEALTHY | {"entropy": 2.0})
    alerts = [t for step in range(3) for t in high.observe(step, HEALTHY | {"entropy": 0.05})]
    assert [t.diagnosis.threshold for t in alerts] == pytest.approx([0.06])


def test_warm_up_and_a_frozen_policy_are_not_idle() -> None:
    monitor = monitor_after(0)
    assert monitor.observe(0, HEALTHY | {"learning_rate": 0.0}) == []
    critic_only = HEALTHY | {"grad_norm": 0.0, "critic/grad_norm": 0.4}
    assert not [t for step in range(10) for t in Monitor(PPOConfig()).observe(step, critic_only)]


def test_offline_runs_have_no_symptoms_of_online_runs() -> None:
    """KTO logs a `kl` that is not the KL from the reference in nats per token."""
    dpo = Monitor(DPOConfig())
    assert not [
        t for s in range(9) for t in dpo.observe(s, {"loss": 0.6, "grad_norm": 2.0, "kl": 9.0, "learning_rate": 1.0})
    ]
    distillation = Monitor(DistillationConfig())  # lowers its `kl`, from the teacher
    assert not distillation.observe(0, HEALTHY | {"kl": 9.0})
    (alert,) = [t for step in range(1, 9) for t in distillation.observe(step, HEALTHY | {"entropy": 0.0, "kl": 9.0})]
    assert alert.symptom == "entropy"  # without advice on coefficients that it lacks
    (alert,) = Monitor(SFTConfig()).observe(0, {"loss": 0.0, "grad_norm": 0.0, "tokens/targets": 0.0})
    assert alert.symptom == "masked"


def test_a_monitor_is_restored_from_its_state() -> None:
    watched = monitor_after(20)
    watched.observe(20, HEALTHY | SICK["kl"])
    resumed = Monitor(GRPOConfig(beta=0.04))
    resumed.load_state_dict(json.loads(json.dumps(watched.state_dict())))
    for step in (21, 22, 23, 24):
        sick = HEALTHY | SICK["kl"] | SICK["grad_norm"]
        assert [t.text for t in resumed.observe(step, sick)] == [t.text for t in watched.observe(step, sick)]
    assert [alert.symptom for alert in watched.alerts] == ["kl", "grad_norm"]
    assert resumed.alerts == watched.alerts


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"entrop": 1}, "watch: unknown key 'entrop'; did you mean 'entropy'"),
        ({"mismatch": -1}, "watch.mismatch.threshold"),
        ({"kl": {"action": "panic"}}, "watch.kl.action"),
        ({"webhook": "ftp://host/topsecret"}, "watch.webhook: must be a URL"),
    ],
)
def test_an_invalid_watch_section_is_refused_with_its_key(watch: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        GRPOConfig(watch=watch)
    assert "topsecret" not in str(caught.value)


# The webhook


class Server(HTTPServer):
    """Record what is posted. Answer with `status` once `may_answer` is set, which it is at first."""

    def __init__(self) -> None:
        self.posted: list[Any] = []
        self.status, self.may_answer = 200, threading.Event()
        self.may_answer.set()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.may_answer.wait(PATIENCE_S)
        self.server.posted.append(json.loads(body))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.may_answer.set()
    server.shutdown()
    thread.join(PATIENCE_S)
    server.server_close()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/services/topsecret"


def test_a_webhook_receives_json(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLQWEN_TEST_HOOK", address(server))
    hook = Webhook("$RLQWEN_TEST_HOOK", 5.0)
    hook.post({"run": "a", "value": math.nan, "advice": ["x -> y"]})
    hook.close()
    assert server.posted == [{"run": "a", "value": "nan", "advice": ["x -> y"]}]
    assert hook.problems() == []


def test_a_failing_webhook_is_reported_without_its_url(server: Server) -> None:
    server.status = 403
    hook = Webhook(address(server), 5.0)
    hook.post({})
    hook.close()
    gone = Webhook("http://127.0.0.1:9/services/topsecret", 2.0)
    gone.post({})
    gone.close()
    assert hook.problems() == ["watch.webhook answered 403"]
    assert gone.problems() == ["watch.webhook could not be reached: URLError"]


def test_a_slow_webhook_does_not_delay_the_run(server: Server) -> None:
    server.may_answer.clear()
    hook = Webhook(address(server), 0.2)
    hook.post({})
    hook.close()
    assert server.posted == []  # neither `post` nor `close` has waited for the answer
    server.may_answer.set()


def test_an_unset_webhook_variable_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLQWEN_TEST_HOOK", raising=False)
    with pytest.raises(ConfigError, match=r"watch\.webhook: the environment variable RLQWEN_TEST_HOOK is not set"):
        Webhook("$RLQWEN_TEST_HOOK", 5.0)


def test_a_literal_webhook_url_is_not_saved() -> None:
    assert SFTConfig(watch={"webhook": "https://host/topsecret"}).model_dump()["watch"]["webhook"] is None
    assert SFTConfig(watch={"webhook": "$HOOK"}).model_dump()["watch"]["webhook"] == "$HOOK"


def test_curves_show_the_last_value_of_a_step_that_was_rolled_back() -> None:
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "watch/value": 9.0},
        {"step": 2, "loss": 2.0},
    ]
    assert _series(lines, "loss") == ([1, 2], [3.0, 2.0])


# In a run

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(8)]


def make_trainer(model: Path, folder: Path, **options: Any) -> SFTTrainer:
    args = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "output_dir": str(folder)}
    return SFTTrainer(str(model), SFTConfig(**(args | options)), train_dataset=ROWS)


def test_an_alert_is_logged_displayed_summarized_and_sent(
    tiny_model_path: Path,
    tmp_path: Path,
    server: Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RLQWEN_DISPLAY", "plain")
    watch = {"idle": {"steps": 2}, "webhook": address(server)}
    make_trainer(tiny_model_path, tmp_path, learning_rate=0.0, watch=watch).train()
    lines = read_metrics(tmp_path)
    (event,) = [line for line in lines if "watch/symptom" in line]
    assert (event["step"], event["watch/symptom"], event["watch/action"]) == (2, "idle", "warn")
    assert event["watch/advice"][0] == "train.learning_rate: 0 -> above 0"
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    shown = capsys.readouterr().out
    assert "watch: idle at step 2" in shown
    summary = read_summary(tmp_path)
    assert [alert["symptom"] for alert in summary["watch"]] == ["idle"]
    assert "train.learning_rate: 0 -> above 0" in "\n".join(map(str, alert_lines(summary["watch"])))
    assert [(call["event"], call["run"], call["step"]) for call in server.posted] == [
        ("trip", tmp_path.name, 2),
        ("finished", tmp_path.name, 4),
    ]
    written = "".join(path.read_text(errors="replace") for path in tmp_path.glob("*.json*"))
    assert "topsecret" not in written + shown


def test_the_action_stop_saves_a_checkpoint_and_names_the_cause(
    tiny_model_path: Path, tmp_path: Path, server: Server
) -> None:
    watch = {"idle": {"steps": 2, "action": "stop"}, "webhook": address(server)}
    trainer = make_trainer(tiny_model_path, tmp_path, learning_rate=0.0, watch=watch)
    with pytest.raises(WatchStop, match="idle at step 2") as caught:
        trainer.train()
    assert caught.value.exit_code == 1
    assert "train.learning_rate: 0 -> above 0" in str(caught.value)
    assert (tmp_path / "checkpoints" / "step-000002" / "model.safetensors").is_file()
    assert [call["event"] for call in server.posted] == ["trip", "failed"]


def test_an_unreachable_webhook_does_not_stop_the_run(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLQWEN_DISPLAY", "plain")
    watch = {"webhook": "http://127.0.0.1:9/topsecret", "webhook_timeout": 1.0}
    make_trainer(tiny_model_path, tmp_path, watch=watch).train()
    shown = capsys.readouterr().out
    assert "watch.webhook could not be reached: URLError; the run goes on" in shown
    assert "topsecret" not in shown
    assert read_summary(tmp_path)["watch"] == []


def test_an_event_with_text_is_logged_beside_a_tensorboard_sink(tmp_path: Path) -> None:
    torch_tensorboard = pytest.importorskip("tensorboard")
    assert torch_tensorboard
    with MetricLogger(tmp_path, report_to="tensorboard", display=False, total_steps=1, algorithm="sft") as logger:
        logger.event(1, {"watch/symptom": "kl", "watch/value": 2.0, "watch/advice": ["a -> b"]})
    assert read_metrics(tmp_path) == [
        {"step": 1, "watch/symptom": "kl", "watch/value": 2.0, "watch/advice": ["a -> b"]}
    ]


def poison(trainer: Any, updates: set[int]) -> list[int]:
    """Multiply a weight by 1000 after these updates, counted over the whole run, so that the next gradient explodes.

    Return the list that every finished step is appended to.
    """
    done: list[int] = []
    update: Callable[..., UpdateResult] = trainer.update

    def poisoned(micro_batches: Sequence[PackedBatch], **options: Any) -> UpdateResult:
        result = update(micro_batches, **options)
        done.append(trainer.state.global_step)
        if len(done) in updates:
            with torch.no_grad():
                trainer.policy.base_model.model.norm.weight.mul_(1000.0)
        return result

    trainer.update = poisoned
    return done


ROLLBACK = {"grad_norm": {"action": "rollback", "min_steps": 2, "window": 5, "threshold": 5}}


@pytest.mark.fault(
    "weights exploded between two checkpoints", "rolled back to the last checkpoint; continues with the next rows"
)
def test_a_rollback_restores_the_checkpoint_and_continues_with_the_next_rows(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, max_steps=7, save_strategy="steps", save_steps=2, watch=ROLLBACK)
    done = poison(trainer, {5})
    rows: list[Any] = []
    step, restored = trainer.step, {}

    def keep_rows(batch: Any) -> dict[str, float]:
        rows.append(batch)
        return step(batch)

    load = trainer.policy.load_checkpoint

    def keep_restored_weight(folder: Path) -> None:
        load(folder)
        restored[trainer.state.global_step] = trainer.policy.base_model.model.norm.weight.detach().clone()

    monkeypatch.setattr(trainer, "step", keep_rows)
    monkeypatch.setattr(trainer.policy, "load_checkpoint", keep_restored_weight)
    trainer.train()
    assert done == [1, 2, 3, 4, 5, 6, 5, 6, 7]
    order = RowStream(trainer.train_rows, seed=trainer.args.seed, shuffle=True).take(len(done) * 4)
    assert [row for batch in rows for row in batch] == order  # no row twice, none skipped
    assert set(restored) == {4}
    saved = load_file(tmp_path / "checkpoints" / "step-000004" / "model.safetensors")
    assert torch.equal(restored[4], saved["model.norm.weight"])
    alert, rollback = (line for line in read_metrics(tmp_path) if "watch/action" in line)
    assert (alert["step"], alert["watch/symptom"], alert["watch/action"]) == (6, "grad_norm", "rollback")
    assert (rollback["watch/from_step"], rollback["watch/to_step"]) == (6, 4)
    assert [alert["symptom"] for alert in read_summary(tmp_path)["watch"]] == ["grad_norm"]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 7
    assert max(norms) < 5 * min(norms)


@pytest.mark.fault(
    "weights exploded again and again", "rolled back max_rollbacks times, then stopped with the state saved"
)
def test_the_run_stops_after_max_rollbacks(tiny_model_path: Path, tmp_path: Path) -> None:
    watch = ROLLBACK | {"max_rollbacks": 1}
    trainer = make_trainer(tiny_model_path, tmp_path, max_steps=9, save_strategy="steps", save_steps=2, watch=watch)
    poison(trainer, {5, 7})
    with pytest.raises(WatchStop, match="rolled back 1 times already") as caught:
        trainer.train()
    assert "grad_norm at step 6" in str(caught.value)
    assert (tmp_path / "checkpoints" / "step-000006").is_dir()


def test_a_rollback_without_a_checkpoint_stops_the_run(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, max_steps=9, watch=ROLLBACK)
    poison(trainer, {4})
    with pytest.raises(WatchStop, match="there is no checkpoint to roll back to"):
        trainer.train()
