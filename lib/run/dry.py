# SPDX-License-Identifier: Apache-2.0
"""Find out what a transform would make, without data and without work.

Every step runs under `jax.eval_shape`: shapes, dtypes and bytes of the result are known before a
weight is read, and a mistake in an expression is found as early.
"""

from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon import models, stats
from treesurgeon.core import leaves, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.run import describe, gradients, statistics

_QUANTIZERS = "compress.quantize."  # how their names begin


def dry_run(transform: step.Transform, model: model_lib.Model, *, donors: int = 1) -> Any:
  """Apply a transform to shapes.

  Args:
    transform: steps, first applied first.
    model: a model whose leaves may be `jax.ShapeDtypeStruct`s.
    donors: how many donors a merge would be handed, where its expression names none.

  Returns:
    A model whose leaves are `jax.ShapeDtypeStruct`s, or compressed leaves of them. Edits are
    taken without requests, so they leave every leaf as it is.

  Raises:
    ValueError: as the transform itself would.

  Example:
    >>> from treesurgeon import registry
    >>> tree = {"layers": {"0:2": {"mlp": {"up": {"kernel": jnp.zeros((2, 64, 8))}}}}}
    >>> quantize = registry.parse("compress.quantize.rtn(bits=4)")
    >>> dry_run(quantize, model_lib.Model(None, tree)).nbytes()
    576
  """
  model = model.replace(params=jax.tree.map(_bare, model.params), aux={})
  for one in transform:
    names = model.addresses()
    one.units(names)
    merged = [w for w in one.needs.values() if isinstance(w, needs.Donors)]
    count = next((len(w.models) for w in merged if w.models), donors)
    evidence = {n: _evidence(need, model, names, count) for n, need in one.needs.items()}
    specs = []

    def apply(params: Any, evidence: Any, one: Any = one, old: Any = model, to: Any = specs) -> Any:
      new = one.apply(old.replace(params=params), evidence, jax.random.key(0))
      to.append(new.spec)
      return new.params

    params = jax.eval_shape(apply, model.params, evidence)
    model = model.replace(spec=specs[-1], params=params)
  return model


def refuse_twice(transform: step.Transform, source: needs.Source) -> None:
  """Refuse to quantize what is quantized already, unless it is left as it is.

  Args:
    transform: steps, first applied first.
    source: the model.

  Raises:
    ValueError: naming the leaf, what it is, and how to have it quantized again.
  """
  doers = [i for i, one in enumerate(transform) if _QUANTIZERS in step.spell((one,))]
  if not doers:
    return
  shapes = {a: source.struct(a) for a in source.addresses()}
  if len(doers) == 1 and not any(map(_quantized, shapes.values())):
    return
  model = model_lib.Model(source.spec, paths.unflatten(shapes))
  for i, one in enumerate(transform[: doers[-1] + 1]):
    chosen = {a for unit in one.units(model.addresses()) for a in unit}
    mine = [a for a in model.addresses() if a in chosen and i in doers]
    held = {a: leaves.inner(model.leaf(a)) for a in mine}
    held = {a: x for a, x in held.items() if _quantized(x)}
    if i < doers[-1] or held:
      model = dry_run((one,), model)
    for address, old in held.items():
      new = model.leaf(address)
      if not _holds(new, old) and leaves.is_leaf(new):
        raise ValueError(
          f"{address} is quantized already, {describe.kind(old)}, and {one!r} would round it once "
          "more; leave it out of `select`, or chain compress.quantize.dequantize() before to "
          "quantize it again"
        )


def _quantized(leaf: Any) -> bool:
  """Tell whether a leaf's values were rounded; factors and sparse matrices are not."""
  leaf = leaves.inner(leaf)
  if isinstance(leaf, leaves.Sum):
    return any(map(_quantized, leaf.parts))
  kept = leaves.LowRank | leaves.SparseTensor | leaves.Outliers | leaves.SignedLowRank
  return leaves.is_leaf(leaf) and not isinstance(leaf, kept)


def _holds(new: Any, old: Any) -> bool:
  """Tell whether a leaf is another one, or wraps it."""
  if leaves.signature(new) == leaves.signature(old):
    return True
  parts = getattr(new, "parts", None) or [getattr(new, "weight", None)]
  return any(_holds(x, old) for x in parts if leaves.is_leaf(x))


def _evidence(need: needs.Need, model: model_lib.Model, names: list[str], donors: int) -> Any:
  """Make evidence of shapes only."""
  if isinstance(need, needs.Donors):
    return {a: (model.leaf(a),) * donors for a in names}
  if isinstance(need, needs.Blocks):
    return _blocks(need, model, names)
  if not isinstance(need, needs.Statistic):
    return []
  out = {}
  for address in paths.select(names, need.select or step.BLOCK_KERNELS):
    shape = model.leaf(address).shape
    if need.fold in gradients.FOLDS:
      out[address] = gradients.shape(need, model.leaf(address))
    else:
      out[address] = jax.eval_shape(lambda f=need.fold, n=shape[-2]: stats.FOLDS[f].init(n))
    if need.of != "model":
      out[address] = (out[address],) * (donors if need.of == "donors" else 2)
  return out


def _blocks(need: needs.Blocks, model: model_lib.Model, names: list[str]) -> dict[str, needs.Block]:
  """Make blocks' evidence of shapes only: two examples, of two tokens if it is a language model."""
  statistics.block_layers(names, need.select)
  shape = (model.spec.features,) if isinstance(model.spec, models.VisionSpec) else (2,)
  kind = jnp.float32 if isinstance(model.spec, models.VisionSpec) else jnp.int32
  batch = jax.ShapeDtypeStruct((2, *shape), kind)

  def blocks(params: Any, batch: Any) -> dict[str, needs.Block]:
    return statistics.blocks(model.replace(params=params), [batch], select=need.select)

  return jax.eval_shape(blocks, model.params, batch)


def _bare(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
