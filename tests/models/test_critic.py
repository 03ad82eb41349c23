"""Compare reward models and critics with transformers, and test saving and loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlqwen.config import RewardConfig
from rlqwen.errors import ModelError
from rlqwen.models.critic import HEAD_FILE, ScalarModel, ValueHead, scalar_peft_config
from rlqwen.models.loading import load_scalar_model
from rlqwen.packing.batch import Branch, Tree, pack
from tests.narrowing import present

TREES = [Tree([5, 6, 7], [Branch([8, 9]), Branch([10, 11, 12, 13])]), Tree([14, 15], [Branch([16])])]
SEQUENCES = [[5, 6, 7, 8, 9], [5, 6, 7, 10, 11, 12, 13], [14, 15, 16]]


@pytest.fixture(scope="module")
def scalar_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a sequence-classification model with a nonzero head."""
    torch.manual_seed(0)
    model, has_head = load_scalar_model(str(tiny_model_path), RewardConfig())
    assert not has_head
    model.config.pad_token_id = AutoTokenizer.from_pretrained(tiny_model_path).pad_token_id
    folder = tmp_path_factory.mktemp("scalar") / "model"
    model.save_pretrained(folder)
    return folder


def load(path: Path, **options: Any) -> ScalarModel:
    return ScalarModel(load_scalar_model(str(path), RewardConfig())[0], RewardConfig(), **options)


def test_scores_equal_those_of_transformers(scalar_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(scalar_path, num_labels=1)
    with torch.no_grad():
        plain = torch.cat([model(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
        packed = load(scalar_path).scores(pack(TREES))
    torch.testing.assert_close(packed, plain, atol=1e-6, rtol=0)


def test_the_value_of_a_token_is_read_from_the_token_before_it(scalar_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(scalar_path, num_labels=1)
    with torch.no_grad():
        hidden = model.model(torch.tensor([SEQUENCES[1]])).last_hidden_state
        plain = model.score(hidden)[
            0, 2:-1, 0
        ]  # at the prompt's last token and at each token of the completion except the last
        values = load(scalar_path).values(pack(TREES), torch.empty(0))
    torch.testing.assert_close(values[2:6], plain, atol=1e-6, rtol=0)


def test_an_existing_head_is_kept_and_a_new_one_can_start_at_zero(scalar_path: Path, tiny_model_path: Path) -> None:
    _, has_head = load_scalar_model(str(scalar_path), RewardConfig())
    assert has_head
    critic = load(tiny_model_path)
    critic.zero_head()
    with torch.no_grad():
        assert critic.scores(pack(TREES)).tolist() == [0.0, 0.0, 0.0]
    critic.scores(pack(TREES)).sum().backward()
    assert present(critic.base_model.get_parameter("score.weight").grad).abs().sum() > 0


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="scalar head"):
        load_scalar_model(str(tmp_path), RewardConfig())


def test_a_saved_model_is_restored_and_loads_in_transformers(scalar_path: Path, tmp_path: Path) -> None:
    model = load(scalar_path)
    with torch.no_grad():
        before = model.scores(pack(TREES))
        model.save(tmp_path / "saved")
        for parameter in model.trained_parameters:
            parameter.add_(0.1)
        assert not torch.allclose(model.scores(pack(TREES)), before)
        model.load_checkpoint(tmp_path / "saved")
        torch.testing.assert_close(model.scores(pack(TREES)), before)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert reloaded.config.num_labels == 1


def test_an_adapter_trains_the_full_head_and_is_merged_on_saving(scalar_path: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load(scalar_path, peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    names = [name for name, parameter in model.model.named_parameters() if parameter.requires_grad]
    assert any("score" in name for name in names)
    assert all("lora_" in name or "score" in name for name in names)
    with torch.no_grad():
        for parameter in model.trained_parameters:
            parameter.add_(torch.randn_like(parameter) * 0.05)
        adapted = model.scores(pack(TREES))
        model.save(tmp_path / "saved")
        merged = load(tmp_path / "saved").scores(pack(TREES))
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)


def test_the_adapter_config_of_the_policy_is_not_changed() -> None:
    given = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], task_type="CAUSAL_LM")
    made = scalar_peft_config(given)
    assert made.task_type == "SEQ_CLS"
    assert made.modules_to_save == ["embed_tokens", "score"]
    assert given.modules_to_save == ["lm_head", "embed_tokens"]
    assert scalar_peft_config(None) is None


@pytest.mark.parametrize("train_trunk", [True, False])
def test_a_value_head_reads_the_policys_hidden_states(tmp_path: Path, train_trunk: bool) -> None:
    head = ValueHead(4, train_trunk=train_trunk, device=torch.device("cpu"))
    batch, hidden = pack(TREES), torch.randn(3, 4, requires_grad=True)
    assert head.values(batch, hidden).tolist() == [0.0, 0.0, 0.0]
    with torch.no_grad():
        head.head.weight.fill_(0.5)
    values = head.values(batch, hidden)
    torch.testing.assert_close(values, hidden.sum(1) * 0.5)
    values.sum().backward()
    assert (hidden.grad is not None) == train_trunk
    assert head.head.weight.grad is not None
    head.save_checkpoint(tmp_path / "critic")
    assert load_file(tmp_path / "critic" / HEAD_FILE)["weight"].tolist() == [[0.5] * 4]
    other = ValueHead(4, train_trunk=True, device=torch.device("cpu"))
    other.load_checkpoint(tmp_path / "critic")
    torch.testing.assert_close(other.values(batch, hidden), values)
