# SPDX-License-Identifier: Apache-2.0
"""Gather what steps need: statistics in one pass over the data, donors, requests."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from treesurgeon.core import meshes, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.run import activations, gradients, statistics
from treesurgeon.run import donors as donors_lib


@dataclasses.dataclass(frozen=True)
class Materials:
  """What the caller brings for the steps to use.

  Attributes:
    batches: token batches (batch, length), or mappings of arrays such as {"inputs", "labels"}
      (`models.losses`), iterated as often as needed.
    donors: other models, read leaf by leaf.
    donor_batches: each donor's own batches, or the calibration sets of a step that takes several;
      empty gives every donor `batches`.
    requests: edit requests; None if there are none to hand over, which a step that needs some
      refuses.
    open_model: resolves a donor's name in an expression to a source.
    read_requests: resolves a request file's name in an expression.
    digests: role ("base", "donor 0", "calibration") to sha256, for the lineage.
    recipe: how batches and models were prepared, see `lineage.Record`.
    room: devices and memory for calibration.
  """

  batches: Sequence[Any] | Iterable[Any] = ()
  donors: Sequence[needs.Source] = ()
  donor_batches: Sequence[Sequence[Any] | Iterable[Any]] = ()
  requests: Sequence[Any] | None = None
  open_model: Callable[[str], needs.Source] | None = None
  read_requests: Callable[[str], Sequence[Any]] | None = None
  digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
  recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  room: activations.Room = activations.HERE

  @functools.cached_property
  def inputs(self) -> dict[str, str]:
    """Digests of everything brought: those given, and one of the batches where they can be read."""
    found = dict(self.digests)
    if isinstance(self.batches, Sequence | np.ndarray) and len(self.batches):
      found["batches"] = digest(self.batches)
    for i, batches in enumerate(self.donor_batches):
      if isinstance(batches, Sequence | np.ndarray) and len(batches):
        found[f"batches of donor {i}"] = digest(batches)
    return found


def evidence(one: step.Step, model: model_lib.Model, materials: Materials) -> needs.Evidence:
  """Gather everything a step needs, with one pass over the batches.

  Args:
    one: the step.
    model: the model as it stands.
    materials: what the caller brought.

  Returns:
    The step's evidence.

  Raises:
    ValueError: if something needed was not brought, names no leaf, or collected nothing.
  """
  require(one, materials)
  model = model.replace(params=meshes.to_auto(model.params))
  return given(one, model, materials, list(one.needs))


def given(
  one: step.Step, model: model_lib.Model, materials: Materials, names: Sequence[str]
) -> dict[str, Any]:
  """Gather some of a step's needs, with one pass over each collection of batches.

  Args:
    one: the step.
    model: the model as it stands, on automatic axes.
    materials: what the caller brought; `require` has looked it through.
    names: which needs.

  Returns:
    Need's name to evidence.

  Raises:
    ValueError: as `evidence`.
  """
  out: dict[str, Any] = {}
  asked = {n: w for n in names if isinstance(w := one.needs[n], needs.Statistic)}
  own = {n: w for n, w in asked.items() if w.of == "model"}
  taps = {n: w for n, w in own.items() if w.fold not in gradients.FOLDS}
  spread = model.replace(params=materials.room.everywhere(model.params))
  if taps:
    collected = statistics.tap_statistics(
      spread, statistics.wanted(taps, model.addresses()), materials.batches, materials.room
    )
    for name, need in taps.items():
      out[name] = {a: s for (fold, a), s in collected.items() if fold == need.fold}
  for name in own.keys() - taps.keys():
    out[name] = gradients.take(own[name], model, materials.batches)
  for name, need in asked.items():
    if need.of == "sets":
      sets = materials.donor_batches or [materials.batches]
      out[name] = donors_lib.Together([gradients.take(need, model, b) for b in sets])
  theirs = {n: w for n, w in asked.items() if w.of == "donors"}
  if theirs:
    found = sources(one, model, materials)
    dealt = donors_lib.deal(materials.batches, materials.donor_batches, len(found))
    out |= donors_lib.gather(theirs, found, dealt, model.addresses())
  for name in names:
    need = one.needs[name]
    if isinstance(need, needs.Blocks):
      out[name] = statistics.blocks(
        spread, materials.batches, select=need.select, room=materials.room
      )
    elif not isinstance(need, needs.Statistic):
      out[name] = brought(one, need, model, materials)
  return out


def require(one: step.Step, materials: Materials) -> None:
  """Refuse a step whose needs were not brought, before any work is done.

  Args:
    one: the step.
    materials: what the caller brought.

  Raises:
    ValueError: naming the step and what it lacks.
  """
  for need in one.needs.values():
    if isinstance(need, needs.Statistic | needs.Batches | needs.Blocks):
      of = "model" if isinstance(need, needs.Blocks) else need.of
      own = materials.donor_batches if of != "model" else ()
      for i, batches in enumerate(own or [materials.batches]):
        whose = "" if not own else f" for donor {i}" if of == "donors" else f" in set {i}"
        if iter(batches) is batches:
          raise ValueError(f"{one!r}: calibration batches are read more than once; give a list")
        if hasattr(batches, "__len__") and not len(batches):  # pyright: ignore[reportArgumentType]
          raise ValueError(f"{one!r} needs calibration text{whose} and none was given")
      if of != "model" and (count := _donor_count(one, materials)):
        donors_lib.deal(materials.batches, own, count)
    elif isinstance(need, needs.Donors):
      if need.models and materials.open_model is None:
        raise ValueError(f"{one!r}: no way was given to open models by name; pass donors instead")
      if not need.models and not materials.donors:
        raise ValueError(f"{one!r} needs donor models and none was given")
    elif isinstance(need, needs.Requests):
      if need.path and materials.read_requests is None:
        raise ValueError(f"{one!r}: no way was given to read {need.path!r}; pass requests instead")
      if not need.path and materials.requests is None:
        raise ValueError(f"{one!r} needs edit requests and none were given")


def digest(batches: Iterable[Any]) -> str:
  """Hash batches.

  Args:
    batches: integer arrays, or mappings of arrays.

  Returns:
    Hexadecimal sha256 of names, shapes and values, whatever the integer type.

  Example:
    >>> digest([np.array([[1, 2]], np.int32)]) == digest([np.array([[1, 2]], np.int64)])
    True
  """
  found = hashlib.sha256()
  for batch in batches:
    named = sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]
    for name, values in named:
      array = np.asarray(values)
      array = array.astype(np.float64 if np.issubdtype(array.dtype, np.floating) else np.int64)
      found.update(name.encode() + repr(array.shape).encode() + array.tobytes())
  return found.hexdigest()


def brought(one: step.Step, need: needs.Need, base: needs.Source, materials: Materials) -> Any:
  """Resolve a need that is not a statistic.

  Args:
    one: the step, for messages.
    need: donors, requests or batches.
    base: the model that donors must match.
    materials: what the caller brought.

  Returns:
    Donors as a mapping from address to a tuple of leaves; requests or batches as they are;
    batches of donors as a tuple of each donor's, one entry where they share.

  Raises:
    ValueError: if it was not brought, or a donor's leaves differ from the base's.
  """
  require(one, materials)
  if isinstance(need, needs.Donors):
    return needs.Aligned(_opened(need, base, materials), lazy=need.lazy)
  if isinstance(need, needs.Requests):
    if need.path and materials.read_requests is not None:
      return list(materials.read_requests(need.path))
    return list(materials.requests or ())
  donors = isinstance(need, needs.Batches) and need.of == "donors"
  if donors and materials.donor_batches:
    return tuple(materials.donor_batches)
  return (materials.batches,) if donors else materials.batches


def sources(one: step.Step, base: needs.Source, materials: Materials) -> list[needs.Source]:
  """Open the donors whose statistics a step wants.

  Args:
    one: the step, which needs donors too.
    base: the model that donors must match.
    materials: what the caller brought.

  Returns:
    The donors.

  Raises:
    ValueError: if a donor's leaves differ from the base's, or rules of `by_path` name different
      donors.
  """
  found = {w for w in one.needs.values() if isinstance(w, needs.Donors)}
  if len(found) != 1:
    raise ValueError(
      f"{one!r}: statistics are taken of one set of donors, and {len(found)} are named; chain the "
      "rules as steps of their own"
    )
  return _opened(found.pop(), base, materials)


def check_alike(base: needs.Source, other: needs.Source, role: str, *, leaves: bool = True) -> None:
  """Refuse a donor whose vocabulary, leaves or shapes differ from the base's, before any is read.

  Args:
    base: the model to be changed.
    other: the donor.
    role: what to call the donor in messages.
    leaves: whether leaves and shapes matter, or the vocabulary alone.

  Raises:
    ValueError: naming the first difference.
  """
  mine, theirs = base.spec, other.spec
  rows = [getattr(s, "vocab_size", None) for s in (mine, theirs)]  # classifiers have none
  if None not in rows and rows[0] != rows[1]:
    raise ValueError(
      f"{role} has a vocabulary of {rows[1]} tokens, the base has {rows[0]}; "
      "give the models one tokenizer before merging"
    )
  if not leaves:
    return
  a, b = set(base.addresses()), set(other.addresses())
  if a != b:
    odd = sorted(a ^ b, key=paths.natural)[0]
    where = f"{role} lacks it" if odd in a else f"only {role} has it"
    raise ValueError(f"{odd}: {where}; merged models must have the same leaves")
  for address in base.addresses():
    want, have = base.struct(address).shape, other.struct(address).shape
    if want != have:
      raise ValueError(
        f"{address}: {role} has shape {tuple(have)}, the base has {tuple(want)}; merged models "
        "must have equal shapes"
      )
  for field in ("num_heads", "num_kv_heads", "head_dim"):  # which equal shapes do not tell
    want, have = getattr(mine, field, None), getattr(theirs, field, None)
    if want != have:
      raise ValueError(
        f"{role} has {field}={have}, the base has {want}; merged models must agree in it"
      )


def _opened(need: needs.Donors, base: needs.Source, materials: Materials) -> list[needs.Source]:
  found = list(materials.donors)
  if need.models and materials.open_model is not None:
    found = [materials.open_model(name) for name in need.models]
  for i, source in enumerate(found):
    check_alike(base, source, f"donor {i}", leaves=need.alike)
  return found


def _donor_count(one: step.Step, materials: Materials) -> int:
  return sum(
    len(need.models) or len(materials.donors)
    for need in one.needs.values()
    if isinstance(need, needs.Donors)
  )
