# SPDX-License-Identifier: Apache-2.0
"""Cut BitStack's stacks to a budget of bytes: load as many blocks, in their order, as it holds.

Every kernel keeps its first block; then blocks are taken in the order that `bitstack_sort` found,
or level by level without it, until one does not fit. So a smaller budget keeps a part of what a
larger one keeps. While a run is only planned the order is unknown; that of the addresses stands in.
"""

from collections.abc import Sequence

import jax
import jax.core

from treesurgeon.compress.quantize import bitstack
from treesurgeon.core import leaves, needs, step
from treesurgeon.core import model as model_lib


@step.method("compress.quantize.bitstack_cut")
def bitstack_cut(*, budget: float) -> step.Step:
  """Drop blocks of stacks, the least useful first, until the model fits a budget.

  Args:
    budget: bytes of the whole model, or, up to 1, a fraction of what it has; what holds all blocks
      changes nothing.

  Returns:
    The transform.

  Raises:
    ValueError: for a budget not above 0; when applied, if nothing is a stack, or the budget is too
      small for one block a kernel.

  Example:
    >>> bitstack_cut(budget=0.5) + bitstack_cut(budget=2_600_000_000)
    (compress.quantize.bitstack_cut(budget=0.5), compress.quantize.bitstack_cut(budget=2600000000))

  Reference:
    Wang et al., BitStack: Any-Size Compression of Large Language Models in Variable Memory
    Environments, 2024, arXiv:2410.23918.
  """
  if budget <= 0:
    raise ValueError(f"budget={budget}: valid are bytes, or a fraction above 0 of the present ones")

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(names)]

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del evidence, key
    return cut(m, budget)

  return step.Step({}, apply, "model", {}, units)


def cut(m: model_lib.Model, budget: float) -> model_lib.Model:
  """Keep the blocks that a budget holds.

  Args:
    m: a model with stacks.
    budget: bytes, or, up to 1, a fraction of what it has.

  Returns:
    The model with shorter stacks.

  Raises:
    ValueError: if it has none, or the budget is too small for one block a kernel.
  """
  stacks = {a: bitstack.stack(m.leaf(a)) for a in m.addresses()}
  stacks = {a: blocks for a, blocks in stacks.items() if blocks}
  if not stacks:
    raise ValueError("no kernel is a stack of blocks; apply compress.quantize.bitstack first")
  budget = budget * m.nbytes() if budget <= 1 else budget
  kept = dict.fromkeys(stacks, 1)
  more = [(a, i) for a, blocks in stacks.items() for i in range(1, len(blocks))]
  size = m.nbytes() - sum(leaves.nbytes(stacks[a][i]) for a, i in more)
  if size > budget:
    raise ValueError(
      f"budget={int(budget):,} bytes cannot be met; with one block a kernel the model has {size:,}"
    )
  orders = [stacks[a][i].order for a, i in more]
  if not any(isinstance(x, jax.core.Tracer) for x in orders):
    more = [
      x
      for _, x in sorted(
        zip([int(x.reshape(())) for x in orders], more, strict=True), key=lambda x: x[0]
      )
    ]
  else:
    more = sorted(more, key=lambda x: x[1])
  for a, i in more:
    size += leaves.nbytes(stacks[a][i])
    if size > budget:
      break
    kept[a] = i + 1
  shorter = {a: b[: kept[a]] for a, b in stacks.items() if kept[a] < len(b)}
  return m.update({a: leaves.Sum(b) for a, b in shorter.items()})
