"""Test cleaning: which rows each step drops, the counts, and when the cache is used."""

import gzip
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import CleaningConfig, DataConfig, Recipe, SourceConfig
from rlqwen.config.recipe_yaml import load_recipe
from rlqwen.data import clean_rows, load_recipe_data, load_rows
from rlqwen.data.cleaning import CleanedRows, steps
from rlqwen.data.streams import StreamedRows
from rlqwen.errors import ConfigError, DataError
from rlqwen.preflight import check_recipe
from tests.narrowing import present

SAMPLES = Path(__file__).parents[1] / "samples"

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache folder for this test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RLQWEN_CACHE", str(folder))
    return folder / "data"


def chat(question: str, answer: str, system: str | None = None) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


def sum_row(left: int, right: int) -> Row:
    return {"prompt": f"{left} + {right} = ?", "solution": str(left + right)}


def clean(rows: Sequence[Row], eval_rows: Sequence[Row] | None = None, **config: Any) -> CleanedRows:
    return clean_rows(rows, CleaningConfig.parse(config), eval_rows)


def dropped(rows: Sequence[Row], eval_rows: Sequence[Row] | None = None, **config: Any) -> list[tuple[int, str, Any]]:
    """Return (row, reason, duplicated row) of all dropped rows."""
    report = clean(rows, eval_rows, **config).report
    return [(e["row"], e["reason"], e["duplicate_of"]["row"] if "duplicate_of" in e else None) for e in report.examples]


STORY = (
    "Once upon a time there was an old miller who had three sons, and nothing to leave them but his mill and a cat. "
    "The eldest took the mill, the second took the ass, and the youngest was left with the cat, which could not so much "
    "as carry a sack of flour for him."
)


# Filters


def test_length_bounds_apply_to_the_row_the_prompt_or_the_answer() -> None:
    rows = [chat("abc", "de"), {"prompt": "abcdef", "completion": "g"}, {"text": "abc"}, {"prompt": "ab"}]
    assert dropped(rows, min_chars=5) == [(2, "min_chars", None), (3, "min_chars", None)]
    assert dropped(rows, max_chars=5) == [(1, "max_chars", None)]
    assert dropped(rows, min_prompt_chars=4) == [(0, "min_prompt_chars", None), (3, "min_prompt_chars", None)]
    assert dropped(rows, max_prompt_chars=3) == [(1, "max_prompt_chars", None)]
    assert dropped(rows, min_answer_chars=2) == [(1, "min_answer_chars", None)]
    assert dropped(rows, max_answer_chars=1) == [(0, "max_answer_chars", None)]
    assert dropped([chat("a", "b", system="cdef")], min_prompt_chars=5, max_prompt_chars=5) == []


def test_both_answers_of_a_pair_must_be_within_the_bounds() -> None:
    pair = {"prompt": [{"role": "user", "content": "q"}], "chosen": "abcd", "rejected": "e"}
    as_turns = pair | {"rejected": [{"role": "assistant", "content": "e"}]}
    for row in (pair, as_turns):
        kept = pair | {"rejected": "efg"}
        assert dropped([row, kept], min_answer_chars=2) == [(0, "min_answer_chars", None)]
        assert dropped([row, {**row, "chosen": "abc"}], max_answer_chars=3) == [(0, "max_answer_chars", None)]


def test_only_the_last_assistant_turn_is_the_answer() -> None:
    row = {"messages": chat("q", "a long first answer")["messages"] + chat("r", "ok")["messages"]}
    assert dropped([row, chat("q", "three words here")], min_answer_chars=3) == [(0, "min_answer_chars", None)]
    assert dropped([row, chat("q", "x")], max_prompt_chars=19) == [(0, "max_prompt_chars", None)]


