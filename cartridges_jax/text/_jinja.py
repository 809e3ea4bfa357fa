"""Jinja set up as Hugging Face's chat templates expect it.

The environment (options, extensions, filters and functions) is that of transformers'
`utils/chat_template_utils.py`. It is sandboxed: a template comes with a downloaded file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cartridges_jax.errors import UserError, one_line

# Templates that write today's date get the default date of Llama 3's templates: a cartridge must not follow
# another text tomorrow.
_TODAY = datetime(2024, 7, 26)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, which marks assistant text; here it only passes it on."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> Callable[..., str]:
    """A function from a chat template's variables to the rendered text.

    Raises:
      UserError: here if `source` is not valid Jinja; in the function if the template raises an error.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _TODAY.strftime
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template is not valid Jinja ({one_line(error)}); use another file") from error

    def run(**variables: Any) -> str:
        try:
            return template.render(tools=None, documents=None, **variables)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template refuses these messages: {one_line(error)}") from error

    return run


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
