# SPDX-License-Identifier: Apache-2.0
"""Fit the linear layers of two networks' merge to both networks' features, in closed form."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from treesurgeon import models
from treesurgeon.core import linalg, paths, programs
from treesurgeon.merge import widening

Flat = Mapping[str, Any]
How = Mapping[str, Mapping[int, widening.Axis]]
_ORDER = ("attn/in", "attn/o/in", "mlp/in", "mlp/down/in", "dense/in", "conv/in")


class Layer(NamedTuple):
  """A linear layer to fit; hashable.

  Attributes:
    kernel: its address.
    bias: its bias' address, or "".
    tap: where its input is observed.
    index: of its block, -1 outside blocks.
    kinds_in: whose its inputs are, as bytes; b"" where all are merged.
    kinds_out: whose its outputs are.
  """

  kernel: str
  bias: str
  tap: str
  index: int
  kinds_in: bytes
  kinds_out: bytes


def solve(
  s: Float[Array, "rows rows"],
  r: Float[Array, "rows columns"],
  *,
  kinds_in: Int[Array, " rows"] | None = None,
  kinds_out: Int[Array, " columns"] | None = None,
  ridge: float | Float[Array, ""] = 1e-4,
) -> Float[Array, "rows columns"]:
  """Find the change D of a layer's weights that minimises |R - X D|² + ridge |D|².

  Args:
    s: Xᵀ X, second moment of the layer's inputs; a constant input, for the bias, may be one.
    r: Xᵀ R, their products with what the layer's outputs lack.
    kinds_in: whose each input is, see `widening`; None where all are merged.
    kinds_out: whose each output is. Weights between different networks do not change.
    ridge: relative to the mean diagonal of `s`; raised where that is singular.

  Returns:
    The change.

  Example:
    >>> x, lacking = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 2.0], [4.0, 6.0]])
    >>> solve(x.T @ x, x.T @ lacking, ridge=0.0).tolist()
    [[1.0, 2.0], [2.0, 3.0]]
  """

  def free(may: Float[Array, " rows"]) -> Float[Array, "rows columns"]:
    """Solve with some inputs only: the others meet a diagonal system without a right side."""
    inside = s * (may[:, None] * may[None, :])
    low, _ = linalg.damped_cholesky(inside + jnp.diag((1 - may) * jnp.mean(jnp.diag(s))), ridge)
    return jax.scipy.linalg.cho_solve((low, True), r * may[:, None]) * may[:, None]

  everybody = jnp.ones(s.shape[0], jnp.float32)
  if kinds_in is None and kinds_out is None:
    return free(everybody)
  kinds_in = jnp.zeros(s.shape[0], jnp.int32) if kinds_in is None else kinds_in
  kinds_out = jnp.zeros(r.shape[1], jnp.int32) if kinds_out is None else kinds_out
  own = [everybody, *(kinds_in != k for k in (widening.SECOND, widening.FIRST))]
  found = jax.vmap(free)(jnp.stack([x.astype(jnp.float32) for x in own]))
  return jnp.take_along_axis(found, kinds_out[None, None, :].astype(jnp.int32), axis=0)[0]


def layers(addresses: Iterable[str], how: How) -> list[Layer]:
  """List the linear layers that can be fitted, in the order in which the network runs them.

  Args:
    addresses: of all leaves.
    how: which axes are widened, from `widening.axes`.

  Returns:
    The layers.

  Example:
    >>> [one.tap for one in layers(["layers/0/mlp/up/kernel", "layers/0/attn/o/kernel"], {})]
    ['attn/o/in', 'mlp/in']
  """
  names, out = set(addresses), []
  for kernel in sorted(n for n in names if n.endswith("/kernel") and n != "pooler/kernel"):
    parts = kernel.split("/")
    bias = f"{kernel.removesuffix('kernel')}bias"
    kinds = [how[kernel][i].kind if i in how.get(kernel, {}) else b"" for i in (0, 1)]
    index = int(parts[1]) if parts[0] == "layers" else -1
    out.append(Layer(kernel, bias if bias in names else "", models.tap_of(kernel), index, *kinds))

  def place(one: Layer) -> tuple[int, int]:
    if one.index < 0:
      return (-1, 0) if one.tap == "embed/in" else (len(out), one.tap != "mlm_head/in")
    return one.index, _ORDER.index(re.sub(r"experts/\d+/", "", one.tap))

  return sorted(out, key=place)


def fit(
  spec: Any, wide: Any, a: Flat, b: Flat, merged: Flat, how: How, batches: Iterable[Any],
  weights: Sequence[Any], *, through: bool, ridge: Any,
) -> tuple[dict[str, Any], list[Any]]:  # fmt: skip
  """Fit all linear layers.

  Args:
    spec: architecture of the two networks.
    wide: architecture of the merged one.
    a: address to array, of the first network.
    b: of the second, its units in the first's order.
    merged: of the merged network, from which the fit starts.
    how: which axes are widened.
    batches: as for `models.nll`, labels are not read; a list.
    weights: of the two networks in merged units, summing to 1.
    through: whether a layer's inputs are the merged network's own, so that layers are fitted one
      after another, or both networks' mean.
    ridge: see `solve`.

  Returns:
    (the merged network's leaves, float32 where they were fitted; squared errors summed over all
    layers and tokens before and after the fit, each before-error as its layer met it).

  Raises:
    ValueError: if there is no batch.
  """
  jobs, out = layers(a, how), dict(merged)
  stages = [jobs]
  if through:
    places = list(dict.fromkeys((j.index, j.tap) for j in jobs))
    stages = [[j for j in jobs if (j.index, j.tap) == place] for place in places]
  one, other = paths.unflatten(a), paths.unflatten(b)
  before, after = jnp.zeros(()), jnp.zeros(())
  for stage in stages:
    taps = tuple(sorted({job.tap for job in stage}))
    tree, total = paths.unflatten(out) if through else None, {}
    for batch in batches:
      seen = [_seen(spec, taps, one, batch), _seen(spec, taps, other, batch)]
      seen += [_seen(wide, taps, tree, batch)] if through else []
      for job in stage:
        sums = _moments(*_given(job, seen, (a, b, out), how, weights), job.kinds_in, job.kinds_out)
        total[job] = jax.tree.map(jnp.add, total[job], sums) if job in total else sums
    if not total:
      raise ValueError("merge.pleas needs calibration batches and none was given")
    for job, (s, r, error) in total.items():
      given = {"b": out.get(job.bias), "s": s, "r": r, "ridge": np.float32(ridge)}
      if job.kinds_in or job.kinds_out:
        given["kinds_in"] = _whose(job.kinds_in, s.shape[0])
        given["kinds_out"] = _whose(job.kinds_out, r.shape[1])
      made = programs.compiled(_fitted, ())(out[job.kernel], given)
      out[job.kernel] = made["kernel"]
      if job.bias:
        out[job.bias] = made["bias"]
      before, after = before + error, after + error - made["gain"]
  return out, [before, after]


def _whose(kinds: bytes, length: int) -> np.ndarray:
  """Read kinds; entries beyond, such as the constant input, are everybody's."""
  out = np.zeros(length, np.int32)
  out[: len(kinds)] = np.frombuffer(kinds, np.int8)
  return out


