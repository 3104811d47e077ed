# SPDX-License-Identifier: Apache-2.0
"""Quantize to a budget: measure every leaf in every configuration, then choose among them exactly.

Each leaf is quantized in each configuration by itself, inputs being those of the unquantized model.
What that loses is estimated as

  sum(F) / (tr(H) cols) * tr(dW' H dW),

H the second moment of the leaf's inputs and F its diagonal Fisher information: the change of the
loss to second order, if the gradients of a layer's outputs were of one size and independent of its
inputs. Without calibration it is the relative squared error of the weights. Costs are the bytes
that the leaf takes in files. `compress.allocate` then finds the least total loss, and the choice is
spelled as a `by_path` over the quantizer, so that it is applied, recorded and replayed like any
other transform.
"""

import fractions
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from treesurgeon.compress import allocate
from treesurgeon.core import leaves, needs, step
from treesurgeon.core import model as model_lib
from treesurgeon.run import collect, drivers

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


class Measured(NamedTuple):
  """What the configurations of one leaf cost and lose.

  Attributes:
    nbytes: of each configuration.
    losses: of each.
  """

  nbytes: list[int]
  losses: list[float]


def read_bytes(text: str) -> int:
  """Read a size.

  Args:
    text: a number of bytes, or of kB, MB, GB (powers of 1000), KiB, MiB or GiB (of 1024).

  Returns:
    Bytes, rounded down.

  Raises:
    ValueError: for anything else.

  Example:
    >>> read_bytes("2.6GB"), read_bytes("1.5 KiB")
    (2600000000, 1536)
  """
  match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(?:([kmg]?)(i?)b)?\s*", text, re.IGNORECASE)
  if match is None or (match[3] and not match[2]):
    raise ValueError(f"budget {text!r} is not a size such as 2.6GB, 800MB, 1.5GiB or 2600000000")
  base = 1024 if match[3] else 1000
  return int(fractions.Fraction(match[1]) * base ** " kmg".index((match[2] or " ").lower()))


def configurations(
  build: Callable[..., step.Transform],
  *,
  bits: Sequence[int] = BITS,
  group_sizes: Sequence[int] = GROUPS,
) -> list[step.Transform]:
  """Build a quantizer in every combination of widths and group sizes that it has.

  Args:
    build: makes the quantizer from `bits` and `group_size`.
    bits: widths.
    group_sizes: rows that share a scale.

  Returns:
    One transform of one step a combination; widths that the quantizer refuses are left out.

  Raises:
    ValueError: what the quantizer says, if it refuses all.

  Example:
    >>> from treesurgeon import registry
    >>> rtn = registry.load("compress.quantize.rtn")
    >>> configurations(rtn, bits=(3, 9), group_sizes=(32, 128))
    [(compress.quantize.rtn(bits=3, group_size=32),), (compress.quantize.rtn(bits=3),)]
  """
  made, refused = [], None
  for width in bits:
    for size in group_sizes:
      try:
        made.append(build(bits=width, group_size=size))
      except ValueError as error:
        refused = error
  if not made and refused is not None:
    raise refused
  return made


def plan(
  choices: Sequence[step.Transform],
  source: needs.Source,
  materials: collect.Materials,
  budget: float,
  *,
  spare: int = 0,
  model: model_lib.Model | None = None,
  seed: int = 0,
) -> step.Transform:
  """Choose a configuration for each leaf so that the whole model fits a budget.

  Args:
    choices: configurations from `configurations`.
    source: the model, of which leaves are read one by one if there is no calibration.
    materials: with batches, loss is estimated as above; without, from the weights alone.
    budget: bytes that all leaves may take, those that are not quantized included.
    spare: bytes of the budget to leave for file headers.
    model: the model in memory, if there is calibration.
    seed: of quantizers that draw.

  Returns:
    A transform that quantizes each leaf as chosen.

  Raises:
    ValueError: if the budget cannot be met, naming the smallest possible.

  Example:
    >>> from treesurgeon import registry
    >>> tree = {"layers": {"0:1": {"up": {"kernel": jnp.ones((1, 64, 8))}}}}
    >>> m = model_lib.Model(None, tree)
    >>> rtn = registry.load("compress.quantize.rtn")
    >>> some = configurations(rtn, bits=(2, 4), group_sizes=(64,))
    >>> plan(some, m, collect.Materials(), 300)
    (by_path([('layers/0/up/kernel', compress.quantize.rtn(group_size=64))]),)
  """
  measured = measure(choices, source, materials, model=model, seed=seed)
  fixed = spare + sum(
    leaves.nbytes(source.struct(a)) for a in source.addresses() if a not in measured
  )
  costs = [x.nbytes for x in measured.values()]
  least = fixed + sum(map(min, costs))
  if least > budget:
    raise ValueError(
      f"a budget of {int(budget):,} bytes cannot be met; the smallest possible is {least:,}, of "
      f"which {fixed:,} are file headers and what {choices[0][0].info['name']} leaves as it is"
    )
  picks = allocate.solve(costs, [x.losses for x in measured.values()], budget - fixed)
  taken: dict[int, list[str]] = {}
  for address, pick in zip(measured, picks, strict=True):
    taken.setdefault(pick, []).append(address)
  return step.by_path(
    [("|".join(map(re.escape, names)), choices[i]) for i, names in sorted(taken.items())]
  )


