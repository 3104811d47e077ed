# SPDX-License-Identifier: Apache-2.0
"""The drivers: they own loops, data and devices; methods own mathematics.

`run` gathers a step's evidence from the model as it stands and applies the step. `run_blockwise`
walks through the blocks and lets each see inputs from the already changed blocks before it (GPTQ).
`stream` reads, changes and writes one leaf (or group of leaves) at a time, for models larger than
memory. A leaf step gives the same bits under all three.
"""

import collections
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import lineage, meshes, needs, paths, pieces, step
from treesurgeon.core import model as model_lib
from treesurgeon.io import blocks
from treesurgeon.run import blockwise, collect, dry, pipeline, progress, statistics


@runtime_checkable
class Sink(Protocol):
  """Where `stream` and `stream_blocks` put finished leaves.

  One that goes through `core.pieces.Pieces` as it writes says so by an attribute `pieces = True`;
  others are given arrays.
  """

  def done(self, address: str) -> bool:
    """Tell whether an earlier, interrupted run has written this leaf already."""
    ...

  def write(self, address: str, leaf: Any) -> None:
    """Write one leaf."""
    ...


@runtime_checkable
class BlockSink(Sink, Protocol):
  """A sink from which a later run can go on after any block.

  Attributes:
    state: what `flush` was last given, by an earlier run too; empty before.
  """

  state: Mapping[str, Any]

  def leaf(self, address: str) -> Any:
    """Read back a leaf that is done."""
    ...

  def flush(self, state: Mapping[str, Any]) -> None:
    """Make what was written, and JSON beside it, outlive the process."""
    ...


