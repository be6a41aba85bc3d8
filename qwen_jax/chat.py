"""A prompt as a chat: rendered by the tokenizer's own template, with the library that templates are
written for (Jinja, in its sandbox, set up as transformers sets it up)."""

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_jax.weights.base import Weights
from stages.errors import UserError


def render(model: Weights, text: str) -> str:
    """``text`` as the user's first message, up to where the assistant's answer begins.

    Source: ``render_jinja_template`` of transformers.

    Raises:
        UserError: the model has no template, or one that cannot be rendered.
    """
    found = model.chat_template()
    if found is None:
        raise UserError(
            f"--chat: {model.name} has no chat template; give the prompt as the model reads it, "
            "without --chat"
        )
    template, special = found
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
    messages = [{"role": "user", "content": text}]
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=True, **special)
    except (TemplateError, TypeError) as error:
        raise UserError(f"--chat: {model.name}: its chat template fails: {error}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