def test_patterns_drop_and_keep_by_name_and_part() -> None:
    rows = [chat("As an AI?", "Yes."), chat("Who?", "As an AI model, no."), chat("What?", "Click http://x")]
    refusal = {"name": "refusal", "pattern": r"(?i)\bas an ai\b"}
    link = {"name": "link", "pattern": "https?://", "part": "answer"}
    assert dropped(rows, drop_patterns=[refusal | {"part": "answer"}]) == [(1, "drop_patterns.refusal", None)]
    both = clean([*rows, chat("left", "over")], drop_patterns=[link, refusal])
    assert both.train == [chat("left", "over")]
    assert both.report.dropped == {"drop_patterns.refusal": 2, "drop_patterns.link": 1}
    kept = clean(rows, keep_patterns=[{"name": "question", "pattern": r"\?$", "part": "prompt"}, link])
    assert kept.train == rows[2:]
    assert kept.report.dropped == {"keep_patterns.link": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"drop_patterns": [{"name": "a", "pattern": "x"}, {"name": "b", "pattern": "(["}]},
            r"drop_patterns\.1\.pattern: not a regular expression: unterminated .*\(value given: '\(\['\)",
        ),
        ({"keep_patterns": [{"name": "a", "pattern": "x*"}]}, r"keep_patterns\.0\.pattern: matches the empty text"),
        ({"drop_patterns": [{"name": "a", "pattern": p} for p in "xy"]}, "drop_patterns: two patterns are named 'a'"),
        ({"min_chars": 5, "max_chars": 4}, "min_chars=5 is above max_chars=4"),
        ({"min_answer_chars": 5, "max_answer_chars": 4}, "min_answer_chars=5 is above max_answer_chars=4"),
        ({"mask": ["e-mail"]}, r"mask\.0: .*'email'.*\(value given: 'e-mail'\)"),
        ({"near_duplicates": {"treshold": 0.9}}, "near_duplicates: unknown key 'treshold'; did you mean 'threshold'"),
        ({"near_duplicates": {"threshold": 1.5}}, r"near_duplicates\.threshold: .*less than or equal to 1"),
        ({"exact_dups": True}, "unknown key 'exact_dups'; did you mean 'exact_duplicates'"),
    ],
)
def test_an_invalid_config_raises_an_error_with_its_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CleaningConfig.parse(config)


def test_overlap_without_eval_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"drop_eval_overlap: there is no data\.eval"):
        DataConfig.parse({"train": {"path": "x.jsonl"}, "cleaning": {"drop_eval_overlap": True}})


def test_near_duplicates_can_be_switched() -> None:
    assert present(CleaningConfig(near_duplicates=True).near_duplicates).threshold == 0.8
    assert CleaningConfig(near_duplicates=False).near_duplicates is None


def test_a_filter_that_applies_to_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_answer_chars looks at the answer, but none of the 1 rows has one"):
        clean([{"text": "abc"}], min_answer_chars=1)
    with pytest.raises(ConfigError, match=r"keep_patterns \(maths\) looks at the prompt"):
        clean([{"text": "abc"}], keep_patterns=[{"name": "maths", "pattern": "x", "part": "prompt"}])


def test_dropping_all_rows_raises_an_error_with_the_reasons() -> None:
    with pytest.raises(
        DataError, match=r"left none of 2 training rows: 1 by min_chars, 1 by drop_patterns\.b"
    ) as caught:
        clean([{"text": "ab"}, {"text": "abc"}], min_chars=3, drop_patterns=[{"name": "b", "pattern": "b"}])
    folder = Path(str(caught.value).rpartition(" ")[2])
    assert len((folder / "data_dropped.jsonl").read_text().splitlines()) == 2


# Duplicates


def test_exact_duplicates_equal_an_earlier_row_in_all_trained_columns() -> None:
    rows = [
        sum_row(1, 2) | {"id": 1},
        sum_row(1, 2) | {"id": 2},  # only the id differs
        sum_row(1, 2) | {"solution": "4"},  # another solution is another row
        sum_row(2, 1),
        {"solution": "3", "prompt": "1 + 2 = ?"},  # the order of columns does not matter
    ]
    assert dropped(rows, exact_duplicates=True) == [(1, "exact_duplicates", 0), (4, "exact_duplicates", 0)]
    labelled = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False, True)]
    assert dropped(labelled, exact_duplicates=True) == [(2, "exact_duplicates", 0)]
    with_system = [chat("q", "a", system="x"), chat("q", "a", system="y")]
    assert dropped(with_system, exact_duplicates=True) == []


