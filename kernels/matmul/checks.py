# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a packed matrix: parts that disagree with its shape, scales not finite."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from treesurgeon.core import formats, leaves, packing
from treesurgeon.kernels.matmul import layouts, prepared

UNIT = layouts.GROUP
_PARTS = {leaves.SparseTensor: "values", leaves.GroupSparse: "kept", leaves.Codebook: "codebook"}
_PACKED = (leaves.QuantizedTensor, prepared.PreparedTensor, *_PARTS)


def packed(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yield the packed matrices of a tree and of the leaves that are composed of them.

  Args:
    tree: parameters, or one leaf.

  Yields:
    (place in the tree, a matrix whose parts `disagreement` knows).

  Example:
    >>> list(packed({"a": jnp.ones(2)}))
    []
  """
  found = jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, _PACKED))
  for path, node in found:
    if isinstance(node, _PACKED):
      place = f" at {jax.tree_util.keystr(path)}" if path else ""
      yield place, node
      if type(node) in _PARTS:
        inside = f"{place or ' at '}.{_PARTS[type(node)]}"
        yield from ((inside, part) for _, part in packed(getattr(node, _PARTS[type(node)])))


def disagreement(leaf: Any) -> str:
  """Say which part of a packed matrix does not have the shape or dtype that it must have.

  It reads no values, so it costs nothing in a compiled program.

  Args:
    leaf: what `packed` yields, of arrays, tracers or shapes.

  Returns:
    What is wrong and what is valid, or "".

  Example:
    >>> disagreement(leaves.QuantizedTensor(jnp.zeros((2, 8), jnp.uint8), jnp.ones((1, 8)), None,
    ...                                     None, rows=8, cols=8, bits=4, group_size=8))
    'codes have shape (2, 8), but 8 rows and 8 columns of 4 bits need (4, 8)'
  """
  if type(leaf) in _PARTS:
    return _unlike(leaf)
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
  """Say which scales or zero points are NaN or infinite, or places no places, where known.

  Args:
    leaf: what `packed` yields; of tracers and shapes nothing is said.

  Returns:
    What is wrong and what is valid, or "".

  Example:
    >>> not_finite(leaves.QuantizedTensor(jnp.zeros((4, 1), jnp.uint8), jnp.array([[jnp.nan]]),
    ...                                   None, None, rows=8, cols=1, bits=4, group_size=8))
    '1 of 1 scales are NaN or infinite; quantize it from finite weights'
  """
  for name in ("scales", "zeros"):
    for part in jax.tree.leaves(getattr(leaf, name, None)):
      known = hasattr(part, "__array__") and not isinstance(part, jax.core.Tracer)
      if not known or not jnp.issubdtype(part.dtype, jnp.floating):
        continue
      with jax.ensure_compile_time_eval():
        bad = int((~jnp.isfinite(jnp.asarray(part).astype(jnp.float32))).sum())
      if bad:
        return f"{bad} of {part.size} {name} are NaN or infinite; quantize it from finite weights"
  if isinstance(leaf, leaves.SparseTensor) and not isinstance(leaf.positions, jax.core.Tracer):
    return _out_of_order(leaf) if hasattr(leaf.positions, "__array__") else ""
  return ""


def _out_of_order(leaf: leaves.SparseTensor) -> str:
  """Look for runs in which a later weight does not stand below an earlier one."""
  kept, bits = leaf.rows // leaf.m * leaf.n, max(1, (leaf.m - 1).bit_length())
  with jax.ensure_compile_time_eval():
    place = packing.unpack(jnp.asarray(leaf.positions), bits=bits, rows=kept).astype(jnp.int32)
    runs = place.reshape(*leaf.batch, -1, leaf.n, leaf.cols)
    bad = int((jnp.diff(runs, axis=-2) <= 0).any(axis=-2).sum() + (place >= leaf.m).sum())
  return (
    f"{bad} runs of {leaf.m} rows have positions that do not rise below {leaf.m}" if bad else ""
  )


def _unlike(leaf: Any) -> str:
  """Compare the parts of a sparse or vector-quantized matrix with its shape."""
  batch = leaf.batch
  match leaf:
    case leaves.SparseTensor():
      if not 1 <= leaf.n <= leaf.m or leaf.rows % leaf.m:
        return f"{leaf.n}:{leaf.m} of {leaf.rows} rows; N is 1 to M, and M divides the rows"
      kept = leaf.rows // leaf.m * leaf.n
      bits = max(1, (leaf.m - 1).bit_length())
      size = f"{leaf.n}:{leaf.m} of {leaf.rows} rows and {leaf.cols} columns"
      shapes = {"values": (kept, leaf.cols)}
      shapes["positions"] = (packing.packed_rows(kept, bits), leaf.cols)
    case leaves.GroupSparse():
      size = f"{leaf.rows} rows in groups of {leaf.group} and {leaf.cols} columns"
      held = leaf.kept.shape[-2]
      if held % leaf.group:
        return f"kept has {held} rows, not a multiple of the {leaf.group} of a group"
      groups = -(-leaf.rows // leaf.group)
      shapes = {"mask": (packing.packed_rows(groups, 1), leaf.cols), "kept": (held, leaf.cols)}
    case _:
      size = f"{leaf.rows} rows and {leaf.cols} columns in vectors of {leaf.length} x {leaf.width}"
      down, across = -(-leaf.rows // leaf.length), -(-leaf.cols // leaf.width)
      shapes = {"codes": (packing.packed_rows(down, leaf.bits), across), "scales": (1, leaf.cols)}
      shapes["codebook"] = (leaf.codebook.shape[-2], leaf.length * leaf.width)
  for name, shape in shapes.items():
    part = getattr(leaf, name)
    if part is not None and tuple(part.shape) != (*batch, *shape):
      return f"{name} have shape {tuple(part.shape)}, but {size} need {(*batch, *shape)}"
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
  codes = (steps * leaf.step // fields * rows, cols)
  return {
    "codes": codes[::-1] if leaf.layout == "out_in" else codes,
    "scales": per_group,
    "zeros": per_group,
  }
