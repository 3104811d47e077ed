# SPDX-License-Identifier: Apache-2.0
"""Grow a model in depth by stacking copies of it: new layer i is old layer i mod l.

G_direct of Du et al., "Stacking your transformers: a closer look at model growth for efficient LLM
pre-training", 2024 (arXiv 2405.15319), who find it the best of the growth operators and advise
growth 4. It does not preserve the function: the loss rises at growth, and training then brings it
below that of training from scratch. Embeddings, final norm and head are kept. An optax state under
`aux["optimizer"]` is gathered along, which the paper's code does not do (it starts the optimizer
afresh). Neutral at growth=1.
"""

from treesurgeon.core import step
from treesurgeon.grow import take_layers


def stack_index(num_layers: int, growth: int) -> list[int]:
  """List which old layer each new layer copies.

  Args:
    num_layers: l, layers of the small model.
    growth: g, how many times deeper the new one is.

  Returns:
    g l indices: i mod l.

  Raises:
    ValueError: for a growth that is not a positive integer, or a model without layers.

  Example:
    >>> stack_index(2, 3)
    [0, 1, 0, 1, 0, 1]
  """
  take_layers.check(num_layers, growth)
  return [i % num_layers for i in range(growth * num_layers)]


@step.method("grow.g_stack")
def g_stack(*, growth: int = 4) -> step.Step:
  """Stack copies of a model's layers on top of each other; does not preserve the function.

  Args:
    growth: how many times deeper the new model is.

  Returns:
    A transform of whole models; it rewrites the architecture too.

  Raises:
    ValueError: for a growth that is not a positive integer.

  Example:
    >>> g_stack(growth=2)
    (grow.g_stack(growth=2),)

  Reference:
    Du et al., Stacking your transformers, 2024, arXiv 2405.15319.
  """
  stack_index(1, growth)
  return take_layers.lift(lambda count: stack_index(count, growth))
