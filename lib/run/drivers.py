# SPDX-License-Identifier: Apache-2.0
"""The drivers: they own loops, data and devices; methods own mathematics.

`run` gathers a step's evidence from the model as it stands and applies the step. `run_blockwise`
walks through the blocks and lets each see inputs from the already changed blocks before it (GPTQ).
`stream` reads, changes and writes one leaf (or group of leaves) at a time, for models larger than
memory. A leaf step gives the same bits under all three.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import lineage, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.run import collect, progress


@runtime_checkable
class Sink(Protocol):
  """Where `stream` puts finished leaves."""

  def done(self, address: str) -> bool:
    """Tell whether an earlier, interrupted run has written this leaf already."""
    ...

  def write(self, address: str, leaf: Any) -> None:
    """Write one leaf."""
    ...


def run(
  transform: step.Transform,
  model: model_lib.Model,
  materials: collect.Materials | None = None,
  *,
  seed: int = 0,
) -> model_lib.Model:
  """Apply a transform to a whole model in memory.

  Args:
    transform: steps, first applied first.
    model: the model; not modified.
    materials: batches, donors and requests.
    seed: of everything random; step i uses `fold_in(key(seed), i)`.

  Returns:
    The changed model, with one lineage record more a step.

  Raises:
    ValueError: for missing evidence, a selection without a match, or weights that are not finite.

  Example:
    >>> import jax.numpy as jnp
    >>> from treesurgeon import registry
    >>> tree = {"layers": {"0:1": {"mlp": {"up": {"kernel": jnp.ones((1, 8, 4))}}}}}
    >>> m = run(registry.parse("compress.quantize.rtn(bits=4)"), model_lib.Model(None, tree))
    >>> m.leaf("layers/0/mlp/up/kernel").bits
    4
  """
  materials = materials or collect.Materials()
  _check(transform, model)
  for i, one in enumerate(transform):
    evidence = collect.evidence(one, model, materials)
    changed = one.apply(model, evidence, _key(seed, i))
    model = _record(one, changed, i, seed, "run", materials)
    check_finite(_leaves(model), f"after {one!r}")
  return model


def run_blockwise(
  transform: step.Transform,
  model: model_lib.Model,
  materials: collect.Materials | None = None,
  *,
  seed: int = 0,
) -> model_lib.Model:
  """Apply a transform block by block, each seeing the outputs of the changed blocks before it.

  Only one block's statistics are held at a time, and the hidden states of all batches. A step of
  scope "model" falls back to what `run` does.

  Args:
    transform: steps, first applied first; each goes through all blocks before the next.
    model: the model; not modified.
    materials: batches, donors and requests.
    seed: of everything random.

  Returns:
    The changed model.

  Raises:
    ValueError: as `run`.

  Example:
    >>> import jax, numpy as np
    >>> from treesurgeon import models, registry
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> text = collect.Materials(batches=[np.array([[1, 2, 3, 4]])])
    >>> m = run_blockwise(registry.parse("compress.quantize.gptq(bits=4)"), m, text)
    >>> m.lineage[0].driver
    'run_blockwise'
  """
  materials = materials or collect.Materials()
  _check(transform, model)
  for i, one in enumerate(transform):
    if one.scope == "model":
      changed = one.apply(model, collect.evidence(one, model, materials), _key(seed, i))
    else:
      changed = _blockwise(one, model, materials, _key(seed, i))
    model = _record(one, changed, i, seed, "run_blockwise", materials)
    check_finite(_leaves(model), f"after {one!r}")
  return model


def stream(
  transform: step.Transform,
  source: needs.Source,
  sink: Sink,
  materials: collect.Materials | None = None,
  *,
  seed: int = 0,
) -> tuple[lineage.Record, ...]:
  """Apply a transform leaf by leaf from a source to a sink, in bounded memory.

  Args:
    transform: steps of scope "leaf" that need no statistics.
    source: the base model.
    sink: where finished leaves go; leaves it has already are not computed again.
    materials: donors.
    seed: of everything random.

  Returns:
    The lineage records of the steps.

  Raises:
    ValueError: for a step that cannot be cut into leaves, and as `run`.
  """
  materials = materials or collect.Materials()
  for one in transform:
    refuse_unstreamable(one)
  names = list(source.addresses())
  donors = [
    {n: collect.brought(one, need, source, materials) for n, need in one.needs.items()}
    for one in transform
  ]
  for group in progress.track(_groups(transform, names), "leaves"):
    if all(sink.done(a) for a in group):
      continue
    part = model_lib.Part(source.spec, {a: source.leaf(a) for a in group})
    check_finite(part.params.items(), "in the base model")
    for i, one in enumerate(transform):
      part = one.apply(part, donors[i], _key(seed, i))
    check_finite(part.params.items(), f"after {step.spell(transform)}")
    for address in group:
      sink.write(address, part.leaf(address))
  bare = model_lib.Model(source.spec, {})
  for i, one in enumerate(transform):
    bare = _record(one, bare, i, seed, "stream", materials)
  return bare.lineage


def streamable(transform: step.Transform) -> bool:
  """Tell whether `stream` can run a transform.

  Args:
    transform: any transform.

  Returns:
    True if every step works leaf by leaf without statistics.

  Example:
    >>> from treesurgeon import registry
    >>> streamable(registry.parse("compress.quantize.rtn()"))
    True
  """
  try:
    for one in transform:
      refuse_unstreamable(one)
  except ValueError:
    return False
  return True


def refuse_unstreamable(one: step.Step) -> None:
  """Raise if a step cannot be streamed.

  Args:
    one: a step.

  Raises:
    ValueError: naming the step and the reason.
  """
  if one.scope != "leaf":
    raise ValueError(f"{one!r} works on a whole {one.scope}, so it cannot be streamed")
  odd = [n for n, need in one.needs.items() if not isinstance(need, needs.Donors)]
  if odd:
    raise ValueError(f"{one!r} needs {odd[0]} from calibration, so it cannot be streamed")


def check_finite(named: Iterable[tuple[str, Any]], where: str) -> None:
  """Refuse NaN and infinite weights.

  Args:
    named: (address, leaf) pairs.
    where: for the message: in which model, or after which step.

  Raises:
    ValueError: naming the address and how many values are not finite.
  """
  for address, leaf in named:
    for x in jax.tree.leaves(leaf):
      if jnp.issubdtype(x.dtype, jnp.floating) and not _finite(x):
        bad = int(np.sum(~np.isfinite(np.asarray(x, np.float32))))
        raise ValueError(f"{address}: {bad} of {x.size} values are NaN or infinite {where}")


def _blockwise(
  one: step.Step, model: model_lib.Model, materials: collect.Materials, key: jax.Array
) -> model_lib.Model:
  names = model.addresses()
  chosen = {a for unit in one.units(names) for a in unit}
  taps = {n: w for n, w in one.needs.items() if isinstance(w, needs.Statistic)}
  given: dict[str, Any] = {}
  for name, need in one.needs.items():
    if isinstance(need, needs.Statistic):
      if need.fold == "fisher":
        given[name] = collect.fisher(model, materials.batches)
        taps.pop(name)
    else:
      given[name] = collect.brought(one, need, model, materials)
  want = collect.wanted(taps, names)
  per_layer = collect.by_layer(want)
  batches = list(materials.batches) if want else []
  if want and not batches:
    raise ValueError(f"{one!r} needs calibration text and none was given")

  def change(part: Mapping[str, Any], states: Mapping[int, Any], layer: int) -> dict[str, Any]:
    mine = {k: v for k, v in want.items() if collect.layer_of(k[1]) == layer}
    seen = collect.covered(mine, states)
    evidence = dict(given)
    for name, need in taps.items():
      evidence[name] = {a: s for (fold, a), s in seen.items() if fold == need.fold}
    out = one.apply(model_lib.Part(model.spec, part, aux=model.aux), evidence, key)
    return {a: x for a, x in out.params.items() if x is not part[a]}

  early = {a: model.leaf(a) for a in names if a in chosen and a.startswith("embed/")}
  model = model.update(change(early, {}, -2))
  hidden = [collect.embed(model, b) for b in batches]
  changes: dict[str, Any] = {}
  for layer, place, tree in progress.track(_by_layer(model.params), "blocks"):
    part = {f"layers/{layer}/{s}": paths.take(x, place) for s, x in paths.walk(tree).items()}
    pairs, states = per_layer.get(layer, ()), None
    for h in hidden if pairs else ():
      _, states = collect.through_block(model.spec, tree, h, layer, pairs, states, index=place)
    touched = {a: x for a, x in part.items() if a in chosen}
    new = change(touched, {layer: states}, layer) if touched else {}
    changes.update(new)
    nested = paths.nest({a.split("/", 2)[2]: new.get(a, x) for a, x in part.items()})
    hidden = [collect.through_block(model.spec, nested, h, layer, (), None)[0] for h in hidden]
  model = model.update(changes)
  states = None
  for h in hidden if -1 in per_layer else ():
    states = collect.at_head(model.spec, model.params, h, per_layer[-1], states)
  late = {
    a: model.leaf(a) for a in names if a in chosen and not a.startswith(("embed/", "layers/"))
  }
  return model.update(change(late, {-1: states}, -1))


def _by_layer(params: paths.Params) -> list[tuple[int, int, Any]]:
  """List (layer, its place in the segment, the segment's tree)."""
  return [
    (i, i - start, tree) for start, stop, tree in paths.segments(params) for i in range(start, stop)
  ]


def _groups(transform: step.Transform, names: Sequence[str]) -> list[tuple[str, ...]]:
  """Merge all steps' units into groups of addresses that must be in memory together."""
  parent = {n: n for n in names}

  def root(n: str) -> str:
    while parent[n] != n:
      parent[n] = parent[parent[n]]
      n = parent[n]
    return n

  for one in transform:
    for unit in one.units(names):
      for other in unit[1:]:
        parent[root(other)] = root(unit[0])
  groups = collections.defaultdict(list)
  for n in names:
    groups[root(n)].append(n)
  return [tuple(g) for g in groups.values()]


def _record(
  one: step.Step,
  model: model_lib.Model,
  index: int,
  seed: int,
  driver: str,
  materials: collect.Materials,
) -> model_lib.Model:
  aux = dict(model.aux)
  record = lineage.Record(
    expression=step.spell((one,)),
    arguments=one.info["arguments"],
    seed=seed,
    index=index,
    driver=driver,
    inputs=dict(materials.digests),
    versions=lineage.versions(),
    notes=aux.pop("notes", {}),
  )
  return model.replace(lineage=(*model.lineage, record), aux=aux)


def _check(transform: step.Transform, model: model_lib.Model) -> None:
  """Find mistakes before any work is done: selections of the first step, weights not finite."""
  for one in transform[:1]:
    one.units(model.addresses())
  check_finite(_leaves(model), "in the model")


def _leaves(model: model_lib.Model) -> Iterable[tuple[str, Any]]:
  return paths.walk(model.params).items()


def _key(seed: int, index: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), index)


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
  return jnp.isfinite(x).all()
