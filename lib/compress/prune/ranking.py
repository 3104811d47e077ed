# SPDX-License-Identifier: Apache-2.0
"""Compare weights over a whole model: one threshold for all selected leaves."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from treesurgeon.compress.prune import masks
from treesurgeon.core import leaves, lifting, meshes, model, needs, paths, programs, step


def over_model(
  score: Callable[..., jax.Array],
  finish: Callable[..., Any],
  *,
  hyper: Mapping[str, Any],
  sparsity: float,
  select: str | None,
  wants: Mapping[str, needs.Need] | None = None,
) -> step.Step:
  """Lift a score to a step that prunes the lowest scores of all selected leaves together.

  Args:
    score: `score(w, **evidence, **hyper)` -> importance of each weight, not negative. Defined at
      the top of a module, as is `finish`.
    finish: `finish(w, keep=mask, **evidence, **hyper)` -> the pruned leaf.
    hyper: keyword arguments of both, hashable.
    sparsity: fraction of all weights to prune; exactly the int(sparsity n) lowest go.
    select: which addresses; None is every kernel inside the layers.
    wants: evidence by name.

  Returns:
    A step of scope "model".

  Example:
    >>> import jax.numpy as jnp
    >>> m = model.Model(None, {x: {"kernel": jnp.array([[v, 2.0]])} for x, v in zip("ab", (1, 3))})
    >>> one = over_model(jnp.abs, lambda w, keep: w * keep, hyper={}, sparsity=0.25, select=".*")
    >>> one.apply(m, {}, jax.random.key(0)).leaf("a/kernel").tolist()
    [[0.0, 2.0]]
  """
  pattern = step.both(select or step.BLOCK_KERNELS, step.KERNELS)
  wants = dict(wants or {})
  each = lifting.over_leaves(
    finish, hyper=hyper, select=pattern, wants={**wants, "keep": needs.Statistic("keep")}
  )

  def apply(m: model.Model, evidence: needs.Evidence, key: jax.Array) -> model.Model:
    chosen = [a for a in m.addresses() if re.fullmatch(pattern, a)]
    call = programs.compiled(score, tuple(sorted(hyper.items())))
    scores = tuple(
      call(leaves.dense(m.leaf(a)), {name: evidence[name][a] for name in wants}) for a in chosen
    )
    total = sum(s.size for s in scores)
    count = total - int(sparsity * total)
    keep = programs.compiled(masks.largest, (("count", count),))(scores, {})
    return each.apply(m, {**evidence, "keep": dict(zip(chosen, keep, strict=True))}, key)

  def reselect(narrower: str) -> step.Step:
    aim = narrower if select is None else step.both(select, narrower)
    return over_model(score, finish, hyper=hyper, sparsity=sparsity, select=aim, wants=wants)

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(paths.select([n for n in names if re.fullmatch(step.KERNELS, n)], pattern))]

  own = {name: need for name, need in each.needs.items() if name in wants}
  return step.Step(own, meshes.with_auto_axes(apply), "model", {}, units, reselect)
