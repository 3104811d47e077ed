# SPDX-License-Identifier: Apache-2.0
"""Rearrange quantized matrices for a device, once before a model runs, and back bit for bit."""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.core import formats, leaves, packing
from treesurgeon.core.leaves import base
from treesurgeon.kernels import devices
from treesurgeon.kernels.lut_matmul import transcoded
from treesurgeon.kernels.matmul import checks, fitting, layouts, prepared, values
from treesurgeon.kernels.sparse_matmul import groups
from treesurgeon.kernels.sparse_matmul import prepared as sparse

UNIT = layouts.GROUP
MOST_UNITS = 48  # that one step of the kernel unrolls: 32 are 4096 rows
# Composite leaves whose parts are multiplied by themselves.
_COMPOSITE = (
  leaves.Sum,
  leaves.LowRank,
  leaves.Rotated,
  leaves.SplitRows,
  leaves.ClusteredColumns,
)


def prepare(tree: Any, *, target: str | None = None) -> Any:
  """Arrange the quantized kernels of a tree as a device reads them.

  Leaves that no kernel takes stay as they are, and `matmul` multiplies by them in plain XLA; the
  log says why, once. Preparing again changes nothing; for another device it rearranges.

  Args:
    tree: parameters, or one leaf.
    target: name from `devices.DEVICES` or `devices.GPUS`; None is the device of this process, and
      what is not among them needs no preparation.

  Returns:
    The tree.

  Raises:
    ValueError: for an unknown target, for a quantized kernel whose parts do not have its shape,
      and for scales that are NaN or infinite; the message says at which place.

  Example:
    >>> leaf = leaves.QuantizedTensor(jnp.zeros((64, 8), jnp.uint8), jnp.ones((1, 8)), None, None,
    ...                               rows=128, cols=8, bits=4, group_size=128)
    >>> prepare(leaf, target="tpu-v6e").codes.dtype.name
    'int4'
  """
  for place, leaf in checks.packed(tree):
    wrong = checks.disagreement(leaf) or checks.not_finite(leaf)
    if wrong:
      raise ValueError(f"prepare: in the {type(leaf).__name__}{place} {wrong}")
  name = devices.here() if target is None else target
  if name is None:
    return tree
  if name not in devices.GPUS:
    devices.find(name)
  return _walk(tree, name)


def restore(tree: Any) -> Any:
  """Undo `prepare`, bit for bit where no two codes stand for one value: what files take.

  Args:
    tree: parameters, or one leaf.

  Returns:
    The tree with the leaves that files hold.

  Example:
    >>> restore(jnp.ones(2)).tolist()
    [1.0, 1.0]
  """
  is_prepared = lambda node: isinstance(node, prepared.Prepared)
  return jax.tree.map(lambda n: n.restore() if is_prepared(n) else n, tree, is_leaf=is_prepared)


def unsupported(leaf: Any, *, target: str | None = None) -> str:
  """Say why no kernel takes a leaf.

  Args:
    leaf: compressed leaf.
    target: name of a device; None asks for any TPU.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported(leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))))
    'it takes QuantizedTensor, not LowRank'
  """
  if not isinstance(leaf, leaves.QuantizedTensor):
    return f"it takes QuantizedTensor, not {type(leaf).__name__}"
  line = values.find(leaf.format, leaf.bits, target or "tpu-v5p")
  if line is None:
    return f"it has no codes for format {leaf.format!r}"
  if target not in devices.GPUS:
    return fitting.unsupported(leaf, line.width)
  if leaf.group_cols != 1 or base.is_leaf(leaf.scales) or base.is_leaf(leaf.zeros):
    return "it takes groups of rows with plain scales"
  if leaf.group_index is not None:
    return "it takes groups of consecutive rows, not a group_index"
  size = leaf.group_size
  if size < leaf.rows and size != 64 and size % UNIT:
    return f"on a GPU it takes groups of 64 or a multiple of {UNIT} rows, not {size}"
  if size < leaf.rows and size // UNIT > MOST_UNITS:
    return f"it takes groups of up to {MOST_UNITS * UNIT} rows or of all, not {size}"
  return ""


