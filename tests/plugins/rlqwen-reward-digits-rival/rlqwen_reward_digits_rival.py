"""Register another reward named `digits`, from another package."""

from typing import Any


def num_digits(completions: list[str], **columns: Any) -> list[float]:
    """Count the digits in the completion."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float(sum(character.isdigit() for character in text)) for text in texts]
