# SPDX-License-Identifier: Apache-2.0
"""Compiled array functions that work whatever mesh their arrays live on.

Since JAX 0.10 a mesh made by `jax.make_mesh` has explicit axes: an array's sharding is part of its
type, and a reshape or a gather whose sharding is ambiguous raises. Methods should not know of this,
so their programs run with automatic axes. Concrete arrays are relabelled (`meshes`); within a trace
the function is wrapped in `jax.sharding.auto_axes`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core

from treesurgeon.core import meshes


@functools.lru_cache(maxsize=512)
def compiled(fn: Callable[..., Any], hyper: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
  """Jit `fn(w, **given, **hyper)` once for each set of hyper-parameters, for any sharding of `w`.

  Programs are kept by `fn` itself, so it should be defined at the top of a module: a function made
  anew for each step is compiled anew. A result keeps `w`'s layout where its axes still divide.

  Args:
    fn: array function of a leaf, or a tree of leaves, and keyword evidence.
    hyper: keyword arguments as sorted pairs, hashable.

  Returns:
    A function of (w, given).

  Example:
    >>> compiled(lambda w, by, factor: w + factor * by, (("factor", 2.0),))(1.0, {"by": 3.0}).item()
    7.0
  """

  def call(w: Any, given: Mapping[str, Any]) -> Any:
    return fn(w, **given, **dict(hyper))

  jitted = jax.jit(call)

  def run(w: Any, given: Mapping[str, Any]) -> Any:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((w, given))):
      mesh = _traced_mesh(w)
      return jitted(w, given) if mesh is None else _traced(call, w, given, mesh)
    out = jitted(meshes.to_auto(w), meshes.to_auto(given))
    return like(out, w)

  return run


def like(out: Any, w: Any) -> Any:
  """Give a result the layout of the leaf it came from, where its axes still divide.

  Args:
    out: concrete arrays.
    w: the leaf, or tree of leaves, that the result replaces; where both are mappings, name by name.

  Returns:
    The arrays on `w`'s mesh; trailing axes are placed as those of `w`'s first array are.

  Example:
    >>> like(jax.numpy.ones(2), jax.numpy.ones(2)).tolist()
    [1.0, 1.0]
  """
  if isinstance(out, Mapping) and isinstance(w, Mapping) and set(out) <= set(w):
    return {name: like(x, w[name]) for name, x in out.items()}
  at = next((getattr(x, "sharding", None) for x in jax.tree.leaves(w)), None)
  if not isinstance(at, jax.NamedSharding) or at.mesh.size == 1:
    return out

  def one(x: jax.Array) -> jax.Array:
    want = jax.NamedSharding(at.mesh, _layout(x.shape, tuple(at.spec), at.mesh))
    return x if x.sharding == want else jax.device_put(x, want)

  return jax.tree.map(one, out)


def _traced_mesh(w: Any) -> Any:
  """Find the abstract mesh of traced arrays whose sharding is part of their type, else None."""
  for x in jax.tree.leaves(w):
    mesh = jax.typeof(x).sharding.mesh
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
      return mesh
  return None


def _traced(call: Callable[..., Any], w: Any, given: Any, mesh: Any) -> Any:
  """Run with automatic axes inside a trace, where arrays cannot be relabelled."""
  spec = tuple(jax.typeof(jax.tree.leaves(w)[0]).sharding.spec)
  shapes = jax.eval_shape(call, *jax.tree.map(_bare, (w, given)))
  layout = jax.tree.map(lambda x: _layout(x.shape, spec, mesh), shapes)
  with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
    wrapped: Any = jax.sharding.auto_axes(call, out_sharding=layout)
    return wrapped(w, given)


def _bare(x: Any) -> Any:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _layout(shape: tuple[int, ...], spec: tuple, mesh: Any) -> jax.sharding.PartitionSpec:
  """Keep each trailing axis' placement where its size still divides."""
  tail = ((None,) * len(shape) + spec)[-len(shape) :] if shape else ()
  keep = []
  for size, axis in zip(shape, tail, strict=True):
    names = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
    keep.append(axis if size % math.prod(mesh.shape[n] for n in names) == 0 else None)
  return jax.sharding.PartitionSpec(*keep)
