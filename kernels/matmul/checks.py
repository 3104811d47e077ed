# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a quantized matrix: parts that disagree with its shape, scales not finite."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from treesurgeon.core import formats, leaves, packing
from treesurgeon.kernels.matmul import layouts, prepared

UNIT = layouts.GROUP
_PACKED = (leaves.QuantizedTensor, prepared.PreparedTensor)


def packed(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yield the quantized matrices of a tree and of the leaves that are composed of them.

  Args:
    tree: parameters, or one leaf.

  Yields:
    (place in the tree, QuantizedTensor or PreparedTensor).

  Example:
    >>> list(packed({"a": jnp.ones(2)}))
    []
  """
  found = jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, _PACKED))
  for path, node in found:
    if isinstance(node, _PACKED):
      yield (f" at {jax.tree_util.keystr(path)}" if path else ""), node


def disagreement(leaf: Any) -> str:
  """Say which part of a quantized matrix does not have the shape or dtype that it must have.

  It reads no values, so it costs nothing in a compiled program.

  Args:
    leaf: QuantizedTensor or PreparedTensor, of arrays, tracers or shapes.

  Returns:
    What is wrong and what is valid, or "".

  Example:
    >>> disagreement(leaves.QuantizedTensor(jnp.zeros((2, 8), jnp.uint8), jnp.ones((1, 8)), None,
    ...                                     None, rows=8, cols=8, bits=4, group_size=8))
    'codes have shape (2, 8), but 8 rows and 8 columns of 4 bits need (4, 8)'
  """
  if leaf.bits not in range(1, 9):
    return f"bits={leaf.bits}, but a code has 1 to 8"
  size = f"{leaf.rows} rows and {leaf.cols} columns of {leaf.bits} bits"
  if isinstance(leaf, prepared.PreparedTensor):
    shapes = _prepared_shapes(leaf)
    batch, size = tuple(leaf.codes.shape[:-2]), f"{size} for {leaf.target}"
  else:
    if leaf.codes.dtype != jnp.uint8:
      return f"codes have dtype {leaf.codes.dtype.name}, but they are packed in uint8"
    shapes, batch = _shapes(leaf), tuple(leaf.codes.shape[:-2])
  for name, shape in shapes.items():
    part = getattr(leaf, name)
    if part is not None and tuple(part.shape) != (*batch, *shape):
      return f"{name} have shape {tuple(part.shape)}, but {size} need {(*batch, *shape)}"
  index = getattr(leaf, "group_index", None)
  if index is not None and tuple(index.shape) != (*batch, 1, leaf.rows):
    need = (*batch, 1, leaf.rows)
    return f"group_index has shape {tuple(index.shape)}, but {size} need {need}"
  return ""


def not_finite(leaf: Any) -> str:
  """Say which scales or zero points are NaN or infinite, where values are known.

  Args:
    leaf: QuantizedTensor or PreparedTensor; of tracers and shapes nothing is said.

  Returns:
    What is wrong and what is valid, or "".

  Example:
    >>> not_finite(leaves.QuantizedTensor(jnp.zeros((4, 1), jnp.uint8), jnp.array([[jnp.nan]]),
    ...                                   None, None, rows=8, cols=1, bits=4, group_size=8))
    '1 of 1 scales are NaN or infinite; quantize it from finite weights'
  """
  for name in ("scales", "zeros"):
    for part in jax.tree.leaves(getattr(leaf, name)):
      known = hasattr(part, "__array__") and not isinstance(part, jax.core.Tracer)
      if not known or not jnp.issubdtype(part.dtype, jnp.floating):
        continue
      with jax.ensure_compile_time_eval():
        bad = int((~jnp.isfinite(jnp.asarray(part).astype(jnp.float32))).sum())
      if bad:
        return f"{bad} of {part.size} {name} are NaN or infinite; quantize it from finite weights"
  return ""


def _shapes(leaf: leaves.QuantizedTensor) -> dict[str, tuple[int, ...]]:
  if leaf.format == "ternary":
    stream = -(-leaf.rows // formats.TRITS)
  else:
    stream = packing.packed_rows(leaf.rows, leaf.bits)
  groups = -(-leaf.rows // leaf.group_size)
  if leaf.group_index is not None:  # names its groups, however many
    groups = leaf.scales.shape[-2]
  per_group = (groups, -(-leaf.cols // leaf.group_cols))
  return {"codes": (stream, leaf.cols), "scales": per_group, "zeros": per_group}


def _prepared_shapes(leaf: prepared.PreparedTensor) -> dict[str, tuple[int, ...]]:
  fields, rows = layouts.tile(leaf.layout, leaf.width)
  steps = -(-leaf.rows // (leaf.step * UNIT))
  cols = -(-leaf.cols // UNIT) * UNIT
  groups = -(-(leaf.step * UNIT // leaf.group_size) // 8) * 8
  per_group = (1, 1, cols) if leaf.group_size >= leaf.rows else (steps, groups, cols)
  return {
    "codes": (steps * leaf.step // fields * rows, cols),
    "scales": per_group,
    "zeros": per_group,
  }