def run(
  transform: step.Transform,
  model: model_lib.Model,
  materials: collect.Materials | None = None,
  *,
  seed: int = 0,
  first: int = 0,
) -> model_lib.Model:
  """Apply a transform to a whole model in memory.

  Args:
    transform: steps, first applied first.
    model: the model; not modified.
    materials: batches, donors and requests.
    seed: of everything random; step i uses `fold_in(key(seed), first + i)`.
    first: the first step's index, for who does again a part of a longer transform.

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
  return _each(transform, model, materials, seed, first, "run")


def run_blockwise(
  transform: step.Transform,
  model: model_lib.Model,
  materials: collect.Materials | None = None,
  *,
  seed: int = 0,
  first: int = 0,
) -> model_lib.Model:
  """Apply a transform block by block, each seeing the outputs of the changed blocks before it.

  Only one block's statistics are held at a time, and the hidden states of all batches. A step of
  scope "model" falls back to what `run` does. Fisher information is that of the unchanged model.

  Args:
    transform: steps, first applied first; each goes through all blocks before the next.
    model: the model; not modified.
    materials: batches, donors and requests.
    seed: of everything random, as for `run`.
    first: the first step's index.

  Returns:
    The changed model.

  Raises:
    ValueError: as `run`, and for a step that changes leaves of several blocks together.

  Example:
    >>> import jax, numpy as np
    >>> from treesurgeon import models, registry
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> text = collect.Materials(batches=[np.arange(8).reshape(2, 4) % 5])
    >>> m = run_blockwise(registry.parse("compress.quantize.gptq(bits=4)"), m, text)
    >>> m.lineage[0].driver
    'run_blockwise'
  """
  return _each(transform, model, materials, seed, first, "run_blockwise")


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
    collect.require(one, materials)
    units(one, source)
  dry.refuse_twice(transform, source)
  names = list(source.addresses())
  groups = _groups(transform, names)
  donors = [
    {n: collect.brought(one, need, source, materials) for n, need in one.needs.items()}
    for one in transform
  ]
  notes: list[dict[str, Any]] = [{} for _ in transform]

  def read(group: tuple[str, ...]) -> tuple[model_lib.Part, list[needs.Evidence]] | None:
    if all(sink.done(a) for a in group):
      return None
    part = model_lib.Part(source.spec, {a: source.leaf(a) for a in group}, late=late)
    # What is read from files comes as host arrays, and the readers refuse NaN.
    held = [(a, x) for a, x in part.params.items() if not isinstance(x, np.ndarray)]
    check_finite(held, "in the base model")
    evidence: list[needs.Evidence] = [
      {n: {a: d[a] for a in group if a in changed[i]} for n, d in donors[i].items()}
      for i in range(len(transform))
    ]
    return part, evidence

  def write(group: tuple[str, ...], part: model_lib.Part) -> None:
    for address in group:
      leaf = part.params[address]
      if isinstance(leaf, pieces.Pieces):
        leaf = leaf.watched(functools.partial(_check_piece, address, leaf, after[-1]))
      sink.write(address, leaf)

  late = getattr(sink, "pieces", False)
  changed = [{a for unit in one.units(names) for a in unit} for one in transform]
  keys = [_key(seed, i) for i in range(len(transform))]
  after = [f"after {one!r}" for one in transform]  # long where arguments vary over the model
  with pipeline.Pipeline(read, write, groups) as line:
    for group, item in progress.track(line, "leaves"):
      if item is None:
        continue
      part, evidence = item
      for i, one in enumerate(transform):
        before, part = part, one.apply(part, evidence[i], keys[i])
        check_finite(blockwise.changes(before, part).items(), after[i])
        notes[i] = blockwise.merged(notes[i], part.aux.get("notes", {}))
        part = part.replace(aux={})
      line.put(group, part)
  bare = model_lib.Model(source.spec, {})
  for i, one in enumerate(transform):
    bare = bare.replace(aux={"notes": notes[i]})
    bare = _record(one, bare, i, seed, "stream", materials)
  return bare.lineage


def stream_blocks(
  transform: step.Transform,
  source: needs.Source,
  sink: Sink,
  materials: collect.Materials | None = None,
  *,
  seed: int = 0,
) -> tuple[lineage.Record, ...]:
  """Apply a transform as `run_blockwise` does, from a source to a sink, one block in memory.

  Each block is read, goes through all the steps, is written, and then feeds the next. The outcome
  is that of `run_blockwise` to the bit.

  Args:
    transform: steps for which `block_streamable` holds.
    source: the base model.
    sink: where finished leaves go. A `BlockSink` is told when a block is complete; a run that
      follows a killed one reads such blocks back and goes on behind them.
    materials: batches and donors.
    seed: of everything random.

  Returns:
    The lineage records of the steps.

  Raises:
    ValueError: for a step that cannot be cut into blocks, and as `run_blockwise`.
  """
  materials = materials or collect.Materials()
  for one in transform:
    refuse_unblockable(one)
    collect.require(one, materials)
    units(one, source)
  dry.refuse_twice(transform, source)
  old = sink.state.get("notes") if isinstance(sink, BlockSink) else None
  walks = []
  for i, one in enumerate(transform):
    kept = {n: w for n, w in one.needs.items() if isinstance(w, needs.Donors)}
    given = {n: collect.brought(one, w, source, materials) for n, w in kept.items()}
    aux = {"notes": old[i]} if old else {}
    key, check = _key(seed, i), _checked(one)
    walks.append(blockwise.Walk(one, source, materials, key, given, check=check, aux=aux))

  def put(part: Mapping[str, Any]) -> None:
    for address, leaf in part.items():
      sink.write(address, leaf)
    for one in walks:
      one.aux = {"notes": one.aux.get("notes", {})}  # by-products of a block end with it
    if isinstance(sink, BlockSink):
      sink.flush({"notes": [one.aux["notes"] for one in walks]})

  def passed(names: list[str]) -> dict[str, Any] | None:
    if not isinstance(sink, BlockSink) or not all(map(sink.done, names)):
      return None
    return {a: sink.leaf(a) for a in names}

  blockwise.go(walks, source, materials, put, passed=passed)
  bare = model_lib.Model(source.spec, {})
  for i, (one, mine) in enumerate(zip(transform, walks, strict=True)):
    bare = bare.replace(aux=mine.aux)
    bare = _record(one, bare, i, seed, "run_blockwise", materials)
  return bare.lineage


def block_streamable(transform: step.Transform, source: needs.Source) -> bool:
  """Tell whether `stream_blocks` can run a transform on a model.

  Args:
    transform: any transform.
    source: the model.

  Returns:
    True if no step takes the whole model, or changes leaves of several blocks together.

  Example:
    >>> from treesurgeon import registry
    >>> tree = {"layers": {"0:1": {"mlp": {"up": {"kernel": np.ones((1, 2, 2))}}}}}
    >>> m = model_lib.Model(None, tree)
    >>> block_streamable(registry.parse("compress.quantize.gptq()"), m)
    True
    >>> block_streamable(registry.parse("grow.g_stack()"), m)
    False
  """
  try:
    for one in transform:
      refuse_unblockable(one)
      blockwise.refuse_torn(one, units(one, source))
  except paths.NoMatch:
    raise
  except ValueError:
    return False
  return True


def units(one: step.Step, source: needs.Source) -> step.Units:
  """List what a step changes together in a model.

  Args:
    one: the step.
    source: the model.

  Returns:
    Groups of addresses.

  Raises:
    ValueError: if it would change nothing; a head that it cannot find because it is tied is told.
  """
  names = list(source.addresses())
  try:
    return one.units(names)
  except paths.NoMatch:
    if not getattr(source.spec, "tied", False):
      raise
    try:
      one.units([*names, _HEAD])
    except ValueError:
      pass
    else:
      raise paths.NoMatch(
        f"{_HEAD}: the head is tied to the embedding, so {one!r} finds no kernel of its own; chain "
        "compress.quantize.untie() before it to change one use without the other"
      ) from None
    raise


_HEAD = "lm_head/kernel"


def refuse_unblockable(one: step.Step) -> None:
  """Raise if a step cannot be streamed block by block.

  Args:
    one: a step.

  Raises:
    ValueError: naming the step and the reason.
  """
  if one.scope == "model":
    raise ValueError(f"{one!r} works on a whole model, so it cannot be streamed")
  odd = [
    n for n, w in one.needs.items() if not isinstance(w, needs.Donors) and not blockwise.by_block(w)
  ]
  if odd:
    raise ValueError(f"{one!r} needs {odd[0]} of the whole model, so it cannot be streamed")


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
    named: (address, leaf) pairs; a stacked leaf is named by its segment, "layers/0:12/...".
    where: for the message: in which model, or after which step.

  Raises:
    ValueError: naming the address and how many values are not finite.
  """
  arrays = [
    (address, x)
    for address, leaf in named
    for x in jax.tree.leaves(leaf)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  # All are sent off before the first answer is awaited.
  for (address, x), fine in zip(arrays, [_finite(x) for _, x in arrays], strict=True):
    if fine:
      continue
    parts = address.split("/")
    if ":" in parts[0 if len(parts) < 2 else 1]:
      start, bad = int(parts[1].split(":")[0]), np.asarray(_count_bad(x, axis=1))
      i = int(np.argmax(bad > 0))
      address, count, size = "/".join([parts[0], str(start + i), *parts[2:]]), bad[i], x[i].size
    else:
      count, size = _count_bad(x, axis=0), x.size
    raise ValueError(f"{address}: {int(count)} of {size} values are NaN or infinite {where}")


def _each(
  transform: step.Transform,
  model: model_lib.Model,
  materials: collect.Materials | None,
  seed: int,
  first: int,
  driver: str,
) -> model_lib.Model:
  """Apply the steps one after another; arrays of an explicit mesh are relabelled meanwhile."""
  materials = materials or collect.Materials()
  _check(transform, model, materials)
  mesh = meshes.explicit_mesh(model.params)
  model = model.replace(params=meshes.to_auto(model.params), aux=meshes.to_auto(dict(model.aux)))
  for i, one in enumerate(transform, first):
    units(one, model)
    if any(before.scope == "model" for before in transform[: i - first]):
      dry.refuse_twice((one,), model)
    if driver == "run" or one.scope == "model":
      changed = _apply(one, model, materials, _key(seed, i))
      check_finite(blockwise.changes(model, changed).items(), f"after {one!r}")
    else:
      changed = blockwise.walk(one, model, materials, _key(seed, i), check=_checked(one))
    model = _record(one, changed, i, seed, driver, materials)
  return model.replace(
    params=meshes.to_explicit(model.params, mesh), aux=meshes.to_explicit(model.aux, mesh)
  )


def _apply(
  one: step.Step, model: model_lib.Model, materials: collect.Materials, key: jax.Array
) -> model_lib.Model:
  """Apply a step to a whole model; its evidence is let go before the next step's is gathered."""
  evidence = collect.evidence(one, model, materials)
  own = {
    n: w
    for n, w in one.needs.items()
    if isinstance(w, needs.Statistic) and w.of == "model" and blockwise.by_block(w)
  }
  odd = statistics.remarks(own, evidence, set())
  changed = one.apply(model, evidence, key)
  aux = dict(changed.aux)
  for name, found in odd.items():
    aux = blockwise.noted(aux, name, found)
  return changed.replace(aux=aux)


def _checked(one: step.Step) -> Callable[[Mapping[str, Any]], None]:
  return lambda part: check_finite(part.items(), f"after {one!r}")


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
    inputs=materials.inputs,
    recipe=dict(materials.recipe),
    versions=lineage.versions(),
    notes=aux.pop("notes", {}),
  )
  (record,) = lineage.from_json(json.loads(json.dumps(lineage.to_json((record,)))))
  return model.replace(lineage=(*model.lineage, record), aux=aux)


