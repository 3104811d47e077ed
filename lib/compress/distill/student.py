# SPDX-License-Identifier: Apache-2.0
"""What methods share that train a student beside its teacher: what of it trains, who teaches."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from treesurgeon.core import leaves, meshes, paths, programs
from treesurgeon.core import model as model_lib


def masters(m: model_lib.Model) -> tuple[dict[str, Any], dict[str, Any]]:
  """Part a model's leaves into float32 copies of what trains, and what stays.

  Args:
    m: the model.

  Returns:
    (stored name to arrays and thin factors in float32, stored name to other compressed leaves).

  Example:
    >>> [list(x) for x in masters(model_lib.Model(None, {"w": jnp.ones(2)}))]
    [['w'], []]
  """
  flat = paths.walk(m.params)

  def trains(x: Any) -> bool:
    real = all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(x))
    return real and (isinstance(x, leaves.LowRank) or not leaves.is_leaf(x))

  train = {
    n: jax.tree.map(lambda a: a.astype(jnp.float32), x) for n, x in flat.items() if trains(x)
  }
  return train, {n: x for n, x in flat.items() if n not in train}


def put(m: model_lib.Model, train: Mapping[str, Any]) -> model_lib.Model:
  """Write what was trained into a model, in its storage dtypes.

  Args:
    m: the model.
    train: stored name to arrays and thin factors.

  Returns:
    The model.

  Example:
    >>> m = model_lib.Model(None, {"w": jnp.zeros(2, jnp.bfloat16)})
    >>> put(m, {"w": jnp.ones(2)}).leaf("w").dtype
    dtype(bfloat16)
  """
  old = paths.walk(m.params)
  new = {n: jax.tree.map(lambda a, o: a.astype(o.dtype), x, old[n]) for n, x in train.items()}
  if not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(new)):
    new = {n: programs.like(x, old[n]) for n, x in new.items()}
  return m.replace(params=paths.nest({**old, **new}))


def one_teacher(found: Any) -> model_lib.Model:
  """Read the one teacher among the donors into memory, on automatic axes.

  Args:
    found: the donors, as evidence.

  Returns:
    The model.

  Raises:
    ValueError: if there is another number of them.
  """
  if len(found.sources) != 1:
    raise ValueError(f"a student learns from one teacher; {len(found.sources)} were given")
  teacher = model_lib.load(found.sources[0])
  return teacher.replace(params=meshes.to_auto(teacher.params))
