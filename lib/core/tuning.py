# SPDX-License-Identifier: Apache-2.0
"""Train a network inside a step: what methods that train before they are done share.

The parameters become float32 masters under their stored names (layers stacked), the step is
compiled once by `descend.minimize`, and the result returns to the storage dtypes. Compressed leaves
come back dense.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from treesurgeon.core import leaves, meshes, needs, paths, programs, step
from treesurgeon.core import model as model_lib

Flat = dict[str, jax.Array]


def masters(m: model_lib.Model) -> Flat:
  """Copy a model's parameters to float32.

  Args:
    m: the model.

  Returns:
    Stored name to array.

  Example:
    >>> masters(model_lib.Model(None, {"w": jnp.ones(2, jnp.bfloat16)}))["w"].dtype
    dtype('float32')
  """
  return {n: leaves.dense(x).astype(jnp.float32) for n, x in paths.walk(m.params).items()}


def put(m: model_lib.Model, flat: Mapping[str, jax.Array]) -> model_lib.Model:
  """Write arrays into a model, in its storage dtypes and where its own lie.

  Args:
    m: the model.
    flat: stored name to array.

  Returns:
    The model with all its leaves replaced.

  Example:
    >>> m = model_lib.Model(None, {"w": jnp.zeros(2, jnp.bfloat16)})
    >>> put(m, {"w": jnp.ones(2)}).leaf("w").dtype
    dtype(bfloat16)
  """
  old = paths.walk(m.params)
  new = {n: x.astype(old[n].dtype) for n, x in flat.items()}
  traced = any(isinstance(x, jax.core.Tracer) for x in new.values())
  return m.replace(
    params=paths.nest(new if traced else {n: programs.like(x, old[n]) for n, x in new.items()})
  )


def learnable(m: model_lib.Model, batches: Any) -> bool:
  """Tell whether there is anything to learn from; a dry run has no batches.

  Args:
    m: the model.
    batches: what was brought.

  Returns:
    False only while shapes are traced without data.

  Raises:
    ValueError: if there is no batch though the model is real.
  """
  if batches:
    return True
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(m.params)):
    return False
  raise ValueError("there is no batch to learn from")


def noted(m: model_lib.Model, note: Mapping[str, Any]) -> model_lib.Model:
  """Add to what a model's lineage will tell of this step.

  Args:
    m: the model.
    note: JSON values by name.

  Returns:
    The model with `aux["notes"]`.

  Example:
    >>> noted(model_lib.Model(None, {}), {"steps": 3}).aux["notes"]
    {'steps': 3}
  """
  return m.replace(aux={**m.aux, "notes": {**m.aux.get("notes", {}), **note}})


def over_model(apply: Callable[..., model_lib.Model], wants: Mapping[str, needs.Need]) -> step.Step:
  """Make a step of a method that trains all of a model.

  Args:
    apply: (model, evidence, key) -> model.
    wants: evidence by name.

  Returns:
    A step of scope "model".
  """

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(names)]

  return step.Step(dict(wants), meshes.with_auto_axes(apply), "model", {}, units)


@functools.lru_cache(maxsize=32)
def adam(rate: float) -> optax.GradientTransformation:
  """Make Adam once for each step size, for compiled steps are kept by it.

  Args:
    rate: step size.

  Returns:
    The optimizer.

  Example:
    >>> adam(0.1) is adam(0.1)
    True
  """
  return optax.adam(rate)


def check(**numbers: float) -> None:
  """Refuse lengths and step sizes that no training takes.

  Args:
    **numbers: values by name: none may be negative, and those called rate or beta not zero.

  Raises:
    ValueError: naming the argument.

  Example:
    >>> check(steps=0, rate=1e-3)
  """
  for name, value in numbers.items():
    if name in ("rate", "beta") and value <= 0:
      raise ValueError(f"{name}={value} must be above 0")
    if value < 0:
      raise ValueError(f"{name}={value} must not be negative")
