"""Load chat templates, and convert their errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlqwen.errors import DataError, ModelError
from rlqwen.models.hub import split_revision
from rlqwen.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_chat_template(path: str) -> str:
    """Load a chat template from a Jinja file, or from the tokenizer of a model folder or hub id."""
    if Path(path).is_file():
        return Path(path).read_text("utf-8")
    if path.endswith((".jinja", ".jinja2")):
        raise ModelError(f"chat_template_path: there is no file {path}")
    from transformers import AutoTokenizer

    name, revision = split_revision(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"chat_template_path: {path} is neither a file nor a model with a tokenizer: {error}"
        ) from None
    return default_template(tokenizer)


def default_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the tokenizer's chat template; raise ModelError if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template, and the rows are "
            "conversations; set chat_template_path to a Jinja file or to a model whose template to use, "
            "or give prompts and completions as plain text"
        )
    return str(template)


@contextmanager
def refusals(messages: list[Message], where: str) -> Iterator[None]:
    """Raise DataError, with the row and the roles, for a conversation that a chat template refuses to write."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{where}: the chat template refuses this conversation (roles {roles}): {error}") from None
