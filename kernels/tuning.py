# SPDX-License-Identifier: Apache-2.0
"""Sizes of blocks that a search found, one file a device: `tuned/<device>.json`.

`experiments/tune_kernels.py` writes them. A file holds where its numbers are from and, by
operation and by case, the block that was best; what is not listed is chosen by rule.
"""

import functools
import json
import os
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).with_name("tuned")
VARIABLE = "TREESURGEON_TUNED"  # a folder whose files come before those that are shipped


def lookup(device: str, operation: str, case: str) -> tuple[int, ...] | None:
  """Find the block of a case.

  Args:
    device: name from `devices.DEVICES`.
    operation: "matmul".
    case: what `case_of` returned.

  Returns:
    Sizes of the block, or None where none was recorded.

  Example:
    >>> lookup("tpu-v5e", "matmul", "no such case") is None
    True
  """
  found = load(device).get(operation, {}).get(case)
  return None if found is None else tuple(found["block"])


def case_of(layout: str, bits: int, group_size: int, tokens: int, rows: int, cols: int) -> str:
  """Name a product; tokens count up to the next power of two.

  Args:
    layout: of the codes.
    bits: width of a code.
    group_size: rows of a group.
    tokens, rows, cols: of the product.

  Returns:
    The name.

  Example:
    >>> case_of("gs32", 4, 128, 10, 4096, 14336)
    'gs32 4 bits g128 m16 k4096 n14336'
  """
  bucket = 1 << max(tokens - 1, 0).bit_length()
  return f"{layout} {bits} bits g{min(group_size, rows)} m{bucket} k{rows} n{cols}"


def load(device: str) -> dict[str, Any]:
  """Read the file of a device, that of the folder in `VARIABLE` before the one that is shipped.

  Args:
    device: name from `devices.DEVICES`.

  Returns:
    What it holds; nothing if there is none.

  Raises:
    ValueError: if it is not what `tune_kernels` writes.

  Example:
    >>> load("abacus")
    {}
  """
  return _load(device, os.environ.get(VARIABLE, ""))


@functools.cache
def _load(device: str, first: str) -> dict[str, Any]:
  for folder in ([pathlib.Path(first)] if first else []) + [FOLDER]:
    path = folder / f"{device}.json"
    if not path.exists():
      continue
    try:
      found = json.loads(path.read_text())
      assert all(
        isinstance(size, int) and size > 0
        for cases in (v for k, v in found.items() if k != "source")
        for entry in cases.values()
        for size in entry["block"]
      )
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
      raise ValueError(
        f"{path} is not a file of block sizes, which experiments/tune_kernels.py writes"
      ) from error
    return found
  return {}
