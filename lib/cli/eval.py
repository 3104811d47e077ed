# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model on a text: nll, perplexity, bits per byte.

  treesurgeon eval --model=DIR --text=FILE [--json=FILE]

`nll` is the mean natural-log loss over predicted tokens; on a text within the context window it is
the number that transformers gives for labels=input_ids.
"""

import json
import pathlib

from absl import flags

from treesurgeon.cli import main
from treesurgeon.evaluate import perplexity
from treesurgeon.io import loading
from treesurgeon.io import tokenizer as tokenizers

KEYS = ("nll", "perplexity", "bits_per_byte", "tokens")


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags.

  Args:
    values: where to define them.
    argv: the command's arguments.
  """
  del argv
  flags.DEFINE_string("model", None, "Model directory.", flag_values=values)
  flags.DEFINE_string("text", None, "UTF-8 text file.", flag_values=values)
  flags.DEFINE_string("json", None, "File to write the numbers to.", flag_values=values)
  flags.DEFINE_integer(
    "window", None, "Tokens of context; default: the model's, at most 2048.", 2, flag_values=values
  )
  flags.DEFINE_integer(
    "stride", None, "Tokens the window moves by; default: half of it.", 1, flag_values=values
  )
  flags.DEFINE_integer("batch", 8, "Windows at a time.", 1, flag_values=values)


def run(values: flags.FlagValues, args: list[str]) -> None:
  """Evaluate and print.

  Args:
    values: parsed flags.
    args: positional arguments; none are taken.
  """
  if args:
    raise ValueError(f"eval takes no positional argument, not {args[0]!r}; use --model=DIR")
  main.required(values, "model", "text")
  text = main.read_text("--text", values.text)
  if values.json and not pathlib.Path(values.json).absolute().parent.is_dir():
    raise ValueError(f"--json={values.json}: there is no directory to put it in")
  model = loading.load(values.model)
  window = values.window or min(getattr(model.spec, "max_positions", None) or 2048, 2048)
  result = perplexity.evaluate(
    model,
    text,
    tokenizers.load(values.model),
    window=window,
    stride=values.stride or max(1, window // 2),
    batch=values.batch,
  )
  numbers = {k: getattr(result, k) for k in KEYS}
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(numbers, indent=2) + "\n")
  for key, value in numbers.items():
    print(f"{key:14} {value:,}" if isinstance(value, int) else f"{key:14} {value:.6g}")
