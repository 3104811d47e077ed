# SPDX-License-Identifier: Apache-2.0
"""Files of one or more merges, which may refer to each other by name."""

import pathlib
from collections.abc import Mapping, Sequence

import yaml

from treesurgeon.merge.mergekit import config as config_lib


def read(path: str | pathlib.Path) -> tuple[config_lib.Config, ...]:
  """Read a file of one or more merges, each a YAML document.

  Args:
    path: YAML file. Model paths in it are relative to the working directory.

  Returns:
    The merges in an order in which each comes after those it refers to, the output's last.

  Raises:
    ValueError: naming the file, the key, the value and what would be valid.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path} is not a file; expected a mergekit YAML configuration")
  try:
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
  except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"{path} is not YAML: {error}") from error
  try:
    return order([config_lib.parse(d) for d in documents if d is not None])
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def order(configs: Sequence[config_lib.Config]) -> tuple[config_lib.Config, ...]:
  """Put merges that refer to each other by name into an order in which they can be made.

  Args:
    configs: merges; at most one has no name, and it makes the output.

  Returns:
    The merges, dependencies first. Without an unnamed one the last document is the output.

  Raises:
    ValueError: for no merge, a name given twice, merges in a circle, or one that nothing uses.

  Example:
    >>> half = {"merge_method": "passthrough", "models": [{"model": "a"}], "name": "half"}
    >>> rest = {"merge_method": "passthrough", "models": [{"model": "half"}]}
    >>> [c.name for c in order([config_lib.parse(rest), config_lib.parse(half)])]
    ['half', None]
  """
  if not configs:
    raise ValueError("the file holds no merge; expected a mergekit configuration")
  named: dict[str | None, config_lib.Config] = {}
  for config in configs:
    if config.name in named:
      what = "merges without a name" if config.name is None else f"merges named {config.name!r}"
      raise ValueError(f"two {what}; each but the last one needs a 'name' of its own")
    named[config.name] = config
  last = named.get(None, configs[-1])
  done: list[config_lib.Config] = []
  _visit(last, named, done, ())
  unused = [str(c.name) for c in configs if c not in done]
  if unused:
    raise ValueError(f"the merge {unused[0]!r} is not used by any that leads to the output")
  return tuple(done)


def _visit(
  config: config_lib.Config,
  named: Mapping[str | None, config_lib.Config],
  done: list[config_lib.Config],
  trail: tuple,
) -> None:
  if config.name in trail:
    circle = " -> ".join(map(str, (*trail[trail.index(config.name) :], config.name)))
    raise ValueError(f"merges refer to each other in a circle: {circle}")
  for model in config.models():
    other = named.get(model.split("+")[0])
    if other is not None and other not in done:
      _visit(other, named, done, (*trail, config.name))
  if config not in done:
    done.append(config)
