# SPDX-License-Identifier: Apache-2.0
"""`matmul(x, leaf)`: one call for every kind of leaf.

The choice of an implementation is static: it depends on the platform, shapes and the leaf's
format, never on values. A new backend adds one row to `IMPLEMENTATIONS`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from treesurgeon.core import leaves
from treesurgeon.kernels import devices
from treesurgeon.kernels.hadamard import api as hadamard
from treesurgeon.kernels.lut_matmul import xla as lut_xla
from treesurgeon.kernels.matmul import (
  checks,
  fitted,
  gpu,
  prepared,
  reference,
  sliced,
  stacked,
  tpu,
  xla,
)
from treesurgeon.kernels.sparse_matmul import prepared as sparse_prepared
from treesurgeon.kernels.sparse_matmul import tpu as sparse_tpu


class Implementation(NamedTuple):
  """One way to multiply by compressed leaves.

  Attributes:
    matmul: (x, leaf) -> product in float32.
    unsupported: (x, leaf) -> why it cannot, or "".
    platforms: where it is chosen by default; elsewhere only on request.
    slow: (x, leaf) -> why it is not chosen there either, or "".
  """

  matmul: Callable[[jax.Array, Any], jax.Array]
  unsupported: Callable[[jax.Array, Any], str]
  platforms: tuple[str, ...]
  slow: Callable[[jax.Array, Any], str] = lambda x, leaf: ""


# Kernels of TPUs, by what `arrange.prepare` returns.
_KERNELS: dict[type, Any] = {
  prepared.PreparedTensor: tpu,
  stacked.LayerOf: tpu,
  sparse_prepared.PreparedSparse: sparse_tpu,
}


def _unsupported_tpu(x: jax.Array, leaf: Any) -> str:
  """Say why no kernel of a TPU can multiply by a leaf."""
  kernel = sparse_tpu if isinstance(leaf, leaves.SparseTensor) else tpu
  return _KERNELS.get(type(leaf), kernel).unsupported(x, leaf)


# In order of preference: the first that runs on the platform and supports the operands is chosen.
IMPLEMENTATIONS = {
  "tpu": Implementation(
    lambda x, leaf: _KERNELS[type(leaf)].matmul(x, leaf), _unsupported_tpu, ("tpu",)
  ),
  "mosaic_gpu": Implementation(gpu.matmul, gpu.unsupported, ("gpu",)),
  "grouped": Implementation(xla.grouped, xla.unsupported_grouped, ("gpu", "tpu")),
  "chunked": Implementation(xla.chunked, xla.unsupported_chunked, ("cpu",)),
  "lut": Implementation(lut_xla.matmul, lut_xla.unsupported, ("cpu",), lut_xla.unsupported_few),
  "sliced": Implementation(sliced.matmul, sliced.unsupported, ("cpu", "gpu", "tpu")),
  "reference": Implementation(reference.matmul, lambda x, leaf: "", ("cpu", "gpu", "tpu")),
}


def matmul(
  x: Num[Array, "*batch rows"], leaf: Any, *, implementation: str | None = None
) -> Float[Array, "*batch cols"]:
  """Multiply activations by a kernel matrix, dense or compressed.

  A low-rank leaf is two thin products, a sum of leaves or of rows a sum of products in float32,
  a leaf of few different columns a product with those, a turned one with turned inputs. Under
  `vmap`, `scan` over stacked leaves, and differentiation it behaves like `jnp.matmul`.

  Args:
    x: activations, floating point.
    leaf: array or compressed leaf of logical shape (rows, cols).
    implementation: how to multiply by quantized, sparse and vector-quantized leaves, a name of
      `IMPLEMENTATIONS`; None chooses by platform and shape.

  Returns:
    `x @ leaf`, accumulated in float32, in the dtype of `x`.

  Raises:
    ValueError: if shapes do not fit, if parts of a quantized leaf do not have its shape, if
      activations are not floating point, or if the named implementation cannot take the operands;
      the message lists those that can.

  Example:
    >>> matmul(jnp.ones((1, 2)), jnp.ones((2, 3))).tolist()
    [[2.0, 2.0, 2.0]]
  """
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"matmul has no implementation {implementation!r}; it has {', '.join(IMPLEMENTATIONS)}"
    )
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"matmul: x has dtype {x.dtype.name}; activations are floating point")
  if not leaves.is_leaf(leaf):
    return jnp.matmul(x, jnp.asarray(leaf).astype(x.dtype))
  for place, part in checks.packed(leaf):
    wrong = checks.disagreement(part)
    if wrong:
      hint = "; within shard_map, take shards from kernels.split"
      raise ValueError(f"matmul: in the {type(part).__name__}{place} {wrong}{hint}")
  if leaf.ndim != 2 or x.shape[-1:] != (leaf.rows,):
    raise ValueError(
      f"matmul: x of shape {x.shape} does not fit a {type(leaf).__name__} of shape {leaf.shape}; "
      "the leaf must be one (rows, cols) matrix (vmap over more) and x end in its rows"
    )
  return _product(x, leaf, implementation, x.dtype).astype(x.dtype)


def supported(x: Float[Array, "*batch rows"], leaf: Any) -> list[str]:
  """List the implementations that can multiply these operands, whatever the platform.

  Args:
    x: activations.
    leaf: compressed leaf other than those that are composed of products, such as LowRank and Sum.

  Returns:
    Names from `IMPLEMENTATIONS`, in order of preference.

  Example:
    >>> places = jnp.ones((1, 1), jnp.uint8)
    >>> supported(jnp.ones((1, 4)), leaves.SparseTensor(jnp.ones((2, 1)), places, 4, 1, 2, 4))
    ['sliced', 'reference']
  """
  return [name for name, i in IMPLEMENTATIONS.items() if not i.unsupported(x, leaf)]


def _product(
  x: jax.Array, leaf: Any, implementation: str | None, dtype: Any = jnp.float32
) -> jax.Array:
  """Multiply and return float32; a single kernel may write the dtype that is wanted in the end."""
  if isinstance(leaf, leaves.Sum):
    total = _product(x, leaf.parts[0], implementation)
    for part in leaf.parts[1:]:
      total = total + _product(x, part, implementation)
    return total
  if isinstance(leaf, leaves.LowRank):
    thin = _product(x, leaf.a, implementation).astype(x.dtype)
    return leaf.scale * _product(thin, leaf.b, implementation)
  if isinstance(leaf, leaves.ActivationQuantized):
    scales = leaf.scales_of(x)
    units = leaf.codes_of(x, scales)
    if xla.exact(leaf):
      return xla.integers(units, leaf.weight) * scales
    whole = stacked.matrix(leaf.weight)
    if isinstance(whole, prepared.PreparedTensor):
      units = units.astype(whole.inputs)
    return _product(units, leaf.weight, implementation) * scales
  if isinstance(leaf, leaves.Rotated):
    return _product(hadamard.transform(x), leaf.weight, implementation)
  if isinstance(leaf, leaves.ClusteredColumns):
    return jnp.take(_product(x, leaf.centroids, implementation), leaf.index[0], axis=-1)
  if isinstance(leaf, leaves.SplitRows):
    few = leaf.first.shape[-2]
    x = jnp.take(x, leaf.order(), axis=-1)
    first = _product(x[..., :few], leaf.first, implementation)
    return first + _product(x[..., few:], leaf.rest, implementation)
  if isinstance(leaf, fitted.FittedTensor):
    wide = jnp.float32 if leaf.completes else dtype
    return leaf.output(x, _product(leaf.inputs(x), leaf.matrix, implementation, wide))
  if isinstance(leaf, prepared.Instead):
    filled = leaf.weight.shape[-2] - leaf.rows  # up to whole groups
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, filled)]) if filled else x
    return _product(x, leaf.weight, implementation, dtype)
  if not leaves.is_leaf(leaf):
    return reference.dot(x, jnp.asarray(leaf).astype(x.dtype))
  name, where, kernel = _kernel(leaf)
  if kernel and implementation in (None, name) and not kernel.unsupported(x, leaf):
    multiply = functools.partial(kernel.matmul, dtype=dtype)
    if implementation == name:
      return multiply(x, leaf)
    # Decided when the program is lowered, so that one compiled ahead for a device has the kernel.
    other = lambda x, leaf: reference.matmul(x, leaf).astype(dtype)
    return jax.lax.platform_dependent(x, leaf, **{where: multiply}, default=other)
  if implementation is None:
    platform = _platform()
    able = (IMPLEMENTATIONS[n] for n in supported(x, leaf))
    return next(i for i in able if platform in i.platforms and not i.slow(x, leaf)).matmul(x, leaf)
  reason = IMPLEMENTATIONS[implementation].unsupported(x, leaf)
  if reason:
    raise ValueError(
      f"matmul: {implementation!r} cannot multiply {x.shape} by this leaf: {reason}; "
      f"supported here: {', '.join(supported(x, leaf))}"
    )
  return IMPLEMENTATIONS[implementation].matmul(x, leaf)


def _kernel(leaf: Any) -> tuple[str, str, Any]:
  """Find the kernel that reads a prepared leaf: its name, platform and module, or None."""
  whole = stacked.matrix(leaf)
  if isinstance(whole, prepared.PreparedTensor) and whole.target in devices.GPUS:
    return "mosaic_gpu", "cuda", gpu
  return "tpu", "tpu", _KERNELS.get(type(leaf))


def _platform() -> str:
  """Name the platform: jax calls both "cuda" and "rocm" devices gpu."""
  backend = jax.default_backend()
  return backend if backend in ("cpu", "tpu") else "gpu"
