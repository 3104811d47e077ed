# SPDX-License-Identifier: Apache-2.0
"""What a layout of another tool is to those who write and read directories."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Layout(NamedTuple):
  """How to write the compressed leaves of one model for another tool.

  Attributes:
    name: the value of --format.
    config: what config.json says of it.
    modules: names of the layers that are written compressed.
    encode: (layer, its leaf) -> tensors by name; raises ValueError for values that do not fit.
    notes: what a user must know to load the result, a sentence each.
    keys: under which names config.json says it.
  """

  name: str
  config: Mapping[str, Any]
  modules: tuple[str, ...]
  encode: Callable[[str, Any], dict[str, np.ndarray]]
  notes: tuple[str, ...]
  keys: tuple[str, ...] = ("quantization_config",)


class Held(NamedTuple):
  """A compressed layer found in another tool's directory.

  Attributes:
    tensors: part to tensor name.
    struct: the leaf, of shape structs.
    decode: arrays by part -> the leaf, of numpy arrays, with the structure of `struct`.
  """

  tensors: Mapping[str, str]
  struct: Any
  decode: Callable[[Mapping[str, np.ndarray]], Any]
