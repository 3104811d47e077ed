# SPDX-License-Identifier: Apache-2.0
"""Fisher merging: average donors entry by entry, weighted by their Fisher information.

Each donor's posterior is taken as a Gaussian around its weights, whose precision is the diagonal
Fisher information F_i on that donor's own data; the product's mode is Σ λ_i F_i θ_i / Σ λ_i F_i.
Matena and Raffel, "Merging models with Fisher-weighted averaging", 2021 (arXiv 2111.09832).

Where we differ: the information is empirical (the data's labels; the paper takes the expectation
over the model's own, which costs a backward pass a class) and that of an example's mean loss over
its tokens. An entry that no donor finds informative is their average: F_i is at least `floor`, 1e-6
as in the paper. In a language model most of F lies below that, so there give a smaller floor, or
`normalize`, which divides each F_i by its root mean square first and makes the floor relative
(FusionBench adds its floor before it scales by norms). Computed in float32, returned in the base's
storage dtype. The base itself is not averaged. Neutral at lam=0.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, needs, paths, step, varied
from treesurgeon.merge import weights as weights_lib


def weigh(
  w: Float[Array, "*shape"],
  donors: tuple[Float[Array, "*shape"], ...],
  fisher: tuple[Float[Array, "*shape"], ...],
  *,
  weights: Sequence[ArrayLike] | None = None,
  lam: ArrayLike = 1.0,
  floor: ArrayLike = 1e-6,
) -> Float[Array, "*shape"]:
  """Average arrays by precision: Σ λ_i F_i θ_i / Σ λ_i F_i.

  Args:
    w: the base's array, for its dtype and for `lam`.
    donors: the donors' arrays θ_i.
    fisher: the donors' Fisher information F_i, float32.
    weights: λ_i, one number a donor; None means ones.
    lam: how far to go from the base to the average.
    floor: smallest F_i.

  Returns:
    The average, in the dtype of `w`.

  Example:
    >>> donors, f = (jnp.zeros(1), jnp.ones(1)), (jnp.ones(1), jnp.full(1, 3.0))
    >>> weigh(jnp.zeros(1), donors, f).tolist()
    [0.75]
  """
  weight = weights_lib.resolve(weights, len(donors), of="donors")
  precision = [c * jnp.maximum(f, floor) for c, f in zip(weight, fisher, strict=True)]
  total = sum(p * d.astype(jnp.float32) for p, d in zip(precision, donors, strict=True))
  mode = jnp.asarray(total) / sum(precision)
  return jnp.asarray((1 - lam) * w.astype(jnp.float32) + lam * mode).astype(w.dtype)


@step.method("merge.fisher")
def fisher(
  *,
  models: Sequence[str] = (),
  weights: Sequence[varied.Varied] | None = None,
  lam: varied.Varied = 1.0,
  floor: varied.Varied = 1e-6,
  normalize: bool = False,
  select: str | None = None,
) -> step.Step:
  """Average fine-tuned donors entry by entry, weighted by their Fisher information.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    weights: one number a donor, not negative; None means ones.
    lam: how far to go from the model at hand to the average; 0 leaves it as it is.
    floor: smallest Fisher information, above 0.
    normalize: whether to divide each donor's information by its root mean square over the selected
      leaves, so that no donor outweighs the others for its larger loss.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform; applying it needs each donor's data.

  Raises:
    ValueError: for a floor or weight out of range.

  Example:
    >>> fisher(normalize=True)
    (merge.fisher(normalize=True),)

  Reference:
    Matena and Raffel, Merging models with Fisher-weighted averaging, 2021, arXiv 2111.09832.
  """
  if not all(x > 0 for x in varied.values(floor)):
    raise ValueError(f"floor={floor} must be above 0")
  knobs = {"weights": weights, "lam": lam, "floor": floor}
  each = lifting.over_leaves(
    weigh,
    hyper={},
    knobs=knobs,
    check=_check,
    select=select,
    default=".*",
    domain=".*",
    wants={
      "donors": needs.Donors(tuple(models)),
      "fisher": needs.Statistic("fisher", of="donors"),
    },
  )
  return _normalized(each, select or ".*") if normalize else each


def _normalized(each: step.Step, pattern: str) -> step.Step:
  """Scale the donors' information before each leaf is merged by itself."""

  def apply(m: Any, evidence: needs.Evidence, key: jax.Array) -> Any:
    found = evidence["fisher"]
    chosen = [a for a in m.addresses() if re.fullmatch(pattern, a)]
    norms = _norms(found, chosen)
    scaled = {a: _divide(found[a], norms) for a in chosen}
    return each.apply(m, {**evidence, "fisher": scaled}, key)

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(paths.select(names, pattern))]

  def reselect(narrower: str) -> step.Step:
    again = each.reselect
    assert again is not None
    return _normalized(again(narrower), step.both(pattern, narrower))

  return step.Step(each.needs, apply, "model", {}, units, reselect)


def _norms(found: Mapping[str, tuple[jax.Array, ...]], chosen: Sequence[str]) -> list[Any]:
  count = len(found[chosen[0]])
  squares, size = [0.0] * count, 0
  for address in chosen:
    squares = [a + b for a, b in zip(squares, _squares(found[address]), strict=True)]
    size += found[address][0].size
  return [jnp.maximum(jnp.sqrt(s / size), jnp.finfo(jnp.float32).tiny) for s in squares]


@jax.jit
def _squares(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  return tuple(jnp.sum(jnp.square(x)) for x in arrays)


@jax.jit
def _divide(arrays: tuple[jax.Array, ...], by: list[jax.Array]) -> tuple[jax.Array, ...]:
  return tuple(x / d for x, d in zip(arrays, by, strict=True))


def _check(donors: int, *, weights: Sequence[float] | None, **rest: Any) -> None:
  del rest
  weight = weights_lib.resolve(weights, donors, of="donors")
  if min(weight) < 0 or sum(weight) == 0:
    raise ValueError(f"weights={weight} must not be negative, and not all zero")
