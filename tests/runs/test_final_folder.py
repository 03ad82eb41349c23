"""Test the saved models of every trainer: they load, and generation stops at the trained token."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import rlqwen
from rlqwen.cli import main
from rlqwen.errors import ConfigError, ModelError
from rlqwen.models.loading import align_stop_tokens
from rlqwen.rewards.reward_model import RewardModel
from rlqwen.runs.export import ExportOptions, export_model

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"{i}+1?"}],
        "chosen": [{"role": "assistant", "content": str(i + 1)}],
        "rejected": [{"role": "assistant", "content": str(i)}],
    }
    for i in range(4)
]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
CHATS = [{"messages": row["prompt"] + row["chosen"]} for row in PAIRS]
END, EOS = "<|im_end|>", "<|endoftext|>"


def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture(scope="module")
def base(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base model like Qwen's: its tokenizer and configs have another end token than its chat template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_model_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == END
    tokenizer.eos_token = tokenizer.pad_token = EOS
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        values["eos_token_id"] = tokenizer.eos_token_id
        (folder / name).write_text(json.dumps(values))
    return folder


def train(algorithm: str, model: Path, folder: Path, *, peft: bool = False, **options: Any) -> Any:
    """Train one step with `algorithm`, and save a checkpoint."""
    kind, rows = {"sft": ("SFT", CHATS), "dpo": ("DPO", PAIRS), "reward": ("Reward", PAIRS)}.get(
        algorithm, (algorithm.upper(), PROMPTS)
    )
    options |= {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 4, "save_steps": 1,
        "learning_rate": 1e-3, "use_cpu": True,
    }  # fmt: skip
    given: dict[str, Any] = {
        "train_dataset": rows,
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"]) if peft else None,
    }
    if algorithm in ("grpo", "ppo"):
        given["reward_funcs"] = length
        options |= {
            "max_completion_length": 4, "rollout": {"engine": "transformers"}, "scoring": {"in_process": ["length"]},
            "num_generations": 4, **({"num_ppo_epochs": 1} if algorithm == "ppo" else {}),
        }  # fmt: skip
    trainer = getattr(rlqwen, f"{kind}Trainer")(str(model), args=getattr(rlqwen, f"{kind}Config")(**options), **given)
    trainer.train()
    return trainer


def stops(folder: Path) -> str | list[str]:
    """Return the tokens at which `generate` stops with the model of a folder."""
    ids = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo", "ppo"])
def test_saved_models_stop_at_the_end_of_turn_they_were_trained_on(
    base: Path, tmp_path: Path, algorithm: str, peft: bool
) -> None:
    train(algorithm, base, tmp_path / "run", peft=peft)
    for folder in (tmp_path / "run" / "final", *(tmp_path / "run" / "checkpoints").glob("step-*")):
        assert stops(folder) == [EOS, END]
        assert AutoTokenizer.from_pretrained(folder).eos_token == EOS  # no other token was configured
    for part in ("final", "final/adapter") if peft else ("final",):
        out = tmp_path / f"out-{part.count('/')}"
        export_model(ExportOptions(str(tmp_path / "run" / part), str(out)))
        assert stops(out) == [EOS, END]


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_a_configured_eos_token_is_in_every_saved_config(base: Path, tmp_path: Path, algorithm: str) -> None:
    """Check the tokenizer, the config, and the first stop token of generation, as in TRL 1.16."""
    train(algorithm, base, tmp_path, eos_token=END)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert tokenizer.eos_token == END
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids([END, EOS])
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id


def test_a_saved_reward_model_has_a_pad_token(base: Path, tmp_path: Path) -> None:
    """Check the pad token, because transformers scores the last token that is not padding."""
    train("reward", base, tmp_path, eos_token=END)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert tokenizer.eos_token == END
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert not (tmp_path / "final" / "generation_config.json").exists()


def test_an_unknown_eos_token_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eos_token: '<end>' is not in the tokenizer's vocabulary"):
        train("sft", base, tmp_path, eos_token="<end>")


def test_stop_ids_are_only_added_and_a_config_that_cannot_be_saved_is_repaired(base: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    model.generation_config = GenerationConfig(eos_token_id=[7, 9], temperature=0.5)
    with pytest.warns(UserWarning, match="do_sample is set to true"):
        align_stop_tokens(model, tokenizer, END)
    first, last = (tokenizer.convert_tokens_to_ids(token) for token in (EOS, END))
    assert model.generation_config.eos_token_id == [first, 7, 9, last]
    model.generation_config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.5


@pytest.fixture
def short(base: Path, tmp_path: Path) -> tuple[Path, str]:
    """Make a model whose tokenizer has two tokens more than its embedding has rows."""
    folder = tmp_path / "short"
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<new{number}>" for number in range(rows + 2 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    return (
        folder,
        f"its tokenizer has {rows + 2} tokens and its embedding {rows} rows, so that 2 tokens, the first '<new",
    )


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "reward", "grpo", "ppo"])
def test_trainers_refuse_tokens_without_an_embedding_row(
    short: tuple[Path, str], tmp_path: Path, algorithm: str
) -> None:
    folder, message = short
    with pytest.raises(ModelError, match=message):
        train(algorithm, folder, tmp_path / "run")


def test_exports_and_reward_models_refuse_tokens_without_an_embedding_row(
    short: tuple[Path, str], tmp_path: Path
) -> None:
    folder, message = short
    with pytest.raises(ModelError, match=message):
        export_model(ExportOptions(str(folder), str(tmp_path / "out")))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    with pytest.raises(ModelError, match=message):
        RewardModel(model, AutoTokenizer.from_pretrained(folder)).load()


def test_the_command_line_refuses_tokens_without_an_embedding_row(
    short: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, message = short
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    recipe = {
        "algorithm": "sft", "model": {"path": str(folder)}, "data": {"train": {"path": str(tmp_path / "rows.jsonl")}},
        "train": {"max_steps": 1, "per_device_train_batch_size": 2}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for command in ("check", "run"):
        assert main([command, str(tmp_path / "recipe.yaml")]) == 2
        printed = " ".join("".join(capsys.readouterr()).split())
        assert message in printed
        assert "Traceback" not in printed
