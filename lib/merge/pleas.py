# SPDX-License-Identifier: Apache-2.0
"""Merge two networks that were trained apart into one that may be wider, layer by layer.

PLeaS: Nasery, Hayase, Koh and Oh, "Merging models with permutations and least squares", 2024 (arXiv
2407.02447). The units of the second network are permuted towards the first's; the worst matched
pairs stay apart (`widening`), so that the width grows by up to `ratio`; then every linear layer is
solved by least squares, such that from the mean of both networks' inputs (their own, for units that
stayed apart) it gives the mean of both networks' outputs. Weights between units of different
networks stay zero.

Where we differ: the problem is solved in closed form, where the paper's code takes 400 steps of
Adam, with a ridge towards the widened average from which that code starts too; only whole groups of
hidden units and heads are widened, so a transformer's residual stream keeps its width; with
`inputs="merged"` each layer is solved for the inputs that the merged network gives it, the layers
before it solved already (as RegMean++ does for RegMean), instead of for the networks' mean.

With ratio=1 the mean is met exactly: an MLP or conv net without norms becomes the ensemble whose
logits are the mean of both networks'; so does the output of a transformer's feed-forward block or
attention, given the same input. With ratio=0 and equal features it is `merge.rebasin`. Neutral at
ratio=0 and weights=(1, 0).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.core
import numpy as np

from treesurgeon.core import leaves, meshes, needs, paths, programs, step, varied
from treesurgeon.core import model as model_lib
from treesurgeon.merge import least_squares, pairing, widening
from treesurgeon.merge import weights as weights_lib

Inputs = Literal["average", "merged"]


@step.method("merge.pleas")
def pleas(
  *,
  models: Sequence[str] = (),
  ratio: varied.Varied = 0.0,
  weights: Sequence[float] | None = None,
  method: pairing.Method = "activation",
  inputs: Inputs = "average",
  residual: bool = True,
  ridge: float = 1e-4,
) -> step.Step:
  """Permute a donor's units towards the model's, keep the worst pairs apart, and fit every layer.

  Args:
    models: directory of the donor; empty takes the one handed to the driver.
    ratio: share of each group's pairs that stay apart; rules go over names of groups, such as
      `layers/3/mlp`, `layers/3/heads`.
    weights: of the model and the donor in merged units; None means equal. They are normalized.
    method: how pairs are found and scored: "activation" by correlation, "weight" by inner products.
    inputs: "average" fits each layer to both networks' inputs, "merged" to those of the merged
      network; it is slower and no worse than the first on the batches' residual.
    residual: whether channels of the residual stream may move before they are averaged.
    ridge: how strongly weights are held at the widened average, relative to the inputs' moment.

  Returns:
    A transform of whole models; it rewrites the architecture. The lineage notes the squared error
    over all layers before and after the fit.

  Raises:
    ValueError: for arguments out of range, or another number of donors than one.

  Example:
    >>> pleas(ratio=0.5)
    (merge.pleas(ratio=0.5),)

  Reference:
    Nasery et al., PLeaS, 2024, arXiv 2407.02447.
  """
  if not all(0 <= x <= 1 for x in varied.values(ratio)) or ridge < 0:
    raise ValueError(f"merge.pleas: ratio={ratio} must lie in [0, 1], ridge={ridge} be >= 0")

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    base = {a: leaves.dense(m.leaf(a)) for a in m.addresses()}
    brought = {a: meshes.to_auto(evidence["donors"][a]) for a in base}
    given = {a: tuple(leaves.dense(d) for d in ds) for a, ds in brought.items()}
    for a, w in base.items():
      step.check_donors(a, w, given[a])
    count = len(next(iter(given.values())))
    if count != 1:
      raise ValueError(f"merge.pleas merges the model with one donor; got {count}")
    share = weights_lib.resolve(weights, 2, of="models (the base, then its donor)")
    if abs(sum(share)) < 1e-8:
      raise ValueError(f"weights={share} sum to zero, so they cannot be normalized")
    share = tuple(np.float32(x / sum(share)) for x in share)
    other = {a: d for a, (d,) in given.items()}
    found = pairing.search(
      m.spec, base, other, evidence["batches"], key,
      method=method, residual=residual, ratio=ratio,
    )  # fmt: skip
    groups = widening.widenable(m.spec, residual=residual)
    how = widening.axes(groups, found.picks)
    wide = widening.widen(m.spec, widening.sizes(groups, ratio))
    moved = {
      a: programs.compiled(_moved, ())(x, {"index": found.index.get(a, {})})
      for a, x in other.items()
    }
    merged = {a: _side_by_side(w, moved[a], how.get(a, {}), share) for a, w in base.items()}
    fitted, errors = least_squares.fit(
      m.spec, wide, base, moved, merged, how, evidence["batches"], share,
      through=inputs == "merged", ridge=ridge,
    )  # fmt: skip
    flat = {a: x.astype(base[a].dtype) for a, x in fitted.items()}
    out = m.replace(spec=wide, params=paths.unflatten(flat))
    if any(isinstance(e, jax.core.Tracer) for e in errors):
      return out
    told = {"squared_error": [float(e) for e in errors], "parameters": [m.size(), out.size()]}
    return out.replace(aux={**m.aux, "notes": {**m.aux.get("notes", {}), **told}})

  def every(names: Sequence[str]) -> step.Units:
    return [tuple(names)]

  wants = {"donors": needs.Donors(tuple(models)), "batches": needs.Batches()}
  return step.Step(wants, meshes.with_auto_axes(apply), "model", {}, every)


def _side_by_side(w: Any, v: Any, how: Mapping[int, widening.Axis], weights: Any) -> Any:
  rows, columns = how.get(0) if w.ndim == 2 else None, how.get(w.ndim - 1)
  kinds = {"rows": rows and rows.kind, "columns": columns and columns.kind}
  old = [axis and axis.old for axis in (rows, columns)]
  made = programs.compiled(_combined, tuple(sorted(kinds.items())))
  return made(w, {"v": v, "old": old, "weights": weights})


def _combined(w: Any, *, v: Any, old: Any, weights: Any, rows: Any, columns: Any) -> Any:
  across = None if rows is None else widening.Axis(old[0], rows)
  along = None if columns is None else widening.Axis(old[1], columns)
  return widening.combine(w, v, across, along, weights)


def _moved(w: Any, *, index: Mapping[int, Any]) -> Any:
  for axis, order in index.items():
    w = w.take(order, axis=axis)
  return w
