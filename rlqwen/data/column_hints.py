"""Suggest column maps for rows whose columns have other names than ours."""

from typing import Any

Row = dict[str, Any]

QUESTIONS = ("question", "query", "problem", "instruction", "input", "inputs", "prompt", "post", "request")
ANSWERS = ("answer", "response", "output", "solution", "completion", "target", "outputs", "targets", "answers")
CONTEXTS = ("context", "input")
_SIDES = {
    "chosen": ("chosen_response", "response_chosen", "preferred", "accepted", "better", "good", "win", "winner"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred", "rejected_answer", "worse", "bad", "loser"),
}


def unmapped_question(row: Row) -> str | None:
    """Return the column that seems to hold the question and is not named `prompt`; None if there is none."""
    return next((name for name in QUESTIONS if name != "prompt" and isinstance(row.get(name), str)), None)


def conversation_map(row: Row) -> dict[str, str]:
    """Return a column map that makes a conversation of the row; empty if no question and answer are found."""
    question, answer = _find(row, QUESTIONS), _find(row, ANSWERS)
    if question is None or answer in (None, question):
        return {}
    context = next((name for name in CONTEXTS if name != question and isinstance(row.get(name), str)), None)
    found = {"instruction": question, "output": answer} | ({"input": context} if context else {})
    return _without_same(found)


def text_map(row: Row) -> dict[str, str]:
    """Return a column map that makes a prompt and a completion, as plain text, of the row."""
    question, answer = _find(row, QUESTIONS), _find(row, ANSWERS)
    return {} if question is None or answer in (None, question) else {"prompt": question, "completion": answer}


def prompt_map(row: Row) -> dict[str, str]:
    """Return a column map that makes a prompt of the row, with a solution if there is an answer."""
    question, answer = _find(row, QUESTIONS), _find(row, ANSWERS)
    found = {"prompt": question} if question else {}
    return _without_same(found | ({"solution": answer} if found and answer not in (None, question) else {}))


def pair_map(row: Row) -> dict[str, str]:
    """Return a column map that makes a pair of the row; empty unless both answers are found."""
    found = {ours: _find(row, (ours, *names)) for ours, names in _SIDES.items()}
    question = _find(row, QUESTIONS)
    if None in found.values():
        return {}
    named = ({"prompt": question} if question else {}) | {ours: theirs for ours, theirs in found.items() if theirs}
    return _without_same(named)


def suggest_mapping(row: Row, kind: str | None = None) -> str:
    """Suggest how to map the row's columns for `sft`, `prompts` or `preference`; None: suggest every map that is found."""
    suggestions = []
    if kind in (None, "sft"):
        suggestions.append(("SFT of conversations", conversation_map(row)))
        if kind:
            suggestions.append(("SFT of plain text, without the chat template", text_map(row)))
    if kind in (None, "prompts"):
        suggestions.append(("prompts for GRPO and PPO", prompt_map(row)))
    if kind in (None, "preference"):
        suggestions.append(("pairs", pair_map(row)))
    texts = [f"for {what}, {format_column_map(columns)}" for what, columns in suggestions if columns]
    return "map them; " + "; ".join(texts) if texts else "map them with columns: {ours: theirs}"


def suggest_answer_mapping(row: Row) -> str:
    """Suggest how to map the answer of a row that has a prompt."""
    answer = text_map(row).get("completion", "...")
    conversation = conversation_map(row)
    as_turns = f", or, to have the chat template write them, {format_column_map(conversation)}" if conversation else ""
    return (
        f"map one with {format_column_map({'completion': answer})}{as_turns if isinstance(row['prompt'], str) else ''}"
    )


def format_column_map(columns: dict[str, str]) -> str:
    """Format a column map in the syntax of recipes and of the command line."""
    recipe = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
    options = " ".join(f"--column {ours}={theirs}" for ours, theirs in columns.items())
    return f"columns: {{{recipe}}} ({options})"


def _find(row: Row, names: tuple[str, ...]) -> str | None:
    """Return the first name whose column holds text or a number."""
    return next((name for name in names if isinstance(row.get(name), str | int | float)), None)


def _without_same(columns: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}
