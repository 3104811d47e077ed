# SPDX-License-Identifier: Apache-2.0
"""Grow a model in depth by repeating each layer in place: new layer i is old layer i // g.

The interpolating variant that Du et al., "Stacking your transformers", 2024 (arXiv 2405.15319),
compare stacking with and find worse; kept for that comparison. It does not preserve the function
either. An optax state under `aux["optimizer"]` is gathered along. Neutral at growth=1.
"""

from treesurgeon.core import step
from treesurgeon.grow import take_layers


def repeat_index(num_layers: int, growth: int) -> list[int]:
  """List which old layer each new layer copies.

  Args:
    num_layers: l, layers of the small model.
    growth: g, how many times deeper the new one is.

  Returns:
    g l indices: i // g.

  Raises:
    ValueError: for a growth that is not a positive integer, or a model without layers.

  Example:
    >>> repeat_index(2, 3)
    [0, 0, 0, 1, 1, 1]
  """
  take_layers.check(num_layers, growth)
  return [i // growth for i in range(growth * num_layers)]


@step.method("grow.interpolate")
def interpolate(*, growth: int = 4) -> step.Step:
  """Repeat each of a model's layers in place; does not preserve the function.

  Args:
    growth: how many times deeper the new model is.

  Returns:
    A transform of whole models; it rewrites the architecture too.

  Raises:
    ValueError: for a growth that is not a positive integer.

  Example:
    >>> interpolate(growth=2)
    (grow.interpolate(growth=2),)

  Reference:
    Du et al., Stacking your transformers, 2024, arXiv 2405.15319.
  """
  repeat_index(1, growth)
  return take_layers.lift(lambda count: repeat_index(count, growth))
