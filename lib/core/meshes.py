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
import jax.core

from treesurgeon.core import model as model_lib
from treesurgeon.core import needs


def explicit_mesh(tree: Any) -> Any:
  """Return the mesh of the first concrete array that lies on a mesh with explicit axes, else None.

  Args:
    tree: anything.

  Returns:
    The mesh or None.

  Example:
    >>> explicit_mesh(jax.numpy.ones(2)) is None
    True
  """
  for x in jax.tree.leaves(tree):
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
      mesh = getattr(x.sharding, "mesh", None)
      if mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types:
        return mesh
  return None


def to_auto(tree: Any) -> Any:
  """Put arrays that lie on a mesh with explicit axes onto the same mesh with automatic ones.

  Args:
    tree: any tree; leaves that are no arrays on such a mesh are passed on.

  Returns:
    The tree, which shares all memory; itself where nothing was explicit.

  Example:
    >>> w = jax.numpy.ones(2)
    >>> to_auto(w) is w
    True
  """

  def one(x: Any) -> Any:
    mesh = explicit_mesh(x)
    return x if mesh is None else _put(x, _auto(mesh))

  return tree if explicit_mesh(tree) is None else jax.tree.map(one, tree)


def to_explicit(tree: Any, mesh: Any) -> Any:
  """Undo `to_auto`.

  Args:
    tree: any tree.
    mesh: what `explicit_mesh` told of the original; None changes nothing.

  Returns:
    The tree; arrays on other devices than the mesh's are passed on.

  Example:
    >>> w = jax.numpy.ones(2)
    >>> to_explicit(w, None) is w
    True
  """

  def one(x: Any) -> Any:
    at = getattr(x, "sharding", None)
    here = isinstance(at, jax.NamedSharding) and at.mesh == _auto(mesh)
    return _put(x, mesh) if here else x

  return tree if mesh is None else jax.tree.map(one, tree)


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
    mesh = explicit_mesh(m.params)
    if mesh is None:
      return apply(m, evidence, key)
    given = {name: to_auto(value) for name, value in evidence.items()}
    out = apply(m.replace(params=to_auto(m.params)), given, key)
    return out.replace(params=to_explicit(out.params, mesh))

  return run


@functools.lru_cache(maxsize=32)
def _auto(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
  return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _put(x: Any, mesh: Any) -> Any:
  return jax.device_put(x, jax.NamedSharding(mesh, x.sharding.spec))
