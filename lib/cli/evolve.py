# SPDX-License-Identifier: Apache-2.0
"""Search a method's numbers by evolution for the least loss on a text, and apply the best.

  treesurgeon evolve --model=DIR --out=DIR --transform="merge.ties(models=['A', 'B'])" \
    --bounds='{"lam": [0, 1], "weights": [[0, 1], [0, 1]]}' --text=FILE [--budget=100]

The start is what the transform spells, where it does, and else the middle of the bounds; it is
never lost. With --history=FILE a search that was broken off goes on.
"""

import functools
import json
import pathlib

from absl import flags

from treesurgeon import registry
from treesurgeon.cli import apply, main
from treesurgeon.core import model as model_lib
from treesurgeon.core import step
from treesurgeon.evaluate import perplexity
from treesurgeon.io import checkpoint, loading, staging
from treesurgeon.io import tokenizer as tokenizers
from treesurgeon.run import evolve


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags: those of `apply`, and the search's.

  Args:
    values: where to define them.
    argv: the command's arguments.
  """
  apply.define_transform(values, argv)
  flags.DEFINE_string(
    "bounds", None, "JSON: argument to [low, high], or to a list of these.", flag_values=values
  )
  flags.DEFINE_string("text", None, "UTF-8 text to do well on.", flag_values=values)
  flags.DEFINE_integer("budget", 100, "Candidates to try.", 1, flag_values=values)
  flags.DEFINE_string("history", None, "JSONL file of candidates.", flag_values=values)
  flags.DEFINE_integer("window", None, "Tokens of context for --text.", 2, flag_values=values)


def run(values: flags.FlagValues, args: list[str]) -> None:
  """Search, tell what was found, and write the model.

  Args:
    values: parsed flags.
    args: positional arguments; none are taken.
  """
  if args:
    raise ValueError(f"evolve takes no positional argument, not {args[0]!r}; use --model=DIR")
  main.required(values, "model", "out", "bounds", "text")
  staging.check_output(values.out, values.overwrite)
  if values.history and not pathlib.Path(values.history).absolute().parent.is_dir():
    raise ValueError(f"--history={values.history}: there is no directory to put it in")
  transform = apply.read_transform(values)
  if len(transform) != 1 or transform[0].info["name"] not in registry.TABLE:
    raise ValueError(f"evolve searches the numbers of one method, not of {step.spell(transform)}")
  info = transform[0].info
  try:
    bounds = dict(json.loads(values.bounds))
  except (ValueError, TypeError) as error:
    raise ValueError(f"--bounds={values.bounds} is not a JSON object: {error}") from error
  text = main.read_text("--text", values.text)
  source = checkpoint.Checkpoint(values.model)
  materials = apply.bring(values, source, transform)
  tokenizer = tokenizers.load(values.model)
  window = values.window or min(getattr(source.spec, "max_positions", None) or 2048, 2048)

  def nll(m: model_lib.Model) -> float:
    return perplexity.evaluate(m, text, tokenizer, window=window, stride=max(1, window // 2)).nll

  found = evolve.search(
    functools.partial(registry.load(info["name"]), **info["given"]),
    bounds,
    nll,
    loading.load(values.model),
    materials,
    budget=values.budget,
    start={k: v for k, v in info["given"].items() if k in bounds},
    seed=values.seed,
    history=values.history,
  )
  print(f"nll {found.values[0]:.6g} -> {found.value:.6g}: {step.spell(found.transform)}")
  apply.execute(values, found.transform, source, materials, driver=values.driver)
