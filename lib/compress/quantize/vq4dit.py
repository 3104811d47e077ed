# SPDX-License-Identifier: Apache-2.0
"""VQ4DiT: learn which of the nearest table entries a vector of weights becomes, and the table.

k-means gives a table and, for every vector of `length` inputs of one output, its `candidates`
nearest entries. For half of the epochs a vector is the mixture of its candidates by the softmax of
learned logits, which begin at minus their squared distances over the mean one; the loss is the mean
square of the change in the block's output plus `weight` times the mean of 1 - |2 r - 1| over the
ratios r, which draws them to 0 and 1. The loss of each vector's likeliest candidate is what is
compared meanwhile, and the best is kept. These become the assignments, for which the tables alone
are calibrated in the other half.

The paper quantizes diffusion transformers and calibrates on what they make of noise; here the
hidden states are those of whatever calibration data there is (random tokens, for a language model,
come nearest to noise). Its code is not published: the step sizes, the initial ratios and the second
half are ours.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from treesurgeon.compress.quantize import kmeans, tune, vptq
from treesurgeon.core import leaves, lifting, packing, step


def candidates_of(
  x: Float[Array, "n dim"], table: Float[Array, "k dim"], *, count: int
) -> Int32[Array, "count n"]:
  """Find the nearest table entries of every vector, the nearest first.

  Args:
    x: vectors.
    table: the entries.
    count: how many.

  Returns:
    Their indices.

  Example:
    >>> candidates_of(jnp.array([[0.9]]), jnp.array([[0.0], [1.0], [5.0]]), count=2).tolist()
    [[1], [0]]
  """
  n, dim = x.shape
  chunk = max(1, min(n, kmeans.CHUNK // len(table)))
  half = 0.5 * jnp.square(table).sum(axis=1)

  def some(part: jax.Array) -> jax.Array:
    closeness = jnp.matmul(part, table.T, precision="highest") - half[None, :]
    return jax.lax.top_k(closeness, count)[1].astype(jnp.int32)

  parts = jnp.pad(x, [(0, -n % chunk), (0, 0)]).reshape(-1, chunk, dim)
  return jax.lax.map(some, parts).reshape(-1, count)[:n].T


def mixture(
  table: Float[Array, "k length"],
  candidates: Int32[Array, "count runs cols"],
  logits: Float[Array, "count runs cols"],
) -> Float[Array, "rows cols"]:
  """Compute weights whose vectors are mixtures of their candidates.

  Args:
    table: the entries.
    candidates: indices of each vector's candidates.
    logits: of the ratios in which they are mixed.

  Returns:
    The weights, `length` rows a run.

  Example:
    >>> table, both = jnp.array([[0.0], [4.0]]), jnp.array([[[0]], [[1]]])
    >>> mixture(table, both, jnp.zeros((2, 1, 1))).tolist()
    [[2.0]]
  """
  ratios = jax.nn.softmax(logits, axis=0)
  vectors = (ratios[..., None] * table[candidates]).sum(axis=0)
  return jnp.swapaxes(vectors, 1, 2).reshape(-1, logits.shape[-1])


@step.method("compress.quantize.vq4dit")
def vq4dit(
  *,
  length: int = 4,
  entries: int = 256,
  candidates: int = 2,
  epochs: int = 20,
  ratio_rate: float = 0.05,
  table_rate: float = 1e-4,
  weight: float = 0.1,
  batch: int = 4,
  iterations: int = 100,
  select: str | None = None,
) -> step.Step:
  """Quantize vectors of kernels to table entries, calibrating both over blocks.

  Args:
    length: inputs that a vector covers; the last vector of an output may be shorter.
    entries: vectors in a kernel's table, at most 65536.
    candidates: nearest entries that a vector may become; 1 calibrates the table alone.
    epochs: times that the calibration data is gone through; 0 is k-means.
    ratio_rate: RMSprop's step size for the logits of the ratios.
    table_rate: its step size for the tables.
    weight: of the ratios' distance from 0 and 1, in units of the loss at the start.
    batch: rows of the calibration data a step.
    iterations: of k-means, at most.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> vq4dit(candidates=3)
    (compress.quantize.vq4dit(candidates=3),)

  Reference:
    Deng et al., VQ4DiT: Efficient Post-Training Vector Quantization for Diffusion Transformers,
    2024, arXiv:2408.17131.
  """
  vptq.check(length=length, entries=entries)
  if not 1 <= candidates <= entries:
    raise ValueError(f"candidates={candidates}: valid is 1 to the {entries} entries of a table")
  if batch < 1:
    raise ValueError(f"batch={batch}: a step needs 1 row of the calibration data or more")
  if epochs < 0:
    raise ValueError(f"epochs={epochs}: valid is 0 (k-means) or more")
  hyper = {
    "length": length, "entries": entries, "count": candidates, "epochs": epochs,
    "ratio_rate": ratio_rate, "table_rate": table_rate, "weight": weight, "batch": batch,
    "iterations": iterations,
  }  # fmt: skip
  return lifting.over_blocks(_block, hyper=hyper, select=select, raw=True, random=True)


def _block(
  w: Mapping[str, Any],
  *,
  inputs: jax.Array,
  targets: jax.Array,
  forward: Any,
  key: jax.Array,
  length: int,
  entries: int,
  count: int,
  epochs: int,
  ratio_rate: float,
  table_rate: float,
  weight: float,
  batch: int,
  iterations: int,
) -> dict[str, Any]:
  dense = {n: leaves.dense(x) for n, x in w.items() if not _done(x, length)}
  if not dense:
    return dict(w)
  start, choices = {}, {}
  for n, x in dense.items():
    rows, cols = x.shape
    runs = -(-rows // length)
    padded = jnp.pad(x.astype(jnp.float32), [(0, runs * length - rows), (0, 0)])
    vectors = jnp.swapaxes(padded.reshape(runs, length, cols), 1, 2).reshape(-1, length)
    found = kmeans.fit(vectors, k=entries, key=step.leaf_key(key, n), iterations=iterations)
    near = candidates_of(vectors, found.centroids, count=count)
    far = jnp.square(found.centroids[near] - vectors[None]).sum(axis=-1)
    typical = far[0].mean()
    logits = -far / jnp.where(typical > 0, typical, 1.0)
    choices[n] = near.reshape(count, runs, cols)
    start[n] = {"table": found.centroids, "logits": logits.reshape(count, runs, cols)}

  def soft(x: Mapping[str, Any]) -> dict[str, Any]:
    return {
      n: mixture(p["table"], choices[n], p["logits"])[: w[n].shape[0]].astype(dense[n].dtype)
      for n, p in x.items()
    }

  def hard(x: Mapping[str, Any]) -> dict[str, Any]:
    return {n: _leaf(p["table"], choices[n], p["logits"], dense[n]) for n, p in x.items()}

  def undecided(x: Mapping[str, Any]) -> jax.Array:
    ratios = [jax.nn.softmax(p["logits"], axis=0) for p in x.values()]
    distance = jnp.stack([jnp.sum(1 - jnp.abs(2 * r - 1)) for r in ratios]).sum()
    return weight * distance / sum(r.size for r in ratios)

  names = {n: {"table": "table", "logits": "logits"} for n in start}
  optimizer = optax.multi_transform(
    {"table": optax.rmsprop(table_rate), "logits": optax.rmsprop(ratio_rate)}, names
  )
  data = {"inputs": inputs, "targets": targets, "forward": forward, "batch": batch}
  best = tune.block(
    soft, start, **data, optimizer=optimizer, epochs=epochs // 2, penalty=undecided, hard=hard
  )
  rest = {"optimizer": optax.rmsprop(table_rate), "epochs": epochs - epochs // 2}
  return {**w, **tune.kernels(hard(best), **data, **rest)}


def _done(leaf: Any, length: int) -> bool:
  return isinstance(leaf, leaves.Codebook) and (leaf.length, leaf.width) == (length, 1)


def _leaf(table: jax.Array, candidates: jax.Array, logits: jax.Array, w: jax.Array) -> Any:
  """Choose the likeliest candidate of every vector."""
  likeliest = jnp.argmax(logits, axis=0)[None]
  index = jnp.take_along_axis(candidates, likeliest, axis=0)[0]
  bits = max(1, (len(table) - 1).bit_length())
  codes = packing.pack(index.astype(jnp.uint8 if bits <= 8 else jnp.uint16), bits=bits)
  rows, cols = w.shape
  return leaves.Codebook(codes, table.astype(w.dtype), rows, cols, bits, table.shape[1])
