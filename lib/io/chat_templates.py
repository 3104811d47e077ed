# SPDX-License-Identifier: Apache-2.0
"""Chat templates by name, and the one that most of several models use.

The named templates render what mergekit's of the same name render under transformers, its quirks
included: `llama3` and `exaone` put line breaks and indentation between turns which the models'
own templates do not have, and `alpaca` no line break before the last heading.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_ALPACA = r"""
{%- set system = messages | selectattr('role', 'equalto', 'system') | list -%}
{{- (system[-1]['content'] | trim if system else '') + '\n\n' -}}
{%- set headings = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} -%}
{%- for message in messages -%}
  {%- if message['role'] in headings -%}
    {{- '### ' + headings[message['role']] + ':\n' + message['content'] | trim -}}
    {{- '' if loop.last else '\n\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
  {{- '### Response:\n' -}}
{%- endif -%}
"""
_CHATML = r"""
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
_EXAONE = r"""
{%- for message in messages -%}
  {{- '        [|system|][|endofturn|]\n\n' if loop.first and message['role'] != 'system' -}}
  {{- '    [|' + message['role'] + '|]' + message['content'] + '\n        ' -}}
  {{- ('' if message['role'] == 'user' else '[|endofturn|]') + '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '    [|assistant|]\n' -}}
{%- endif -%}
"""
_LLAMA3 = r"""
{%- for message in messages -%}
  {%- set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -%}
  {%- set turn = head + message['content'] | trim + '<|eot_id|>' -%}
  {{- (bos_token + turn if loop.first else turn) + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""
_MISTRAL = r"""
{%- set skip = 1 if messages[0]['role'] == 'system' else 0 -%}
{{- bos_token -}}
{%- for message in messages[skip:] -%}
  {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{- raise_exception('After an optional system message, user and assistant must alternate.') -}}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {{- ' ' + message['content'] + eos_token -}}
  {%- else -%}
    {%- set system = messages[0]['content'] + '\n\n' if skip and loop.first else '' -%}
    {{- ' [INST] ' + system + message['content'] + ' [/INST]' -}}
  {%- endif -%}
{%- endfor -%}
"""
TEMPLATES = {
  "alpaca": _ALPACA,
  "chatml": _CHATML,
  "exaone": _EXAONE,
  "llama3": _LLAMA3,
  "mistral": _MISTRAL,
}


def resolve(value: str, candidates: Iterable[str | None] = ()) -> str | None:
  """Turn what a configuration says into a template.

  Args:
    value: "auto", a name of `TEMPLATES`, or a Jinja template.
    candidates: the models' own templates, in order; None for a model without one.

  Returns:
    The template; None if "auto" finds none.

  Raises:
    ValueError: for what is neither a name nor a template.

  Example:
    >>> resolve("auto", ["{{ a }}", None, "{{ b }}", "{{ b }} "])
    '{{ b }}'
    >>> resolve("chatml") == TEMPLATES["chatml"].strip()
    True
  """
  if value == "auto":
    held = Counter(c.strip() for c in candidates if c and c.strip())
    return held.most_common(1)[0][0] if held else None
  if value in TEMPLATES:
    return TEMPLATES[value].strip()
  if "{" not in value or len(value) < 20:
    near = difflib.get_close_matches(value, TEMPLATES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: auto, {', '.join(TEMPLATES)}"
    raise ValueError(
      f"chat_template={value!r} is neither a known name nor a Jinja template; {hint}"
    )
  return value


def render(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  *,
  bos_token: str = "",
  eos_token: str = "",
) -> str:
  r"""Write a conversation out as a model reads it.

  Args:
    template: Jinja, run in a sandbox.
    messages: turns with "role" and "content".
    bos_token: what the template may call by that name.
    eos_token: likewise.

  Returns:
    The text, no prompt for a further turn at its end.

  Raises:
    ValueError: if the template is malformed, or refuses the conversation.

  Example:
    >>> render(resolve("chatml"), [{"role": "user", "content": "hi"}])
    '<|im_start|>user\nhi<|im_end|>\n'
  """
  import jinja2
  import jinja2.sandbox

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  room = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )
  room.filters["tojson"] = lambda x, **how: json.dumps(x, ensure_ascii=False, **how)
  given = {"bos_token": bos_token, "eos_token": eos_token, "raise_exception": refuse}
  try:
    return room.from_string(template).render(
      messages=messages, add_generation_prompt=False, **given
    )
  except (jinja2.TemplateError, TypeError, KeyError) as error:
    raise ValueError(f"the chat template refuses the messages: {error}") from error
