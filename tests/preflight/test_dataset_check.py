"""Test `rlqwen data check` and `rlqwen data show`: findings, output and exit codes."""

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlqwen.cli import main
from rlqwen.data.column_hints import suggest_mapping
from rlqwen.preflight.dataset import find_target, show_rows
from rlqwen.reporting.console import TerminalConsole

SAMPLES = Path(__file__).parents[1] / "samples"
LONG = "the quick brown fox jumps over the lazy dog and then runs home to its den in the old forest by the river"


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt} | {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))
    }


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a working directory; the command line's SIGTERM handler and environment must not outlive a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def write(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def check(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["data", "check", *words, "--json"]) == code
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["data", *words]) == code
    return capsys.readouterr().out


BLOCK = "<think>\n\n</think>\n\n"

# Check


def test_messages_tokens_and_lengths_of_conversations_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = check(capsys, write("rows.jsonl", [chat("1", "2"), chat("3", "44")]))
    (part,) = found["parts"]
    assert (found["kind"], found["model"], found["num_faults"]) == ("sft", "builtin:tiny-qwen3", 0)
    assert (part["sources"], part["num_rows"], part["turns"]) == (["rows.jsonl"], 2, {"user": 2, "assistant": 2})
    # <|im_start|> user \n 1 <|im_end|> \n <|im_start|> assistant \n, then an empty think block of four
    # tokens, the answer, <|im_end|> and a line break.
    assert part["tokens"]["lengths"] == {"p50": 16, "p90": 17, "p99": 17, "max": 17}
    assert (part["tokens"]["num_tokens"], part["tokens"]["num_loss_tokens"]) == (15 + 16, 6 + 7)
    assert (part["tokens"]["eos_in_loss"], part["fates"]) == (1.0, {})
    assert "almost one a byte: give --model" in found["warnings"][0]


def test_truncated_dropped_and_unended_rows_are_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat("1", "2"), chat("1", "2" * 9), {"messages": [{"role": "user", "content": "1"}]}, chat("1" * 20, "2")]
    found = check(capsys, write("rows.jsonl", rows), "--max-length", "18")
    (part,) = found["parts"]
    assert part["fates"] == {"truncated": ["line 2"], "no_end": ["line 2"], "empty_mask": ["line 3", "line 4"]}
    # 24 tokens cut to 18; 6 tokens of a question without an answer, and 35.
    assert (part["tokens"]["num_cut_tokens"], part["tokens"]["num_dropped_tokens"]) == (6, 6 + 35)
    text = printed(capsys, "check", "rows.jsonl", "--max-length", "18")
    assert "1 rows by 6 tokens" in text
    assert "2 rows of 41 tokens: 2 without a token in the loss" in text
    assert "dropped, no token in the loss: line 3, line 4" in text
    assert "'<|im_end|>' at the end of 50.0% of what is learned" in text


def test_rows_that_never_end_are_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [chat("1", "2" * 9)])
    text = printed(capsys, "check", "rows.jsonl", "--max-length", "18", code=2)
    assert "1 wrong" in text
    assert "no row has its end token '<|im_end|>' in the loss" in text


def test_all_faulty_pairs_are_named_and_the_others_are_still_checked(capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"chosen": chat("a", "1")["messages"], "rejected": chat("b", "2")["messages"]}
    rows = [pair("q", "1", "2"), pair("q", "1", "1"), odd, {"prompt": "q", "chosen": "1"}, pair("q", "1", "<|im_end|>")]
    found = check(capsys, write("rows.jsonl", rows), code=2)
    (part,) = found["parts"]
    assert (found["kind"], part["num_rows"], part["num_mismatches"], found["num_faults"]) == ("preference", 5, 1, 2)
    assert part["faults"][0].startswith("rows.jsonl, line 3: the prompts of 'chosen' and 'rejected' differ")
    assert part["faults"][1].startswith("rows.jsonl, line 4: no 'rejected' answer")
    assert part["fates"]["equal_sides"] == ["line 2"]
    assert part["tokens"]["num_kept"] == 2
    assert set(part["lengths"]) == {"prompt", "chosen", "rejected"}
    text = printed(capsys, "check", "rows.jsonl", code=2)
    assert "2 faulty, 1 of them answers to different prompts" in text
    assert "dropped pairs with equal answers, which teach nothing: line 2" in text