def _check(transform: step.Transform, model: model_lib.Model, materials: collect.Materials) -> None:
  """Find mistakes before any work is done: things not brought, selections, weights not finite."""
  for one in transform:
    collect.require(one, materials)
  for i, one in enumerate(transform):
    units(one, model)
    if one.scope == "model":
      transform = transform[:i]  # what follows is checked when it is known what it makes
      break
  dry.refuse_twice(transform, model)
  check_finite(_leaves(model), "in the model")


def _leaves(model: model_lib.Model) -> Iterable[tuple[str, Any]]:
  return paths.walk(model.params).items()


def _key(seed: int, index: int) -> jax.Array:
  return _folded(np.uint32(seed & 0xFFFFFFFF), index)  # what `jax.random.key` sees of it too


@jax.jit  # one program, where the parts of it would be several
def _folded(seed: jax.typing.ArrayLike, index: jax.typing.ArrayLike) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), index)


def _check_piece(address: str, whole: pieces.Pieces, where: str, piece: np.ndarray) -> None:
  if not blocks.finite(piece):
    check_finite([(address, np.asarray(whole))], where)


def _finite(x: Any) -> Any:
  """Look at what host memory holds where it lies; on devices, check there and do not wait."""
  if isinstance(x, pieces.Pieces):
    return True  # each piece is looked at when it is computed
  if isinstance(x, np.ndarray):
    return blocks.finite(x)
  near = isinstance(x, jax.Array) and x.is_fully_addressable
  if near and [d.platform for d in x.devices()] == ["cpu"]:
    return blocks.finite(np.asarray(x))
  return _finite_there(x)


@jax.jit
def _finite_there(x: jax.Array) -> jax.Array:
  return jnp.isfinite(x).all()


@functools.partial(jax.jit, static_argnames="axis")
def _count_bad(x: jax.Array, *, axis: int) -> jax.Array:
  return (~jnp.isfinite(x)).sum(axis=tuple(range(axis, x.ndim)))