def _fitted(w: Any, *, b: Any, s: Any, r: Any, ridge: Any, **kinds: Any) -> dict[str, Any]:
  change = solve(s, r, ridge=ridge, **kinds)
  gain = 2 * (change * r).sum() - (change * jnp.matmul(s, change, precision="highest")).sum()
  out = {"kernel": w.astype(jnp.float32) + change[: w.shape[0]], "gain": gain}
  return out if b is None else {**out, "bias": b.astype(jnp.float32) + change[-1]}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _seen(spec: Any, taps: tuple[str, ...], params: Any, batch: Any) -> dict[str, Any]:
  def keep(name: str, x: jax.Array) -> jax.Array | None:
    return x if name in taps else None

  return models.forward(spec, params, models.inputs(batch), observe=keep).observed


def _given(
  job: Layer, seen: Sequence[Any], networks: Sequence[Flat], how: How, weights: Sequence[Any]
) -> tuple[Any, ...]:
  """Gather a layer's inputs, kernels and biases in the networks, and its axes' old entries."""
  xs = [s[job.tap] if job.index < 0 else s[job.tap][job.index] for s in seen]
  kernels = [n[job.kernel] for n in networks]
  biases = [n[job.bias] if job.bias else None for n in networks]
  axes = how.get(job.kernel, {})
  return xs, kernels, biases, [axes[i].old if i in axes else None for i in (0, 1)], tuple(weights)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _moments(
  xs: Sequence[Any], kernels: Sequence[Any], biases: Sequence[Any], old: Sequence[Any],
  weights: Sequence[Any], kinds_in: bytes, kinds_out: bytes,
) -> tuple[Any, Any, Any]:  # fmt: skip
  """Compute Xᵀ X, Xᵀ R and |R|² of a layer on a batch; R is what its outputs lack."""
  rows = widening.Axis(old[0], kinds_in) if kinds_in else None
  columns = widening.Axis(old[1], kinds_out) if kinds_out else None
  x = [v.reshape(-1, v.shape[-1]).astype(jnp.float32) for v in xs]
  y = [_linear(w, b, v) for w, b, v in zip(kernels[:2], biases[:2], x[:2], strict=True)]
  target = widening.blend(y[0], y[1], columns, weights)
  z = x[2] if len(x) > 2 else widening.blend(x[0], x[1], rows, weights)
  lack = target - _linear(kernels[2], biases[2], z)
  if biases[2] is not None:
    z = jnp.concatenate([z, jnp.ones((z.shape[0], 1), jnp.float32)], axis=1)
  s, r = (jnp.matmul(z.T, v, precision="highest") for v in (z, lack))
  return s, r, (lack * lack).sum()


def _linear(kernel: Any, bias: Any, x: jax.Array) -> jax.Array:
  y = jnp.matmul(x, kernel.astype(jnp.float32), precision="highest")
  return y if bias is None else y + bias.astype(jnp.float32)[None, :]
