"""Sources of chat templates: a Hugging Face directory's files, or the built-in one."""

from __future__ import annotations

from pathlib import Path

from cartridges_jax.errors import UserError
from cartridges_jax.text.tokenizer import read_json

# For a model that was only pretrained: plain text in a shape that such models continue. The newline ends a
# turn, so an answer is one line long; a prompt that ended in a space would be split in a way that the model
# has seldom seen, so the space belongs to the answer.
PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token is defined else '' }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Answer: ' + message.content | trim + '\\n' }}"
    "{% else %}{{ 'Question: ' + message.content | trim + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)


def source_in_directory(path: Path) -> str | None:
    """The Jinja text of a Hugging Face directory, or None if it has no chat template.

    It is in chat_template.jinja, else in tokenizer_config.json, which may name several ("default" counts),
    else in chat_template.json.

    Raises:
      UserError: a file is damaged, or names several templates without a default.
    """
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read ({error}); fetch it again") from error
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (file := path / name).is_file():
            found = read_json(file).get("chat_template")
            if found is not None:
                return _default(file, found)
    return None


def _default(file: Path, found: object) -> str:
    if isinstance(found, list) and all(isinstance(item, dict) for item in found):
        found = {item.get("name"): item.get("template") for item in found}
    if isinstance(found, dict):
        names = ", ".join(map(str, found)) or "none"
        found = found.get("default")
        if found is None:
            raise UserError(f"{file}: has the chat templates {names}, but no 'default'; name one of them so")
    if not isinstance(found, str):
        raise UserError(f"{file}: chat_template is a {type(found).__name__}, not a text; fetch it again")
    return found