def test_near_duplicates_are_reported_with_the_row_they_resemble() -> None:
    near = STORY.replace("old", "aged")
    rows = [{"text": "Something else entirely, of about the same length as the others are, with no part shared."}]
    rows += [{"text": STORY}, {"text": near}, {"text": STORY.upper() + " "}, {"text": STORY[:80]}]
    assert dropped(rows, near_duplicates=True) == [(2, "near_duplicates", 1), (3, "near_duplicates", 1)]
    assert dropped(rows, near_duplicates={"threshold": 1.0}) == [(3, "near_duplicates", 1)]


def test_system_prompts_do_not_affect_near_duplicates() -> None:
    system = STORY * 5
    rows = [chat("Name a colour.", "Green, I think.", system), chat("Sing a song!", "La la la.", system)]
    assert dropped(rows, near_duplicates=True) == []
    assert dropped([*rows, chat("Name a colour.", "Green, I think.", "Be kind.")], near_duplicates=True) == [
        (2, "near_duplicates", 0)
    ]


def test_sums_that_differ_by_a_digit_are_not_near_duplicates() -> None:
    rows = [
        {"prompt": f"{STORY} The mill grinds {n} sacks a day. How many in a week?", "solution": str(7 * n)}
        for n in (10, 11, 12)
    ]
    assert dropped(rows, near_duplicates=True) == []
    alike = [row | {"solution": "70"} for row in rows]
    assert dropped(alike, near_duplicates=True) == [(1, "near_duplicates", 0), (2, "near_duplicates", 0)]


def test_eval_overlap_compares_questions_and_near_matches_are_optional() -> None:
    train = [chat(STORY, "yes"), chat("q", "a"), {"text": "plain"}, chat("left", "over")]
    almost = chat(STORY.replace("old", "aged"), "An answer that is long enough to set this row apart from the first.")
    held_out = [chat("q", "another answer", system="s"), {"prompt": STORY, "solution": "x"}, {"text": "plain"}]
    exact = [(0, "drop_eval_overlap", 1), (1, "drop_eval_overlap", 0), (2, "drop_eval_overlap", 2)]
    assert dropped([*train, almost], held_out, drop_eval_overlap=True) == exact
    near = {"drop_eval_overlap": True, "near_duplicates": True}
    assert dropped([*train, almost], held_out, **near) == [*exact, (4, "drop_eval_overlap", 1)]


def test_steps_run_in_order_and_each_row_is_dropped_once() -> None:
    rows = [
        {"text": "a@b.com " + STORY},
        {"text": "c@d.com " + STORY},  # equal to the first as soon as both are masked
        {"text": "x" + STORY},
        {"text": "short"},
        {"text": "short"},
        {"text": "The eval data have this row as well, but for a word or two."},
    ]
    held_out = [{"text": "The eval data have this row as well, but for a word or so."}]
    config = {"mask": ["email"], "min_chars": 6, "exact_duplicates": True, "near_duplicates": True}
    cleaned = clean(rows, held_out, **config, drop_eval_overlap=True)
    assert cleaned.train == [{"text": "[EMAIL] " + STORY}]
    assert cleaned.report.dropped == {
        "min_chars": 2,
        "exact_duplicates": 1,
        "near_duplicates": 1,
        "drop_eval_overlap": 1,
    }
    assert cleaned.report.masked == {"train": {"email": 2}, "eval": {}}
    assert cleaned.report.summary() == (
        "1 of 6 rows kept; 2 dropped by min_chars; 1 dropped by exact_duplicates; 1 dropped by near_duplicates; "
        "1 dropped by drop_eval_overlap; 2 email masked in 2 train rows"
    )
    assert cleaned.report.warnings == ["cleaning dropped 83% of the training rows, most by min_chars"]