def test_a_broken_line_is_a_fault_and_mapped_columns_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [{"q": "a", "good": "1", "bad": "2"}])
    with Path("rows.jsonl").open("a") as file:
        file.write("{broken\n")
    columns = ["--column", "prompt=q", "--column", "chosen=good", "--column", "rejected=bad"]
    found = check(capsys, "rows.jsonl", *columns, code=2)
    assert found["parts"][0]["turns"] == {"text": 3}
    assert "line 2: not valid JSON" in found["parts"][0]["faults"][0]
    write("none.jsonl", ["text", "text"])
    assert main(["data", "check", "none.jsonl"]) == 2
    assert "a row must be a JSON object" in capsys.readouterr().err


def test_exact_and_near_duplicates_are_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    near = LONG.replace("river", "lake")
    rows = [chat(LONG, "1"), chat("x", "1"), chat(LONG, "1"), chat(near, "1"), chat("x", "2")]
    found = check(capsys, write("rows.jsonl", rows))
    (part,) = found["parts"]
    assert part["exact_duplicates"] == [["line 1", "line 3"]]
    assert part["near_duplicates"] == [["line 1", "line 4"]]
    text = printed(capsys, "check", "rows.jsonl")
    assert "near duplicates: line 1 = line 4" in text
    assert check(capsys, "rows.jsonl", "--near", "0.99")["parts"][0]["near_duplicates"] == []
    assert "near" not in printed(capsys, "check", "rows.jsonl", "--near", "0")


def test_overlap_compares_prompts_whatever_the_answers(capsys: pytest.CaptureFixture[str]) -> None:
    train = write("train.jsonl", [chat("a", "1"), chat(LONG, "2"), chat("b", "3")])
    held_out = write("eval.jsonl", [chat("new", "4"), chat("b", "other"), chat(LONG.replace("river", "lake"), "5")])
    found = check(capsys, train, "--eval", held_out)
    assert [part["name"] for part in found["parts"]] == ["train", "eval"]
    assert (found["exact_overlap"], found["near_overlap"]) == ([["line 2", "line 3"]], [["line 3", "line 2"]])
    text = printed(capsys, "check", train, "--eval", held_out)
    assert "exact: eval line 2 = train line 3" in text


@pytest.mark.parametrize(
    ("row", "kind", "turns"),
    [
        ({"text": "1"}, "sft", {"text": 1}),
        ({"prompt": "1", "completion": "2"}, "sft", {"text": 2}),
        ({"prompt": "1", "completion": "2", "label": "noun"}, "sft", {"text": 2}),
        ({"prompt": "1", "completion": "2", "label": False}, "labelled", {"text": 2}),
        ({"prompt": "1", "solution": "2"}, "prompts", {"text": 1}),
        ({"messages": [{"role": "user", "content": "1"}]}, "prompts", {"user": 1}),
        ({"chosen": "1 2", "rejected": "1 3"}, "preference", {"text": 3}),
    ],
)
def test_the_kind_is_guessed_from_the_rows(
    capsys: pytest.CaptureFixture[str], row: dict[str, Any], kind: str, turns: dict[str, int]
) -> None:
    found = check(capsys, write("rows.jsonl", [row]))
    assert (found["kind"], found["parts"][0]["turns"]) == (kind, turns)


def test_a_given_kind_overrides_the_guess(capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [pair("q", "1", "2")])
    assert check(capsys, "rows.jsonl", "--kind", "labelled")["parts"][0]["tokens"]["num_kept"] == 1
    found = check(capsys, "rows.jsonl", "--kind", "sft", code=2)
    assert found["parts"][0]["faults"][0].startswith("rows.jsonl, line 1: nothing to learn")


