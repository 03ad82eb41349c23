"""Test `rlqwen eval` on a tiny model: perplexity, metrics, reward models, win rates and the files it writes."""

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from rlqwen import SFTConfig, SFTTrainer
from rlqwen.cli import main
from rlqwen.data import load_rows, tokenize_conversation
from rlqwen.errors import ConfigError
from rlqwen.evaluation import EvalConfig, evaluate_model, evaluation_config, sampling
from rlqwen.evaluation.win_rate import win_rate
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.reporting.console import TerminalConsole
from rlqwen.types import Group, Prompt
from tests.narrowing import present

ROWS = [
    {"prompt": "2+2=", "completion": "4, I think"},
    {"prompt": "Say it in Chinese: hello", "completion": "你好"},
    {"prompt": "x" * 40, "completion": "y"},
]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make a working directory with rows.jsonl and a reward function."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    Path("judges.py").write_text("def letters(completions):\n    return [float(len(text)) for text in completions]\n")
    handler = signal.getsignal(signal.SIGTERM)
    yield "rows.jsonl"
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def other_model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "other"
    # Larger weights than usual, because near-uniform random models with one seed sample the same text.
    options = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "initializer_range": 0.5}
    return str(build_tiny_qwen3(folder, seed=1, **options))


@pytest.fixture(scope="module")
def reward_model_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make a random sequence-classification model with its head."""
    folder = tmp_path_factory.mktemp("models") / "judge"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(tiny_model_path, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain_nats(model: PreTrainedModel, ids: list[int], mask: list[bool]) -> float:
    """Return the negative log-likelihood of the masked tokens by a plain forward pass over one sequence."""
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return -sum(float(logp[i - 1, ids[i]]) for i in range(1, len(ids)) if mask[i])


def test_perplexity_equals_that_of_a_plain_forward_pass(tiny_model_path: Path, data: str) -> None:
    result = evaluate_model(evaluation_config(str(tiny_model_path), data, metric_names="perplexity"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    nats, tokens = 0.0, 0
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        nats += plain_nats(model, prompt + answer, [False] * len(prompt) + [True] * len(answer))
        tokens += len(answer)
    assert result.metrics["tokens"] == tokens
    assert result.metrics["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result.metrics["perplexity"] == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-4)
    assert (result.num_prompts, result.mean_length, result.rewards) == (0, None, {})
    assert "3 of 3 rows" in result.notes["perplexity"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]},
        {"text": "plain text, all of it"},
    ],
)
def test_perplexity_of_conversations_and_of_plain_text(tiny_model_path: Path, data: str, row: dict[str, Any]) -> None:
    Path("rows.jsonl").write_text(json.dumps(row), "utf-8")
    result = evaluate_model(evaluation_config(str(tiny_model_path), data, metric_names="perplexity"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    if "text" in row:
        ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        mask = [True] * len(ids)
    else:
        ids, mask = tokenize_conversation(tokenizer, row["messages"])
    nats = plain_nats(AutoModelForCausalLM.from_pretrained(tiny_model_path).eval(), ids, mask)
    assert result.metrics["nats_per_token"] * result.metrics["tokens"] == pytest.approx(nats, rel=1e-5)


def test_perplexity_with_an_sft_recipe_equals_the_trainers(tiny_model_path: Path, data: str, tmp_path: Path) -> None:
    Path("sft.yaml").write_text(
        f"algorithm: sft\nmodel: {{path: {tiny_model_path}}}\noutput_dir: run\n"
        "data:\n  train: {generator: arithmetic, args: {kind: sft, size: 8}}\n"
        "  eval: {generator: arithmetic, args: {kind: sft, split: eval, size: 6}}\n"
        "train: {max_length: 40, assistant_only_loss: false}\n"
    )
    config = evaluation_config(str(tiny_model_path), "sft.yaml", metric_names="perplexity")
    rows = load_rows(config.data, seed=0)
    trainer = SFTTrainer(
        str(tiny_model_path),
        SFTConfig(output_dir=str(tmp_path / "run"), max_length=40, assistant_only_loss=False),
        train_dataset=rows,
        eval_dataset=rows,
    )
    expected = trainer.evaluate()
    found = evaluate_model(config).metrics
    assert found["perplexity"] == pytest.approx(expected["eval/perplexity"], rel=1e-5)
    assert found["tokens"] == expected["eval/tokens"]


def test_the_command_line_compares_two_models(
    tiny_model_path: Path, other_model_path: str, reward_model_path: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "eval",
        str(tiny_model_path),
        "--against",
        other_model_path,
        "--data",
        data,
        "-k",
        "2",
        "--max-tokens",
        "6",
    ]
    words += ["--rewards", f"judges.py:letters,{reward_model_path}", "--metrics", "rouge,exact_match"]
    words += ["--engine", "transformers", "--output", "found", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(Path("found/eval.json").read_text("utf-8"))
    assert set(result["rewards"]) == {"letters", "judge"}
    assert (
        {"rouge_1", "rouge_2", "rouge_l", "exact_match"} == set(result["metrics"]) == set(result["against"]["metrics"])
    )
    sides = [
        [json.loads(line) for line in Path("found", name).read_text("utf-8").splitlines()]
        for name in ("completions.jsonl", "completions-against.jsonl")
    ]
    for side, found in zip(sides, (result, result["against"]), strict=True):
        assert [row["prompt_index"] for row in side] == [0, 0, 1, 1, 2, 2]
        assert [row["references"] for row in side[::2]] == [[row["completion"]] for row in ROWS]
        assert found["rewards"]["letters"]["mean"] == pytest.approx(sum(len(row["completion"]) for row in side) / 6)
    assert sides[0][0]["completion"] != sides[1][0]["completion"]
    for name in ("letters", "judge"):
        values = [[row["rewards"][name] for row in side] for side in sides]
        pairs = [(values[0][i : i + 2], values[1][i : i + 2]) for i in (0, 2, 4)]
        assert result["win_rates"][name]["win_rate"] == win_rate(pairs).win_rate
    assert result["win_rates"]["judge"]["ties"] == 0
    assert main(words) == 2
    assert "holds an evaluation already" in capsys.readouterr().err
    assert main([*words[:-3], "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    for part in ("1 prompts x 2 samples", "by the higher reward", "win rate", "95% interval", "total", "stemmer:no"):
        assert part in printed


def test_a_model_ties_with_itself_and_loses_to_correct_answers(tiny_model_path: Path, data: str) -> None:
    options: dict[str, Any] = {
        "reward_names": "exact_match",
        "engine": "transformers",
        "max_tokens": 4,
        "num_samples": 2,
    }
    itself = evaluate_model(evaluation_config(str(tiny_model_path), data, against=str(tiny_model_path), **options))
    rate = itself.win_rates["exact_match"]
    assert (rate.wins, rate.ties, rate.losses, rate.win_rate) == (0, 6, 0, 0.5)
    answers = evaluate_model(evaluation_config(str(tiny_model_path), data, against="data", **options))
    rate = answers.win_rates["exact_match"]
    assert (rate.losses, rate.mean, rate.against_mean) == (6, 0.0, 1.0)
    assert present(answers.against).mean_length == pytest.approx(
        sum(
            len(ids)
            for ids in AutoTokenizer.from_pretrained(tiny_model_path)([r["completion"] for r in ROWS])["input_ids"]
        )
        / 3
    )


def test_completions_are_kept_if_a_reward_fails(
    tiny_model_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.py").write_text("def broken(completions):\n    raise ZeroDivisionError('oh')\n")
    words = ["eval", str(tiny_model_path), "--data", data, "--rewards", "broken.py:broken", "--engine", "transformers"]
    assert main([*words, "--max-tokens", "4", "--output", "found"]) == 1
    assert "ZeroDivisionError: oh" in capsys.readouterr().err
    kept = [json.loads(line) for line in Path("found/completions.jsonl").read_text("utf-8").splitlines()]
    assert len(kept) == 3
    assert not Path("found/eval.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "perplexity,blue"], "'rouge', 'exact_match' or 'label' (value given: 'blue')"),
        (["--metrics", "bleu", "--against", "data"], "give --rewards"),
        (
            ["--metrics", "rouge", "--reference", "gold"],
            "row 0: there is no right answer to compare with in column 'gold'",
        ),
        (["--metrics", "label", "--labels", "4,5"], "row 0: '4, I think' is none of the labels 4, 5"),
        (["--rewards", "judges.py:letters", "--against", "./missing"], "there is no such folder"),
        (["--rewards", "TINY"], "lacks weights (score.weight), so its scores would be random"),
        (
            ["--rewards", "judges.py:letters", "--against", "data", "--data", "bare.jsonl"],
            "row 0 has no answer of its own",
        ),
        (
            ["--rewards", "judges.py:letters", "--against", "data", "--column", "completion=reply"],
            "which the row lacks",
        ),
    ],
)
def test_bad_input_exits_with_2_before_sampling(
    tiny_model_path: Path, data: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    Path("bare.jsonl").write_text('{"prompt": "q"}\n')
    words = [str(tiny_model_path) if word == "TINY" else word for word in words]
    assert main(["eval", str(tiny_model_path), "--data", data, "--engine", "transformers", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_rewards_of_a_recipe_are_computed_only_if_needed(data: str) -> None:
    Path("grpo.yaml").write_text(
        "algorithm: grpo\nmodel: {path: m}\noutput_dir: run\ndata: {train: {generator: arithmetic}}\nrewards: [accuracy]\n"
    )
    assert evaluation_config("m", "grpo.yaml", metric_names="perplexity").rewards == []
    assert [spec.name for spec in evaluation_config("m", "grpo.yaml").rewards] == ["accuracy"]
    both = evaluation_config("m", "grpo.yaml", metric_names="rouge, perplexity", against="n")
    assert ([spec.name for spec in both.rewards], both.text_metrics) == (["accuracy"], ["rouge"])
    with pytest.raises(ConfigError, match="--metrics perplexity,rouge"):
        EvalConfig(model="m", data={"path": "rows.jsonl"})


def test_sampling_outside_a_terminal_prints_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_LINE_EVERY_S", 0.0)
    screen = io.StringIO()
    groups = [Group(Prompt(index, [1], "1"), [], 0) for index in range(2)]
    assert list(sampling._with_progress(iter(groups), 2, TerminalConsole(file=screen))) == groups
    assert screen.getvalue() == "sampled 1 of 2 prompts\nsampled 2 of 2 prompts\n"
