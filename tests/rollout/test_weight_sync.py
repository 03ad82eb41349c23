"""Test which weights are put into the object store and which are refused; without Ray, `put` returns the chunk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlqwen.errors import WeightSyncError
from rlqwen.rollout import weight_sync as weights
from rlqwen.rollout.weight_sync import ExpectedWeights, WeightBundle, publish
from rlqwen.types import Canary

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def checkpoint(folder: Path, *, tied: bool, names: tuple[str, ...] = (EMBEDDING, NORM)) -> ExpectedWeights:
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    save_file({name: torch.zeros(6, 2) if name != NORM else torch.zeros(2) for name in names}, folder / "m.safetensors")
    return ExpectedWeights(str(folder))


def sent(expected: ExpectedWeights, names: tuple[str, ...], dtype: str = "float32") -> WeightBundle:
    stream = ((name, torch.full((6, 2) if name != NORM else (2,), 1.5)) for name in names)
    return publish(3, stream, None, dtype=dtype, expected=expected, put=list)


@pytest.mark.parametrize("names", [(EMBEDDING, NORM), (EMBEDDING, NORM, HEAD)])
def test_a_tied_head_is_sent_once(tmp_path: Path, names: tuple[str, ...]) -> None:
    bundle = sent(checkpoint(tmp_path, tied=True), names)
    assert bundle.aliases == {HEAD: EMBEDDING}
    assert [entry[0] for chunk in bundle.chunks for entry in chunk] == [EMBEDDING, NORM]
    assert bundle.num_bytes == 4 * (12 + 2)


def test_a_missing_untied_head_is_refused(tmp_path: Path) -> None:
    expected = checkpoint(tmp_path, tied=False, names=(EMBEDDING, NORM, HEAD))
    with pytest.raises(WeightSyncError, match=r"missing: lm_head\.weight"):
        sent(expected, (EMBEDDING, NORM))
    assert sent(expected, (EMBEDDING, NORM, HEAD)).aliases == {}


def test_without_a_checkpoint_the_first_sync_sets_the_names(tmp_path: Path) -> None:
    expected = ExpectedWeights(str(tmp_path))
    sent(expected, (EMBEDDING, NORM))
    with pytest.raises(WeightSyncError, match=r"missing: model\.norm\.weight"):
        sent(expected, (EMBEDDING,))


def test_bfloat16_is_sent_as_bits(tmp_path: Path) -> None:
    bundle = sent(checkpoint(tmp_path, tied=True), (EMBEDDING, NORM), dtype="bfloat16")
    name, array, dtype = bundle.chunks[0][1]
    assert (name, array.dtype, dtype) == (NORM, "int16", "torch.bfloat16")
    # 1.5 in bfloat16: sign 0, exponent 127, mantissa 1000000.
    assert array.tolist() == [0b0_01111111_1000000] * 2
    assert bundle.num_bytes == 2 * (12 + 2)


def test_weights_are_split_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", 40)
    bundle = sent(checkpoint(tmp_path, tied=True), (EMBEDDING, NORM))
    assert [[entry[0] for entry in chunk] for chunk in bundle.chunks] == [[EMBEDDING], [NORM]]


@pytest.mark.parametrize(("gap", "accepted"), [(0.1, True), (0.11, False), (float("nan"), False), (None, True)])
def test_the_weight_sync_check_accepts_small_gaps_only(gap: float | None, accepted: bool) -> None:
    bundle = WeightBundle(1, (), {}, Canary((1, 2), (-0.5,), tolerance=0.1), 0)
    assert bundle.accepts(gap) is accepted