def test_eval_rows_are_masked_and_never_dropped() -> None:
    held_out = [{"text": "a@b.com"}, {"text": "a@b.com"}]
    cleaned = clean([{"text": "long enough"}], held_out, mask=["email"], exact_duplicates=True, min_chars=8)
    assert cleaned.eval == [{"text": "[EMAIL]"}] * 2
    assert cleaned.report.num_masked_rows == {"train": 0, "eval": 2}
    assert held_out[0] == {"text": "a@b.com"}


# Cache

ROWS: list[dict[str, Any]] = [{"text": f"{STORY} {i % 3} a@b.com"} for i in range(6)]
CONFIG: dict[str, Any] = {"mask": ["email"], "exact_duplicates": True}


def outcome_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("outcome.jsonl.gz"))


def test_a_second_run_reads_the_cache_and_runs_no_step(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = clean(ROWS, ROWS[:1], **CONFIG)
    (file,) = outcome_files(cache)
    content = file.read_bytes()
    monkeypatch.setattr(steps, "mask_text", None)  # calling it would be a TypeError
    second = clean(ROWS, ROWS[:1], **CONFIG)
    assert (first.report.from_cache, second.report.from_cache) == (False, True)
    assert (second.train, second.eval) == (first.train, first.eval)
    assert second.report.examples == first.report.examples
    assert second.report.summary() == first.report.summary() + " (from the cache)"
    assert file.read_bytes() == content
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == []


def test_rows_eval_rows_settings_and_code_are_part_of_the_cache_key(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean(ROWS, **CONFIG)
    changes: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]], ...] = (
        (ROWS[:5], None, CONFIG),
        ([*ROWS[:5], ROWS[5] | {"id": 1}], None, CONFIG),
        (ROWS[::-1], None, CONFIG),
        (ROWS, ROWS[:1], CONFIG),
        (ROWS, None, CONFIG | {"min_chars": 1}),
    )
    for rows, held_out, config in changes:
        assert not clean(rows, held_out, **config).report.from_cache
    monkeypatch.setattr("rlqwen.data.cleaning.cache._code_digest", lambda: "another version")
    assert not clean(ROWS, **CONFIG).report.from_cache
    assert len(outcome_files(cache)) == 7
    assert clean(ROWS, **CONFIG).report.from_cache


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "no gzip", "other entry", "edited"])
def test_a_damaged_cache_entry_is_detected_and_replaced(
    cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = clean(ROWS, **CONFIG)
    (file,) = outcome_files(cache)
    good = file.read_bytes()
    if damage == "bit":
        file.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    elif damage == "cut":
        file.write_bytes(good[:-9])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "no gzip":
        file.write_bytes(b"{}\n")
    elif damage == "other entry":
        clean(ROWS[:2], **CONFIG)
        (other,) = set(outcome_files(cache)) - {file}
        file.write_bytes(other.read_bytes())
    else:
        lines = gzip.decompress(good).splitlines(keepends=True)
        file.write_bytes(gzip.compress(b"".join(lines[:-1])))
    with caplog.at_level(logging.WARNING):
        again = clean(ROWS, **CONFIG)
    assert not again.report.from_cache
    assert "is damaged" in caplog.text
    assert again.train == first.train
    assert file.read_bytes() == good


def test_an_unwritable_cache_does_not_fail_cleaning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cleaned = clean(ROWS, **CONFIG, cache_dir=str(tmp_path / "file"))
    assert len(cleaned.train) == 3
    assert cleaned.report.folder is None
    assert "cannot be cached" in caplog.text


def test_the_cache_folder_of_the_config_overrides_the_environment(cache: Path, tmp_path: Path) -> None:
    clean(ROWS, **CONFIG, cache_dir=str(tmp_path))
    assert outcome_files(cache) == []
    assert len(outcome_files(tmp_path)) == 1


def test_values_that_json_lacks_are_cached_without_change() -> None:
    import datetime

    rows = [{"text": "a@b.com", "seen": datetime.date(2026, 1, 2), "raw": b"\xff"}]
    for _ in range(2):
        cleaned = clean(rows, **CONFIG)
        assert cleaned.train == [rows[0] | {"text": "[EMAIL]"}]
    assert cleaned.report.from_cache


def test_the_list_of_dropped_rows_is_masked_and_limited(tmp_path: Path) -> None:
    rows = [{"text": "a@b.com " + "x" * 1000}] * 1200
    report = clean(rows, **CONFIG).report
    report.write(tmp_path)
    lines = (tmp_path / "data_dropped.jsonl").read_text().splitlines()
    assert len(lines) == 1000
    first = json.loads(lines[0])
    assert first == {
        "row": 1,
        "reason": "exact_duplicates",
        "duplicate_of": {"data": "train", "row": 0},
        "text": "[EMAIL] " + "x" * 292 + "...",
    }
    counts = json.loads((tmp_path / "data_cleaning.json").read_text())
    assert (counts["num_rows"], counts["num_kept"], counts["dropped"]) == (1200, 1, {"exact_duplicates": 1199})
    assert counts["masked"] == {"train": {"rows": 1200, "replacements": {"email": 1200}}}


# Properties


def random_rows(rng: random.Random) -> list[Row]:
    """Generate rows of every format, with many duplicates and much to mask."""
    words = [
        "the",
        "mill",
        "and",
        "a",
        "cat",
        "磨坊",
        "主人",
        "a@b.com",
        "13812345678",
        "+8613912345678",
        "10.1.2.3",
        "12",
        "+",
        "=",
        "old",
        "-",
        ",",
        "1,200",
    ]
    rows: list[Row] = []
    for _ in range(60):
        if rows and rng.random() < 0.3:
            rows.append(json.loads(json.dumps(rng.choice(rows)).replace("cat", "dog")))
            continue
        question, answer = (" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(2))
        rows.append(
            rng.choice(
                [
                    chat(question, answer, system=rng.choice([None, "Be brief."])),
                    {"prompt": question, "completion": answer},
                    {"prompt": question, "chosen": answer, "rejected": "no " + answer},
                    {"text": question},
                    {"prompt": question, "solution": str(rng.randint(1, 3))},
                ]
            )
        )
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_clean_rows_are_not_changed(seed: int) -> None:
    rng = random.Random(seed)
    rows, held_out = random_rows(rng), random_rows(rng)[:10]
    config = {
        "mask": ["key", "email", "ip", "phone", "id_card", "credit_card"],
        "min_chars": 12,
        "max_answer_chars": 150,
        "drop_patterns": [{"name": "double", "pattern": "old old"}],
        "exact_duplicates": True,
        "near_duplicates": {"threshold": 0.6},
        "drop_eval_overlap": True,
    }
    once = clean(rows, held_out, **config)
    assert 0 < len(once.train) < len(rows)
    assert once.report.masked["train"]
    twice = clean(once.train, once.eval, **config)
    assert not twice.report.from_cache
    assert (twice.train, twice.eval) == (once.train, once.eval)
    assert twice.report.dropped == {}
    assert twice.report.masked == {"train": {}, "eval": {}}


@pytest.mark.parametrize("seed", range(3))
def test_the_first_duplicate_is_kept_and_the_order_is_unchanged(seed: int) -> None:
    rows = random_rows(random.Random(seed))
    cleaned = clean(rows, exact_duplicates=True, near_duplicates=True)
    numbers = [rows.index(row) for row in cleaned.train]
    assert numbers == sorted(set(numbers))
    assert cleaned.train[0] == rows[0]
    gone = {entry["row"] for entry in cleaned.report.examples}
    near = [entry["duplicate_of"]["row"] for entry in cleaned.report.examples if entry["reason"] == "near_duplicates"]
    assert near
    assert gone.isdisjoint(near)
    assert gone.isdisjoint(numbers)


# In a recipe


def recipe_over(folder: Path, model: Path, **train: Any) -> Recipe:
    rows = [chat(f"What is {i} + {i}?", f"{2 * i}, ask a@b.com") for i in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:5]]))
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    (folder / "recipe.yaml").write_text(
        f"""
algorithm: sft
model: {{path: {model}}}
data:
  train: {{path: {folder}/train.jsonl}}
  eval: {{path: {folder}/eval.jsonl}}
  cleaning:
    mask: [email]
    exact_duplicates: true
    drop_eval_overlap: true
    drop_patterns: [{{name: seven, pattern: '7 \\+ 7'}}]
train: {json.dumps({"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"} | train)}
output_dir: {folder}/run
"""
    )
    return load_recipe(folder / "recipe.yaml")


