# SPDX-License-Identifier: Apache-2.0
"""Grow a model in depth by repeating each layer in place: new layer i is old layer i // g.

The interpolating variant that Du et al., "Stacking your transformers", 2024 (arXiv 2405.15319),
compare stacking with and find worse; kept for that comparison. It does not preserve the function
either. An optax state under `aux["optimizer"]` is gathered along. Neutral at growth=1.
"""

from collections.abc import Sequence

import jax

from treesurgeon.core import model as model_lib
from treesurgeon.core import needs, step
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
  if isinstance(growth, bool) or not isinstance(growth, int) or growth < 1:
    raise ValueError(f"growth={growth!r} must be an integer of at least 1")
  if num_layers < 1:
    raise ValueError("a model without layers cannot grow in depth")
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

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del evidence, key
    count = len({a.split("/")[1] for a in m.addresses() if a.startswith("layers/")})
    return take_layers.reassemble(m, repeat_index(count, growth))

  def units(names: Sequence[str]) -> step.Units:
    inside = tuple(a for a in names if a.startswith("layers/"))
    if not inside:
      raise ValueError("grow.interpolate: the model has no layers")
    return [inside]

  return step.Step({}, apply, "model", {}, units)