def arrangement(
  rows: int,
  width: int,
  group_size: int,
  target: str,
  *,
  inputs: str = "bfloat16",
  kind: str = "steps",
) -> tuple[str, int, int]:
  """Choose layout and step: few rows of filling, few steps.

  Args:
    rows: of the matrix.
    width: bits of a code.
    group_size: rows of a group.
    target: name of the device.
    inputs: dtype of the activations.
    kind: of the device's codes, see `values`.

  Returns:
    (layout, units of a step, steps).

  Example:
    >>> arrangement(4096, 4, 128, "tpu-v5e"), arrangement(14336, 2, 128, "tpu-v6e")
    (('gs32', 32, 1), ('gs32', 40, 3))
  """
  units = -(-rows // UNIT)
  whole = 1 if group_size >= rows else max(1, group_size // UNIT)
  if target in devices.GPUS:
    return "out_in", -(-units // whole) * whole, 1
  device = devices.find(target)
  if kind in values.FLOATS:
    layout = "gs32" if values.from_words(kind, target, inputs) else kind
  elif inputs == "int8":
    layout = "gs8" if width <= 4 else "native"
  elif kind == "table":
    layout = "gs32"
  else:
    layout = "gs32" if width in (1, 2, 3, 5) or width == 4 and not device.converts else "native"
  multiple = math.lcm(layouts.tile(layout, width)[0], whole)
  if multiple > MOST_UNITS:  # a long group and many codes to a word: as bytes it fits
    layout, multiple = "native", whole
  sizes = range(multiple, MOST_UNITS + 1, multiple)
  # A step costs about as much as four units, filling up the activations as much as six.
  step = min(sizes, key=lambda s: (-(-units // s) * (s + 4) + 6 * (units % s > 0), s))
  return layout, step, -(-units // step)


def _walk(node: Any, target: str) -> Any:
  if isinstance(node, prepared.Prepared):
    return node if node.target == target else _walk(node.restore(), target)
  if type(node) in _KINDS:
    refuse, arrange = _KINDS[type(node)]
    reason = refuse(node, target=target)
    if reason:
      _say(reason)
      return node
    return arrange(node, target)
  if isinstance(node, leaves.GroupSparse) or transcoded.takes(node):
    return _instead(node, target)
  if isinstance(node, leaves.ActivationQuantized):
    weight = node.weight
    if isinstance(weight, prepared.Prepared):
      weight = weight if weight.target == target else weight.restore()
    if not isinstance(weight, leaves.QuantizedTensor):
      return node
    reason = unsupported(weight, target=target)
    if reason:
      _say(reason)
      return node
    inputs = _inputs(node, weight, target)
    return dataclasses.replace(node, weight=_prepare(weight, target, inputs))
  if leaves.is_leaf(node) and not isinstance(node, _COMPOSITE):
    return node
  inner = lambda child: child is not node and leaves.is_leaf(child)
  return jax.tree.map(lambda c: _walk(c, target) if leaves.is_leaf(c) else c, node, is_leaf=inner)


def _instead(node: Any, target: str) -> Any:
  """Prepare integers that are multiplied by in a leaf's place."""
  is_groups = isinstance(node, leaves.GroupSparse)
  reason = groups.unsupported(node) if is_groups else ""
  if is_groups and not reason and not leaves.is_leaf(node.kept):
    reason = "it takes kept groups that are quantized, not an array"
  if reason:
    _say(reason)
    return node
  make = functools.partial(groups.spread if is_groups else transcoded.transcode, target=target)
  reason = unsupported(jax.eval_shape(make, node), target=target)
  if reason:
    _say(reason)
    return node
  weight = _prepare(make(node), target)
  if not is_groups:
    return transcoded.Transcoded(weight, node, target)
  kept = node.kept.rows // node.group
  return groups.PreparedGroups(weight, node.mask, node.rows, kept, node.group, target)


@functools.cache
def _say(reason: str) -> None:
  logging.getLogger(__name__).warning("some kernels stay in plain XLA: %s", reason)


def _inputs(node: leaves.ActivationQuantized, weight: leaves.QuantizedTensor, target: str) -> str:
  """Choose the dtype in which quantized inputs are multiplied: what they are, if it is faster."""
  if target not in devices.GPUS and fitting.scales_inputs(weight):
    return "bfloat16"
  if node.format == "int" and node.bits <= 8 and _multiplies_integers(weight, target):
    return "int8"
  if node.format == "e4m3fn" and target not in devices.GPUS:
    line = values.find(weight.format, weight.bits, target)
    if line is not None and line.kind == "e4m3fn":
      return "float8_e4m3fn"
  return "bfloat16"


@functools.partial(jax.jit, static_argnames=("target", "inputs"))
def _prepare(leaf: leaves.QuantizedTensor, target: str, inputs: str = "bfloat16") -> Any:
  line = values.find(leaf.format, leaf.bits, target, inputs)
  assert line is not None
  # What is stored in words alone, many rows to a word, is in short groups, so that steps can end.
  words = line.kind == "table" or values.from_words(line.kind, target, inputs)
  longest = UNIT if words else MOST_UNITS * UNIT
  if target in devices.GPUS or not fitting.needed(leaf, line.width, longest):
    return _arrange(leaf, target, inputs, line)
  plain, around = fitting.fit(leaf, width=line.width, longest=longest)
  return dataclasses.replace(around, matrix=_arrange(plain, target, inputs, line))


def _arrange(
  leaf: leaves.QuantizedTensor, target: str, inputs: str, line: values.Line
) -> prepared.PreparedTensor:
  width = line.width
  layout, step, steps = arrangement(
    leaf.rows, width, leaf.group_size, target, inputs=inputs, kind=line.kind
  )

  def codes_of(stream: jax.Array) -> jax.Array:
    if leaf.format == "ternary":
      codes = formats.unpack_trits(stream, rows=leaf.rows)
    else:
      codes = packing.unpack(stream, bits=leaf.bits, rows=leaf.rows)
    if line.codes is not None:
      codes = jnp.asarray(line.codes)[codes]
    codes = jnp.pad(codes, [(0, step * steps * UNIT - leaf.rows), (0, -leaf.cols % UNIT)])
    return layouts.encode(codes, layout=layout, bits=width, group_size=UNIT)

  def grouped(part: Any) -> Any:
    if part is None:
      return None
    # What kernels can load; uint8 and 8-bit floats are exact in bfloat16.
    exact = part.dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16"))
    part = part.astype(part.dtype if exact else _loadable(part.dtype))
    part = jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, -leaf.cols % UNIT)])
    if leaf.group_size >= leaf.rows:
      return part[..., None, :, :]
    groups = step * UNIT // leaf.group_size
    missing = steps * groups - part.shape[-2]
    part = jnp.pad(part, [(0, 0)] * (part.ndim - 2) + [(0, missing), (0, 0)])
    part = part.reshape(*part.shape[:-2], steps, groups, part.shape[-1])
    # Whole tiles of eight rows: others are copied before each product on some chips.
    return jnp.pad(part, [(0, 0)] * (part.ndim - 2) + [(0, -groups % 8), (0, 0)])

  zeros = "" if leaf.zeros is None else jnp.dtype(leaf.zeros.dtype).name
  return prepared.PreparedTensor(
    layouts.over_batch(codes_of, leaf.codes), grouped(leaf.scales), grouped(leaf.zeros),
    rows=leaf.rows, cols=leaf.cols, bits=leaf.bits, group_size=leaf.group_size, store=leaf.store,
    format=leaf.format, layout=layout, step=step, target=target,
    dtypes=(jnp.dtype(leaf.scales.dtype).name, zeros),
    inputs=inputs,
  )  # fmt: skip


def _multiplies_integers(leaf: leaves.QuantizedTensor, target: str) -> bool:
  """Tell whether a device has a kernel that multiplies a matrix by integers, and a faster one."""
  if target not in devices.GPUS:
    known = values.find(leaf.format, leaf.bits, target, "int8")
    return devices.find(target).integers and known is not None
  line = values.line(leaf.format, leaf.bits)
  assert line is not None
  return leaf.zeros is None and line.zero == 2 ** (line.width - 1)


def _loadable(dtype: Any) -> Any:
  return jnp.bfloat16 if jnp.dtype(dtype).itemsize == 1 else jnp.float32


# What is arranged by itself: why not, and how.
_KINDS: dict[type, tuple[Any, Any]] = {
  leaves.QuantizedTensor: (unsupported, _prepare),
  leaves.SparseTensor: (sparse.unsupported, sparse.prepare),
}