def test_check_and_run_use_the_same_cleaned_rows(tiny_model_path: Path, tmp_path: Path, cache: Path) -> None:
    from rlqwen.runs.pipeline import run_recipe
    from rlqwen.trainers.factory import build_trainer

    recipe = recipe_over(tmp_path, tiny_model_path, overwrite_output_dir=True)
    checked = check_recipe(recipe)
    assert checked.faults == []
    facts = dict(checked.facts)
    (file,) = outcome_files(cache)
    assert facts["cleaning"] == (
        "16 of 25 rows kept; 1 dropped by drop_patterns.seven; 5 dropped by exact_duplicates; "
        "3 dropped by drop_eval_overlap; 25 email masked in 25 train rows; 3 email masked in 3 eval rows; "
        f"listed in {file.parent}"
    )
    assert facts["data.train"].startswith("16 of 16 rows")
    assert "data.eval" in facts
    assert len(build_trainer(recipe).train_rows) == 16
    run_dir = run_recipe(recipe, print)
    counts = json.loads((run_dir / "data_cleaning.json").read_text())
    assert (counts["num_rows"], counts["num_kept"]) == (25, 16)
    reasons = [json.loads(line)["reason"] for line in (run_dir / "data_dropped.jsonl").read_text().splitlines()]
    assert len(reasons) == 9
    assert load_recipe(run_dir / "recipe.yaml") == recipe
    assert len(outcome_files(cache)) == 1