def measure(
  choices: Sequence[step.Transform],
  source: needs.Source,
  materials: collect.Materials,
  *,
  model: model_lib.Model | None = None,
  seed: int = 0,
) -> dict[str, Measured]:
  """Quantize each leaf in each configuration, and tell what that costs and loses.

  Args:
    choices: as for `plan`.
    source: as for `plan`.
    materials: as for `plan`.
    model: as for `plan`.
    seed: as for `plan`.

  Returns:
    Address to what was measured.

  Raises:
    ValueError: for configurations that are not one step that changes each leaf by itself.

  Example:
    >>> from treesurgeon import registry
    >>> m = model_lib.Model(None, {"kernel": jnp.ones((8, 2))})
    >>> (one,) = measure([registry.parse("compress.quantize.rtn(select='kernel')")], m,
    ...                  collect.Materials()).values()
    >>> one.nbytes
    [16]
  """
  names = list(source.addresses())
  steps = [_only_step(c) for c in choices]
  collect.require(steps[0], materials)
  units = steps[0].units(names)
  torn = [u for u in units if len(u) > 1]
  if torn or steps[0].scope == "model":
    raise ValueError(
      f"{steps[0]!r} does not quantize each leaf by itself, so no leaf can have its own width"
    )
  chosen = [a for (a,) in units]
  wants = dict(steps[0].needs)
  if model is not None:
    select = "|".join(map(re.escape, chosen))
    wants[_MOMENT] = needs.Statistic("second_moment", select)
    wants[_FISHER] = needs.Statistic("fisher", select)

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    notes = {}
    for address in m.addresses():
      if address not in chosen:
        continue
      found = [_one(s, m, address, evidence, key) for s in steps]
      notes[address] = [[n for n, _ in found], [float(x) for _, x in found]]
    return m.replace(aux={**m.aux, "notes": notes})

  info = {"name": "measure", "arguments": {}, "given": {}}
  one = step.Step(wants, apply, steps[0].scope, info, lambda names: units)
  if model is None:
    (record,) = drivers.stream((one,), source, _Nowhere(), materials, seed=seed)
  else:
    record = drivers.run_blockwise((one,), model, materials, seed=seed).lineage[-1]
  return {a: Measured(*record.notes[a]) for a in chosen}


_MOMENT, _FISHER = "moment of budget", "fisher of budget"


def _one(
  one: step.Step, m: model_lib.Model, address: str, evidence: needs.Evidence, key: jax.Array
) -> tuple[int, jax.Array]:
  part = model_lib.Part(m.spec, {address: m.leaf(address)})
  given = {n: evidence[n] for n in one.needs}
  made = one.apply(part, given, key).leaf(address)
  of = {n: evidence[n][address] if n in evidence else None for n in (_MOMENT, _FISHER)}
  return leaves.nbytes(made), _loss(m.leaf(address), made, of[_MOMENT], of[_FISHER])


@jax.jit
def _loss(w: Any, made: Any, moment: Any, fisher: Any) -> jax.Array:
  w = leaves.dense(w).astype(jnp.float32)
  wrong = leaves.dense(made).astype(jnp.float32) - w
  if moment is None:
    return (wrong**2).sum() / jnp.maximum((w**2).sum(), jnp.finfo(jnp.float32).tiny)
  h = moment.moment
  out = (jnp.matmul(h, wrong, precision="highest") * wrong).sum()
  scale = jnp.trace(h, axis1=-2, axis2=-1).sum() * w.shape[-1]
  return out * fisher.sum() / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)


def _only_step(choice: step.Transform) -> step.Step:
  if len(choice) != 1:
    raise ValueError(f"{step.spell(choice)} has {len(choice)} steps; a budget is for one quantizer")
  return choice[0]


class _Nowhere:
  """A sink that keeps nothing."""

  def done(self, address: str) -> bool:
    del address
    return False

  def write(self, address: str, leaf: Any) -> None:
    del address, leaf