GSM8K = [{"question": f"What is {i} + {i}?", "answer": f"It is #### {2 * i}"} for i in range(40)]


def test_unmapped_columns_are_reported_with_the_map_to_paste_and_nothing_else_is_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = write("train.jsonl", GSM8K[:30]), "--eval", write("test.jsonl", GSM8K[30:])
    found = check(capsys, *files, code=2)
    assert (found["kind"], found["num_faults"], found["exact_overlap"]) == ("unmapped", 2, [])
    assert [part["sources"] for part in found["parts"]] == [["train.jsonl"], ["test.jsonl"]]
    for part in found["parts"]:
        assert "the columns question, answer are not mapped" in part["faults"][0]
        assert "columns: {instruction: question, output: answer} (--column instruction=question" in part["faults"][0]
        assert "columns: {prompt: question, solution: answer} (--column prompt=question" in part["faults"][0]
        assert (part["exact_duplicates"], part["near_duplicates"]) == ([], [])
    text = printed(capsys, "check", *files, code=2)
    assert text.startswith("train.jsonl: train, unmapped")
    assert "test.jsonl: eval, unmapped" in text
    assert "duplicates" not in text
    assert "are not mapped to any form of rows" in printed(capsys, "show", "train.jsonl", code=2)


@pytest.mark.parametrize(
    ("columns", "kind", "turns"),
    [
        (["instruction=question", "output=answer"], "sft", {"user": 30, "assistant": 30}),
        (["prompt=question", "solution=answer"], "prompts", {"text": 30}),
    ],
)
def test_the_suggested_column_map_works(
    capsys: pytest.CaptureFixture[str], columns: list[str], kind: str, turns: dict[str, int]
) -> None:
    files = write("train.jsonl", GSM8K[:30]), "--eval", write("test.jsonl", GSM8K[30:])
    found = check(capsys, *files, *(word for column in columns for word in ("--column", column)))
    assert (found["kind"], found["parts"][0]["turns"], found["num_faults"]) == (kind, turns, 0)
    assert (found["exact_overlap"], found["near_overlap"]) == ([], [])


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"instruction": "i", "context": "c", "response": "r", "category": "x"}, "{output: response, input: context}"),
        (
            {"id": "1", "system_prompt": "s", "question": "q", "response": "r"},
            "{instruction: question, output: response}",
        ),
        ({"source": "s", "problem": "p", "solution": "s"}, "{instruction: problem, output: solution}"),
        ({"input": "i", "output": "o"}, "{instruction: input}"),
        ({"id": "1", "context": "c", "question": "q", "answers": {"text": ["a"]}}, "{prompt: question}"),
        (
            {"question": "q", "chosen_response": "a", "rejected_response": "b"},
            "{prompt: question, chosen: chosen_response",
        ),
        ({"a": 1, "b": 2}, "columns: {ours: theirs}"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_a_column_map_is_suggested_for_well_known_data(row: dict[str, Any], mapping: str) -> None:
    assert mapping in suggest_mapping(row)


def test_rows_with_the_same_fault_are_one_line_and_not_duplicates(capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [{"prompt": f"{i}"} for i in range(30)] + [{"prompt": "1", "completion": "2"}] * 9)
    found = check(capsys, "rows.jsonl", "--kind", "sft", code=2)
    (part,) = found["parts"]
    assert (found["num_faults"], len(part["exact_duplicates"]), part["near_duplicates"]) == (30, 1, [])
    text = " ".join(printed(capsys, "check", "rows.jsonl", "--kind", "sft", code=2).split())
    assert "rows.jsonl, line 1, line 2, line 3, line 4, line 5 and 25 more (30 rows): nothing to learn" in text
    assert "line 31 = line 32 = line 33 = line 34 = line 35 and 4 more" in text


def test_files_of_a_folder_are_named_so_that_they_differ(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/train.jsonl", "b/train.jsonl"):
        Path(name).parent.mkdir()
        write(name, [{"prompt": "1"}])
    assert check(capsys, ".")["parts"][0]["exact_duplicates"] == [["a/train.jsonl, line 1", "b/train.jsonl, line 1"]]


def test_a_folder_with_only_a_tokenizer_is_enough_for_data_check(capsys: pytest.CaptureFixture[str]) -> None:
    from rlqwen.models.tiny import build_tokenizer

    build_tokenizer().save_pretrained("tokenizer")
    found = check(capsys, write("rows.jsonl", [chat("1", "2")]), "--model", "tokenizer")
    assert (found["model"], found["warnings"], found["parts"][0]["tokens"]["num_kept"]) == ("tokenizer", [], 1)


RECIPE = """\
algorithm: {algorithm}
model: {{path: {model}}}
data: {{train: {{path: train.jsonl}}, eval: {{path: eval.jsonl}}{cleaning}}}
train: {{max_length: 18}}
output_dir: runs/x
"""


def test_a_recipe_sets_model_masks_and_lengths_and_its_cleaning_runs_first(capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", [chat("1", "2" * 9), chat("1", "3"), chat("1", "3")])
    write("eval.jsonl", [chat("1", "4")])
    Path("x.yaml").write_text(RECIPE.format(algorithm="sft", model="builtin:tiny-qwen3", cleaning=""))
    found = check(capsys, "x.yaml")
    assert (found["warnings"], found["cleaning"]) == ([], None)
    assert found["parts"][0]["fates"]["truncated"] == ["line 1"]
    assert found["parts"][0]["exact_duplicates"] == [["line 2", "line 3"]]
    Path("x.yaml").write_text(
        RECIPE.format(algorithm="sft", model="./yet/to/train", cleaning=", cleaning: {exact_duplicates: true}")
    )
    found = check(capsys, "x.yaml")
    assert "./yet/to/train' cannot be read" in found["warnings"][0]
    assert "1 dropped by exact_duplicates" in found["cleaning"]
    assert (found["parts"][0]["tokens"]["num_rows"], found["parts"][0]["exact_duplicates"]) == (2, [])


@pytest.mark.parametrize("algorithm", ["dpo", "reward"])
def test_preference_recipes_are_checked_with_their_own_truncation(
    capsys: pytest.CaptureFixture[str], algorithm: str
) -> None:
    write("train.jsonl", [pair("1", "2", "3"), pair("1", "2", "3" * 20)])
    write("eval.jsonl", [pair("2", "2", "3")])
    recipe = RECIPE.format(algorithm=algorithm, model="builtin:tiny-qwen3", cleaning="")
    # A reward model reads the last line break too: 16 tokens.
    Path("x.yaml").write_text(recipe.replace("max_length: 18", "max_length: 16"))
    found = check(capsys, "x.yaml")
    assert found["kind"] == "preference"
    fate = {"dpo": {"truncated": ["line 2"], "no_end": ["line 2"]}, "reward": {"overlong": ["line 2"]}}
    assert found["parts"][0]["fates"] == fate[algorithm]


def test_a_packaged_recipe_of_prompts_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    found = check(capsys, "quickstart_grpo", "--near", "0")
    assert (found["kind"], found["exact_overlap"]) == ("prompts", [])
    assert found["parts"][1]["turns"] == {"user": found["parts"][1]["num_rows"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "missing.jsonl"], "there is no file or folder missing.jsonl"),
        (["check", "missing.yaml"], "neither a file nor a packaged recipe"),
        (["check", "quickstart_sft", "--column", "a=b"], "is a recipe, which says itself how its data is read"),
        (["check", "rows.jsonl", "--column", "prompt"], "not of the form ours=theirs"),
        (["check", "rows.jsonl", "--column", "prompt=nothing"], "columns maps 'prompt' to 'nothing'"),
        (["show", "rows.jsonl", "--row", "7"], "there is no row 7 in train"),
        (["show", "rows.jsonl", "--part", "eval"], "has no eval data"),
        (["show", "rows.jsonl", "--kind", "dpo"], "Invalid value for '--kind'"),
    ],
)
def test_wrong_arguments_end_with_exit_code_2_and_one_message(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    write("rows.jsonl", [chat("1", "2")])
    assert main(["data", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_pairs_of_whole_conversations_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    (part,) = check(capsys, str(SAMPLES / "pairs.json"))["parts"]
    assert part["turns"] == {"assistant": 30, "user": 17, "system": 2}
    assert (part["num_rows"], part["tokens"]["num_kept"], part["tokens"]["eos_in_loss"]) == (13, 13, 1.0)
    assert part["exact_duplicates"] == [["row 7", "row 12"]]


# Show


def test_show_marks_tokens_in_the_loss_with_brackets_and_keeps_special_tokens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("rows.jsonl", [chat("hé 世界", "é"), chat("1", "2")])
    text = printed(capsys, "show", "rows.jsonl", "-n", "1")
    assert text == (
        "row 0, sft  rows.jsonl, line 1\n"
        "-- row: 25 tokens, 7 in the loss\n"
        "<|im_start|>user\nhé 世界<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\né<|im_end|>⟧\n\n"
    )
    assert "row 1, sft  rows.jsonl, line 2" in printed(capsys, "show", "rows.jsonl", "--row", "1")


def test_color_replaces_brackets() -> None:
    write("rows.jsonl", [chat("1", "2")])
    screen = io.StringIO()
    console = TerminalConsole(file=screen, force_terminal=True, color_system="standard", _environ={})
    assert show_rows(find_target("rows.jsonl"), "train", range(1), console)
    text = screen.getvalue()
    assert "\x1b[32m2\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in text
    assert "\x1b[1;2m<|im_start|>\x1b[0m" in text
    assert "⟦" not in text


def test_show_splits_pairs_prompts_and_labeled_rows_into_segments(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "show", write("rows.jsonl", [pair("q", "1", "2"), pair("q", "1", "1")]))
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    sides = ("chosen", "1"), ("rejected", "2")
    shown = "".join(f"-- {name}: 6 tokens, 6 in the loss\n⟦{BLOCK}{answer}<|im_end|>⟧\n" for name, answer in sides)
    assert text.startswith(f"row 0, preference  rows.jsonl, line 1\n-- prompt: 9 tokens\n{prompt}\n{shown}\n")
    assert text.endswith("row 1, preference, left out, both answers are equal  rows.jsonl, line 2\n\n")
    text = printed(capsys, "show", "rows.jsonl", "--kind", "labelled", "-n", "1")
    assert text.count("-- prompt") == 1
    assert "-- good: 6 tokens" in text
    assert "-- bad: 6 tokens" in text
    text = printed(capsys, "show", write("prompts.jsonl", [{"prompt": [{"role": "user", "content": "q"}]}]))
    assert text.endswith(f"-- prompt: 9 tokens\n{prompt}\n\n")


def test_show_prints_the_fault_of_a_faulty_row(capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [pair("q", "1", "2"), {"prompt": "q", "chosen": "1", "rejected": 3}, {"prompt": "q"}])
    text = printed(capsys, "show", "rows.jsonl", code=2)
    assert "wrong  rows.jsonl, line 2: column 'rejected' must be a list of messages, not 3" in text
    assert "row 2, preference  rows.jsonl, line 3\nwrong  no 'chosen' answer" in text


def test_show_prints_what_is_left_of_a_truncated_row(capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [chat("1", "2" * 9)])
    text = printed(capsys, "show", "rows.jsonl", "--max-length", "15")
    assert text.startswith("row 0, sft, cut to length")
    assert text.endswith(f"assistant\n⟦{BLOCK}22⟧\n\n")