def test_overrides_reach_cleaning_keys_and_errors_have_their_path() -> None:
    overrides = ["data.cleaning.mask=[email]", "data.cleaning.near_duplicates=true", "data.cleaning.max_chars=90"]
    cleaning = load_recipe("quickstart_sft", overrides).data.cleaning
    assert cleaning == CleaningConfig(mask=["email"], near_duplicates={"threshold": 0.8}, max_chars=90)
    with pytest.raises(ConfigError, match=r"override 'data\.cleaning\.min_chars=0' of .*: data\.cleaning\.min_chars: "):
        load_recipe("quickstart_sft", ["data.cleaning.min_chars=0"])
    pattern = "data.cleaning.drop_patterns=[{name: a, pattern: '(['}]"
    with pytest.raises(ConfigError, match=r"data\.cleaning\.drop_patterns\.0\.pattern: not a regular expression"):
        load_recipe("quickstart_sft", [pattern])


@pytest.mark.parametrize(("name", "count"), [("instructions_zh.json", 2), ("pairs.json", 1)])
def test_repeated_rows_of_a_file_are_found(name: str, count: int) -> None:
    raw = json.loads((SAMPLES / name).read_text("utf-8"))
    assert len(raw) - len({json.dumps(row) for row in raw}) == count
    rows = load_rows(SourceConfig(path=str(SAMPLES / name)), seed=0)
    cleaned = clean(rows, rows[:3], exact_duplicates=True, near_duplicates=True, drop_eval_overlap=True)
    assert cleaned.report.dropped == {"exact_duplicates": count, "drop_eval_overlap": 3}


def test_without_a_cleaning_section_rows_are_not_changed(tiny_model_path: Path, tmp_path: Path, cache: Path) -> None:
    recipe = recipe_over(tmp_path, tiny_model_path)
    data = load_recipe_data(recipe.data.model_copy(update={"cleaning": None}))
    assert not isinstance(data.train, StreamedRows)
    assert (len(data.train), len(present(data.eval)), data.cleaning) == (25, 3, None)
    assert not cache.exists()


def test_check_reports_a_cleaning_error_once(tiny_model_path: Path, tmp_path: Path) -> None:
    recipe = recipe_over(tmp_path, tiny_model_path)
    present(recipe.data.cleaning).min_chars = 10_000
    report = check_recipe(recipe)
    assert [type(fault) for fault in report.faults] == [DataError]
    assert "left none of 25 training rows" in str(report.faults[0])
