# SPDX-License-Identifier: Apache-2.0
"""Apply a transform with the driver that suits its steps."""

from typing import Any

from treesurgeon.core import model as model_lib
from treesurgeon.core import step
from treesurgeon.run import collect, drivers


def apply(
  transform: step.Transform, model: model_lib.Model, *, seed: int = 0, **materials: Any
) -> model_lib.Model:
  """Apply a transform to a model in memory: block by block if a step asks for it, else whole.

  Args:
    transform: steps, first applied first.
    model: the model; not modified.
    seed: of everything random.
    **materials: fields of `Materials`: batches, donors, requests.

  Returns:
    The changed model.

  Raises:
    ValueError: for missing evidence, a selection without a match, or weights that are not finite.

  Example:
    >>> import jax, treesurgeon as ts
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> model = ts.Model(spec, models.init(spec, jax.random.key(0)))
    >>> ts.apply(ts.parse("grow.g_stack(growth=2)"), model).spec.num_layers
    4
  """
  go = drivers.run_blockwise if any(s.scope == "block" for s in transform) else drivers.run
  return go(transform, model, collect.Materials(**materials), seed=seed)
