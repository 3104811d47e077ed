# SPDX-License-Identifier: Apache-2.0
"""Bring networks that were trained apart into one order of units, by any of three searches."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from treesurgeon.core import paths
from treesurgeon.merge import activation_matching, matching, permutations, straight_through, units

Method = Literal["weight", "activation", "ste"]
Flat = Mapping[str, Any]


def align(
  spec: Any,
  base: Flat,
  donors: Sequence[Flat],
  batches: Any = (),
  *,
  rng: np.random.Generator,
  method: Method = "weight",
  residual: bool = True,
  sweeps: int = 100,
  steps: int = 100,
  rate: float = 1e-2,
) -> list[matching.Match]:
  """Find for each donor the permutation that brings it nearest to the others.

  Args:
    spec: architecture.
    base: address to array, all leaves of the network that stays.
    donors: likewise, the networks to permute.
    batches: for the methods that look at data.
    rng: of the groups' order.
    method: "weight", "activation" or "ste".
    residual: whether channels of the residual stream may move.
    sweeps: of weight matching, at most.
    steps, rate: of the straight-through estimator.

  Returns:
    A match a donor.

  Example:
    >>> from treesurgeon import models
    >>> from treesurgeon.core import paths
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> flat = paths.flatten(models.init(spec, jax.random.key(0)))
    >>> align(spec, flat, [flat], rng=np.random.default_rng(0))[0].gain
    0.0
  """
  base, donors = _host(base), [_host(d) for d in donors]
  groups = permutations.groups(spec, residual=residual)
  start = permutations.identity(spec, residual=residual)
  search = {"rng": rng, "sweeps": sweeps}
  if method == "ste":
    more = {"steps": steps, "rate": rate}
    found = [
      straight_through.match(spec, groups, base, d, start, batches, **search, **more)
      for d in donors
    ]
    return [match for match, _ in found]
  if method == "activation":
    taps = sorted({tap for g in groups for tap, _, _ in g.taps})
    out = []
    for d in donors:
      one, other = paths.unflatten(base), paths.unflatten(d)
      seen = activation_matching.correlations(spec, one, other, batches, taps)
      out.append(activation_matching.match(groups, seen, base, d, start, **search))
    return out
  out = [matching.match(groups, base, d, start, **search) for d in donors]
  settled = len(donors) < 2
  for _ in range(sweeps):
    if settled:
      break
    settled = True
    for i in rng.permutation(len(donors)):
      placed = [units.apply(d, o.index) for j, (d, o) in enumerate(zip(donors, out, strict=True))
                if j != i]  # fmt: skip
      mean = {a: sum((p[a] for p in placed), base[a]) / (1 + len(placed)) for a in start}
      new = matching.match(groups, mean, donors[i], out[i].index, **search)
      settled &= new.gain <= 0
      out[i] = matching.Match(new.index, out[i].sweeps + new.sweeps, out[i].gain + new.gain)
  return out


def _host(flat: Flat) -> dict[str, Any]:
  """View arrays that lie in this machine's memory as numpy: small products go faster."""
  return {a: np.asarray(x) if _near(x) else x for a, x in flat.items()}


def _near(x: Any) -> bool:
  if not isinstance(x, jax.Array):
    return True
  return x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())
