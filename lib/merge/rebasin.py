# SPDX-License-Identifier: Apache-2.0
"""Average networks that were trained apart, after permuting the units of all but the first.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: merging models modulo permutation symmetries", 2022
(arXiv 2209.04836), with its three searches: weight matching, activation matching and the
straight-through estimator. The model itself stays as it is, its donors are permuted towards it, so
that the result is in the model's own order of units. Weights (0, 1) give the permuted donor alone.

Where we differ: groups are derived from the architecture, attention heads, grouped queries, gates
and the dimensions within heads included; of several donors each is first matched with the model,
then, for weight matching, each again with the mean of all others until nothing changes (the paper's
MergeMany, in which the model moves too). The search runs on the host where the arrays are there,
and inside a trace as a callback to the host, so that the shapes of the result can be planned.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import leaves, meshes, needs, programs, step
from treesurgeon.core import model as model_lib
from treesurgeon.merge import alignment, linear, permutations, units
from treesurgeon.merge import weights as weights_lib

Flat = Mapping[str, Any]


def permuted_average(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  orders: tuple[Mapping[int, Any], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
) -> Float[Array, "*shape"]:
  """Average an array with its counterparts, whose axes are put in order first.

  Args:
    w: the base's array.
    donors: the donors' arrays.
    orders: for each donor, axis to entries (int32).
    weights: one number for the base and one for each donor; None means all equal.

  Returns:
    Σ w_i P_i(θ_i) / Σ w_i, computed in float32, in the dtype of `w`.

  Example:
    >>> import jax.numpy as jnp
    >>> permuted_average(jnp.zeros(2), (jnp.array([2.0, 4.0]),), ({0: np.array([1, 0])},)).tolist()
    [2.0, 1.0]
  """
  moved = []
  for x, axes in zip(donors, orders, strict=True):
    for axis, order in axes.items():
      x = x.take(order, axis=axis)
    moved.append(x)
  return linear.average(w, tuple(moved), weights=weights)


@step.method("merge.rebasin")
def rebasin(
  *,
  models: Sequence[str] = (),
  weights: Sequence[float] | None = None,
  method: alignment.Method = "weight",
  residual: bool = True,
  sweeps: int = 100,
  steps: int = 100,
  rate: float = 1e-2,
) -> step.Step:
  """Permute the donors' units towards the model's, then average.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number for the model itself and one for each donor; None means all equal.
      Neutral at (1, 0, ...); (0, 1) is the permuted donor.
    method: "weight" needs no data; "activation" pairs units that correlate on the batches; "ste"
      learns, and needs batches with labels.
    residual: whether channels of the residual stream may move; networks trained from one
      initialisation keep theirs.
    sweeps: of weight matching, at most; it ends when a sweep gains nothing.
    steps: updates of "ste".
    rate: Adam's learning rate for "ste".

  Returns:
    A transform of whole models; the lineage notes sweeps and the L2 distance of each donor from the
    model before and after.

  Raises:
    ValueError: for arguments out of range, a wrong number of weights, a donor of other shapes.

  Example:
    >>> rebasin(weights=(0.0, 1.0))
    (merge.rebasin(weights=(0.0, 1.0)),)

  Reference:
    Ainsworth et al., Git Re-Basin, 2022, arXiv 2209.04836.
  """
  if sweeps < 1 or steps < 1 or rate <= 0:
    raise ValueError(
      f"merge.rebasin: sweeps={sweeps} and steps={steps} must be >= 1, rate={rate} > 0"
    )
  settings: dict[str, Any] = {
    "method": method, "residual": residual, "sweeps": sweeps, "steps": steps, "rate": rate,
  }  # fmt: skip

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    base = {a: leaves.dense(m.leaf(a)) for a in m.addresses()}
    brought = {a: meshes.to_auto(evidence["donors"][a]) for a in base}
    given = {a: tuple(leaves.dense(d) for d in ds) for a, ds in brought.items()}
    for a, w in base.items():
      step.check_donors(a, w, given[a])
    count = len(next(iter(given.values())))
    donors = [{a: d[i] for a, d in given.items()} for i in range(count)]
    weight = weights_lib.resolve(weights, count + 1, of="models (the base, then its donors)")
    if abs(sum(weight)) < 1e-8:
      raise ValueError(f"weights={weight} sum to zero, so they cannot be normalized")
    found = _search(m.spec, base, donors, evidence.get("batches", ()), key, settings)
    made = programs.compiled(permuted_average, ())
    turned = tuple(np.float32(c) for c in weight)
    changes = {
      a: made(
        w,
        {"donors": given[a], "orders": tuple(f[0].get(a, {}) for f in found), "weights": turned},
      )
      for a, w in base.items()
    }
    return _note(m.update(changes), found)

  def every(names: Sequence[str]) -> step.Units:
    return [tuple(names)]

  wants: dict[str, needs.Need] = {"donors": needs.Donors(tuple(models))}
  if method != "weight":
    wants["batches"] = needs.Batches()
  return step.Step(wants, meshes.with_auto_axes(apply), "model", {}, every)


def _search(
  spec: Any,
  base: Flat,
  donors: Sequence[Flat],
  batches: Any,
  key: jax.Array,
  settings: dict[str, Any],
) -> list[tuple[Any, Any]]:
  """Return (index, numbers to note) a donor; inside a trace by a callback."""

  def host(base: Flat, donors: Sequence[Flat], seed: Any) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(np.asarray(seed).tolist())
    found = alignment.align(spec, base, donors, batches, rng=rng, **settings)
    out = []
    for d, f in zip(donors, found, strict=True):
      far = [_distance(base, x) for x in (d, units.apply(d, f.index))]
      out.append((f.index, np.asarray([f.sweeps, *far], np.float32)))
    return out

  seed = jax.random.key_data(key)
  if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((base, donors, seed))):
    return host(base, donors, seed)
  index = permutations.identity(spec, residual=settings["residual"])
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.int32), index)
  each = (shapes, jax.ShapeDtypeStruct((3,), np.float32))
  return jax.pure_callback(host, [each for _ in donors], base, donors, seed)


def _distance(a: Flat, b: Flat) -> float:
  parts = [((np.asarray(a[n], np.float32) - np.asarray(b[n], np.float32)) ** 2).sum() for n in a]
  return float(np.sqrt(sum(parts)))


def _note(m: model_lib.Model, found: list[tuple[Any, Any]]) -> model_lib.Model:
  numbers = [n for _, n in found]
  if any(isinstance(n, jax.core.Tracer) for n in numbers):
    return m
  plain = [[float(x) for x in n] for n in numbers]
  told = [{"sweeps": int(s), "distance": [before, after]} for s, before, after in plain]
  return m.replace(aux={**m.aux, "notes": {**m.aux.get("notes", {}), "matched": told}})
