"""Test the catalogue of GPUs and the names of published models."""

import pytest

from rlqwen.errors import ConfigError
from rlqwen.planning.gpus import GPUS, Cluster
from rlqwen.planning.published_models import find_published, nearest_published, published_config, published_names
from tests.narrowing import present


@pytest.mark.parametrize(
    ("text", "shown"),
    [("16xH100-80G", "16xH100-80G"), ("h100", "1xH100-80G"), ("8 x a100", "8xA100-80G"), ("1024xH200-141GB", "1024xH200-141G")],
)  # fmt: skip
def test_a_cluster_is_read_as_it_is_written(text: str, shown: str) -> None:
    assert str(Cluster.parse(text)) == shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xH300", "no such GPU; did you mean H[128]00"),
        ("12xH100", "12 GPUs are not 1 to 8, nor whole nodes of 8"),
        ("2048xH100", "up to 1024 GPUs"),
        ("0xH100", "0 GPUs are not"),
        ("", "no such GPU"),
    ],
)
def test_what_is_no_cluster_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Cluster.parse(text)


def test_links_are_those_of_a_node_or_between_nodes() -> None:
    cluster = Cluster.parse("16xH100")
    assert cluster.nodes == 2
    assert cluster.link(8) == 450e9
    assert cluster.link(8, stride=2) == cluster.link(16) == 50e9
    assert Cluster.parse("L40S").link(2) == 32e9
    assert all(gpu.flops / gpu.bandwidth < 450 and gpu.network <= gpu.link for gpu in GPUS.values())


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B"),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "Qwen2.5-7B"),
        ("qwen3-0.6b", "Qwen3-0.6B"),
        ("Qwen/Qwen3.5-397B-A17B", "Qwen3.5-397B-A17B"),
        ("somebody/Qwen3-8B", None),
        ("Qwen/Qwen3-5B", None),
    ],
)
def test_published_models_are_found_by_name(name: str, known: str | None) -> None:
    assert find_published(name) == known


def test_a_config_comes_with_the_context_of_its_release() -> None:
    contexts = [
        present(published_config(f"Qwen/{name}")).max_position_embeddings
        for name in ("Qwen3-4B", "Qwen3-4B-Thinking-2507")
    ]
    assert contexts == [40_960, 262_144]
    assert published_config("somebody/model") is None
    assert nearest_published("Qwen/Qwen3-8C") == "Qwen3-8B"
    assert published_names()[:2] == ["Qwen2.5-0.5B", "Qwen2.5-1.5B"]
