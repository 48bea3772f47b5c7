"""Chat templates as the families of small models have them, in words of their own, and jinja2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2

TOKENS = {"bos_token": "<s>", "eos_token": "<|eot|>"}
DAY = "%d %b %Y"

# Qwen, SmolLM: the tools end the system's turn, one a line; calls and results between tags.
TAGS = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content }}
    {%- else %}{{- 'Be helpful.' }}{%- endif %}
    {{- '\n\nYou may call these functions:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools>\nA call is {"name": ..., "arguments": ...} in <tool_call></tool_call>.' }}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# Llama 3: the day, texts stripped, tools in the user's first turn with an indent, one call alone.
HEADERS = r"""
{{- bos_token }}
{%- set first = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- set messages = messages[1:] if messages[0].role == 'system' else messages %}
{{- '<|header|>system<|end|>\n\n' }}
{%- if tools is not none %}{{- 'Environment: tools\n' }}{%- endif %}
{{- 'Today: ' + strftime_now('%d %b %Y') + '\n\n' + first + '<|eot|>' }}
{%- if tools is not none %}
    {%- if not messages %}{{- raise_exception('no message of the user') }}{%- endif %}
    {{- '<|header|>user<|end|>\n\nAnswer with {"name": ..., "parameters": ...}.\n\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}
    {{- messages[0].content | trim + '<|eot|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|header|>assistant<|end|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}<|eot|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|header|>ipython<|end|>\n\n' }}{{- message.content | tojson }}{{- '<|eot|>' }}
    {%- else %}
        {{- '<|header|>' + message.role + '<|end|>\n\n' + message.content | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|end|>\n\n' }}{%- endif %}
"""

# Phi-4-mini's kind: the functions alone, in one list; a call is the function as JSON.
LIST = r"""
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{- '<|result|>' + message.content | tojson + '<|end|>' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content }}
        {%- if loop.first and tools %}
            {%- if message.role != 'system' %}{{- raise_exception('no system') }}{%- endif %}
            {{- '<|tools|>[' }}
            {%- for tool in tools %}
                {{- tool.function | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
            {%- endfor %}
            {{- ']' }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '<|call|>' + call.function | tojson + '<|/call|>' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>' }}
"""

FAMILIES = {"tags": TAGS, "headers": HEADERS, "list": LIST}


@cache
def _template(source: str) -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    return environment.from_string(source)


def rendered(
    source: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    day: str = "01 Jan 2031",
) -> str | None:
    """What jinja2 writes, with the filters and functions that transformers gives to it."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def today(form: str) -> str:
        assert form == DAY
        return day

    try:
        return _template(source).render(
            messages=messages, tools=list(tools) or None, add_generation_prompt=True,
            raise_exception=refuse, strftime_now=today, **TOKENS,
        )  # fmt: skip
    except jinja2.TemplateError:
        return None
