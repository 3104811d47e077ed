# SPDX-License-Identifier: Apache-2.0
"""Run on meshes with explicit axes what was written for automatic ones.

On a mesh with explicit axes every array's layout is part of its type, and a gather or a reshape
whose layout is not spelled out is refused. Code that leaves layouts to the compiler, forward
passes above all, runs on the same devices under a mesh of the same shape with automatic axes;
changing an array's mesh so moves no data.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from treesurgeon.core import model as model_lib
from treesurgeon.core import needs


def to_auto(tree: Any) -> Any:
  """Put arrays that lie on a mesh with explicit axes onto the same mesh with automatic ones.

  Args:
    tree: any tree; leaves that are no arrays on such a mesh are passed on.

  Returns:
    The tree.

  Example:
    >>> to_auto({"w": jax.numpy.ones(2)})["w"].tolist()
    [1.0, 1.0]
  """

  def one(x: Any) -> Any:
    mesh = explicit_mesh(x)
    return x if mesh is None else _put(x, _like(mesh, jax.sharding.AxisType.Auto))

  return jax.tree.map(one, tree)


def explicit_mesh(x: Any) -> Any:
  """Return the mesh of a concrete array that lies on a mesh with explicit axes, else None.

  Args:
    x: anything.

  Returns:
    The mesh or None.

  Example:
    >>> explicit_mesh(jax.numpy.ones(2)) is None
    True
  """
  if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
    return None
  mesh = getattr(x.sharding, "mesh", None)
  kinds = () if mesh is None else mesh.axis_types
  return mesh if jax.sharding.AxisType.Explicit in kinds else None


def with_auto_axes(
  apply: Callable[[model_lib.Model, needs.Evidence, jax.Array], model_lib.Model],
) -> Callable[[model_lib.Model, needs.Evidence, jax.Array], model_lib.Model]:
  """Let a step's `apply` see automatic axes only; its model comes back on the mesh it came from.

  Args:
    apply: (model, evidence, key) -> model.

  Returns:
    The same for any mesh.

  Example:
    >>> same = with_auto_axes(lambda m, evidence, key: m)
    >>> same(model_lib.Model(None, {"w": jax.numpy.ones(2)}), {}, jax.random.key(0)).leaf("w").shape
    (2,)
  """

  @functools.wraps(apply)
  def run(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    mesh = next((e for x in jax.tree.leaves(m.params) if (e := explicit_mesh(x)) is not None), None)
    if mesh is None:
      return apply(m, evidence, key)
    given = {name: to_auto(value) for name, value in evidence.items()}
    out = apply(m.replace(params=to_auto(m.params)), given, key)
    return out.replace(params=jax.tree.map(lambda x: _put(x, mesh), out.params))

  return run


def _like(mesh: Any, kind: Any) -> jax.sharding.Mesh:
  return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * mesh.devices.ndim)


def _put(x: Any, mesh: Any) -> Any:
  spec = getattr(getattr(x, "sharding", None), "spec", jax.P())
  return jax.device_put(x, jax.NamedSharding(mesh, spec))
