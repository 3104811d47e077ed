# SPDX-License-Identifier: Apache-2.0
"""Rank the blocks of BitStack's kernels by the perplexity with each: what to load first.

Level by level: with all kernels at b blocks, one kernel is given its next; the lower the loss on
the calibration batches, the earlier that block. All blocks of a level come before those of the
next, and everybody's first comes first. One forward pass of all batches for every block but the
first ones, as in the published code.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.compress.quantize import bitstack
from treesurgeon.core import leaves, meshes, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.models import losses


@step.method("compress.quantize.bitstack_sort")
def bitstack_sort(*, select: str | None = None) -> step.Step:
  """Rank the blocks of stacks by the loss on calibration data, for `bitstack_cut`.

  Args:
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. It changes no weight, only the places of blocks in the order of loading.

  Raises:
    ValueError: when applied, if no selected kernel is a stack, or there is no data.

  Example:
    >>> bitstack_sort()
    (compress.quantize.bitstack_sort(),)

  Reference:
    Wang et al., BitStack: Any-Size Compression of Large Language Models in Variable Memory
    Environments, 2024, arXiv:2410.23918.
  """
  pattern = select or step.BLOCK_KERNELS

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(paths.select(names, pattern))]

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    return rank(m, evidence["batches"], paths.select(m.addresses(), pattern))

  wants: dict[str, needs.Need] = {"batches": needs.Batches()}
  return step.Step(wants, meshes.with_auto_axes(apply), "model", {}, units)


def rank(m: model_lib.Model, batches: Sequence[Any], addresses: Sequence[str]) -> model_lib.Model:
  """Write into every block its place among all.

  Args:
    m: a model with stacks.
    batches: calibration data.
    addresses: which kernels to rank.

  Returns:
    The model, the same but for the places.

  Raises:
    ValueError: if none of the kernels is a stack, or there is no data.
  """
  stacks = {a: bitstack.stack(m.leaf(a)) for a in addresses}
  stacks = {a: blocks for a, blocks in stacks.items() if blocks}
  if not stacks:
    raise ValueError(
      f"{addresses[0]} is no stack of blocks; apply compress.quantize.bitstack first"
    )
  if not batches:
    raise ValueError("bitstack_sort ranks blocks by the loss on calibration data; there is none")
  dtypes = {a: m.leaf(a).dtype for a in stacks}
  sums = {a: blocks[0].dense().astype(jnp.float32) for a, blocks in stacks.items()}
  places = {(a, 0): jnp.int32(i) for i, a in enumerate(stacks)}
  for level in range(1, max(map(len, stacks.values()))):
    below = m.update({a: x.astype(dtypes[a]) for a, x in sums.items()})
    taller = [a for a, blocks in stacks.items() if len(blocks) > level]
    found = []
    for a in taller:
      sums[a] = sums[a] + stacks[a][level].dense()
      found.append(_loss(below.update({a: sums[a].astype(dtypes[a])}), batches))
    ranks = jnp.argsort(jnp.argsort(jnp.stack(found), stable=True))
    places |= {(a, level): len(places) + r for a, r in zip(taller, ranks, strict=True)}
  return m.update({
    a: leaves.Sum(tuple(
      dataclasses.replace(b, order=places[a, i].astype(jnp.int32).reshape(1, 1))
      for i, b in enumerate(blocks)
    ))
    for a, blocks in stacks.items()
  })  # fmt: skip


def _loss(m: model_lib.Model, batches: Sequence[Any]) -> jax.Array:
  each = [_nll(m.spec, m.params, jax.tree.map(np.asarray, b)) for b in batches]
  return jnp.stack(each).mean()


@functools.partial(jax.jit, static_argnums=0)
def _nll(spec: Any, params: Any, batch: Any) -> jax.Array:
  return losses.nll(spec, params, batch)
