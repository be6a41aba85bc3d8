"""Chats are rendered as transformers renders them."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from qwen_jax.chat import render
from qwen_jax.prompt import Prompt
from qwen_jax.weights import open_model
from stages.errors import UserError
from tests.tiny import write_checkpoint, write_json

# What published Qwen templates use: whitespace control, a namespace, a default system prompt,
# tests, a filter of their own, and loop controls.
TEMPLATE = """{%- set ns = namespace(first=true) %}
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not ns.first %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + (eos_token or '') + '\\n' }}
    {%- set ns.first = false %}
{%- endfor %}
{{ {"tools": [1, "é"]} | tojson }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "named"])
def test_a_chat_is_what_transformers_renders(model: Path, where: str) -> None:
    said = {"eos_token": {"content": "<|im_end|>"}}
    if where == "chat_template.jinja":
        (model / where).write_text(TEMPLATE, encoding="utf-8")
    else:
        named = [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        said["chat_template"] = named if where == "named" else TEMPLATE
    write_json(model / "tokenizer_config.json", said)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), eos_token="<|im_end|>"
    )
    messages = [{"role": "user", "content": "the cat <b>"}]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    opened = open_model(model)
    assert render(opened, "the cat <b>") == expected
    ids = Prompt(text="the cat", chat=True).read(opened)
    assert ids != Prompt(text="the cat").read(opened)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no users') }}", "its chat template fails: no users"),
        ("{% if %}", "its chat template fails"),
        ("{{ messages.append(1) }}", "its chat template fails"),  # the sandbox
        (None, "has no chat template"),
        ([{"name": "tool", "template": "x"}], "no chat template can be read"),
    ],
)
def test_a_chat_that_cannot_be_rendered(model: Path, template: object, says: str) -> None:
    content = {} if template is None else {"chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        render(open_model(model), "the cat")
