# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints: models and training states, sharded, from any number of hosts.

Compressed leaves are stored as their parts and come back as what they were, static fields included.
Orbax writes each checkpoint beside its place and renames it when it is complete. Arrays are
restored to the shardings of `like`, so a job may resume on another mesh than it was killed on.
"""

import base64
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from treesurgeon.core import leaves, lineage, model, paths
from treesurgeon.io import packed, staging
from treesurgeon.models import spec as specs
from treesurgeon.models import vision_spec

_OPTIMIZER = "opt_state"


class State(NamedTuple):
  """What a training job needs to go on.

  Attributes:
    step: updates done.
    params: nested parameters, compressed leaves allowed.
    opt_state: any pytree, such as an optax state.
    data: the data iterator's state: JSON values or bytes.
  """

  step: int
  params: Mapping[str, Any]
  opt_state: Any = ()
  data: Any = None


def save(m: model.Model, directory: str | Path, *, overwrite: bool = False) -> None:
  """Write a model: parameters, spec and lineage.

  Args:
    m: the model; `aux` is not written.
    directory: the output, which must not exist unless `overwrite`.
    overwrite: replace an existing output.

  Raises:
    ValueError: if the output exists.

  Example:
    >>> import tempfile
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> m = model.Model(spec, models.init(spec, jax.random.key(0)))
    >>> with tempfile.TemporaryDirectory() as root:
    ...   save(m, f"{root}/out")
    ...   restore(f"{root}/out").spec == spec
    True
  """
  staging.check_output(directory, overwrite)
  arrays, meta = _encode(m.params, ())
  kind = "vision" if isinstance(m.spec, vision_spec.VisionSpec) else "transformer"
  meta |= {"spec": dataclasses.asdict(m.spec), "network": kind}
  meta |= {"lineage": lineage.to_json(m.lineage)}
  path = Path(directory).absolute()
  new = path.with_name(f".{path.name}.partial")
  with _checkpointer() as checkpointer:
    checkpointer.save(new, args=_save_args(arrays, meta), force=True)
  if jax.process_index() == 0:
    staging.replace(path, new)
  ocp.multihost.sync_global_processes("treesurgeon.io.orbax.save")


def restore(directory: str | Path, *, like: Mapping[str, Any] | None = None) -> model.Model:
  """Read a model that `save` wrote.

  Args:
    directory: the checkpoint.
    like: parameters (arrays or shape structs) whose shardings are wanted; None puts everything
      on the first local device.

  Returns:
    The model.

  Raises:
    ValueError: if the directory is no such checkpoint.
  """
  path = Path(directory).absolute()
  with _checkpointer() as checkpointer:
    meta = _read_meta(checkpointer, path, directory)
    if "spec" not in meta:
      raise ValueError(f"{directory}: a training state, not a model; restore it with Keeper")
    arrays = checkpointer.restore(path, args=_restore_args(meta, State(0, like or {})))["arrays"]
  fields = {k: _tuples(v) for k, v in meta["spec"].items()}
  records = lineage.from_json(meta["lineage"])
  make = vision_spec.VisionSpec if meta.get("network") == "vision" else specs.Spec
  return model.Model(make(**fields), _decode(arrays, meta), records)


class Keeper:
  """Save training states as a job goes on, keep the last few, and find the newest again.

  A context manager; leaving it waits for writes under way.

  Args:
    directory: where the steps go.
    keep: how many of them stay.

  Example:
    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as root, Keeper(root) as keeper:
    ...   keeper.save(State(7, {"w": jnp.ones(2)}, {"mu": jnp.zeros(2)}, {"seen": 56}))
    ...   keeper.restore({"mu": jnp.zeros(2)}).data
    {'seen': 56}
  """

  def __init__(self, directory: str | Path, *, keep: int = 3):
    if keep < 1:
      raise ValueError(f"keep={keep} must be at least 1")
    self.directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def __enter__(self) -> "Keeper":
    return self

  def __exit__(self, *unused: Any) -> None:
    del unused
    self.close()

  def save(self, state: State) -> None:
    """Write a state; returns once the arrays are copied, the disk follows."""
    arrays, meta = _encode(state.params, state.opt_state)
    data = state.data
    if isinstance(data, bytes):
      data = {"base64": base64.b64encode(data).decode()}
    meta["data"] = json.loads(json.dumps({"value": data}))
    self._manager.save(state.step, args=_save_args(arrays, meta))

  def latest(self) -> int | None:
    """Return the newest complete step, or None."""
    self._manager.wait_until_finished()
    return self._manager.latest_step()

  def restore(
    self, opt_state: Any = (), *, params: Mapping[str, Any] | None = None, step: int | None = None
  ) -> State:
    """Read a state back.

    Args:
      opt_state: a pytree of the structure that was saved, arrays or shape structs; its
        shardings are used.
      params: parameters whose shardings are wanted; None puts them on the first local device.
      step: which; None is the newest.

    Returns:
      The state.

    Raises:
      ValueError: if there is no such step, or `opt_state` does not fit.
    """
    newest, steps = self.latest(), sorted(self._manager.all_steps())
    step = newest if step is None else step
    if step is None or step not in steps:
      there = ", ".join(map(str, steps)) or "none"
      raise ValueError(f"{self.directory}: no checkpoint of step {step}; there are: {there}")
    meta = _read_meta(self._manager, step, self.directory / str(step))
    like = State(step, params or {}, opt_state)
    arrays = self._manager.restore(step, args=_restore_args(meta, like))["arrays"]
    flat, structure = jax.tree.flatten(opt_state)
    names = [f"{_OPTIMIZER}/{i:05}" for i in range(len(flat))]
    saved = sorted(n for n in meta["arrays"] if n.startswith(f"{_OPTIMIZER}/"))
    if names != saved:
      raise ValueError(
        f"{self.directory}/{step}: the optimizer state has {len(saved)} arrays, the one given "
        f"{len(names)}; use the optimizer the job was started with"
      )
    for name, want in zip(names, flat, strict=True):
      if name not in meta["keys"] and tuple(meta["arrays"][name][0]) != np.shape(want):
        raise ValueError(
          f"{self.directory}/{step}: {name} has shape {tuple(meta['arrays'][name][0])}, the "
          f"optimizer given wants {np.shape(want)}"
        )
    restored = jax.tree.unflatten(structure, [_key(arrays[n], n, meta) for n in names])
    data = meta["data"]["value"]
    if isinstance(data, dict) and set(data) == {"base64"}:
      data = base64.b64decode(data["base64"])
    return State(step, _decode(arrays, meta), restored, data)

  def close(self) -> None:
    """Wait for writes under way, and let go."""
    self._manager.wait_until_finished()
    self._manager.close()


def _encode(params: Mapping[str, Any], opt_state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """Flatten to named arrays, and describe what puts them together again."""
  arrays, metas, keys = {}, {}, {}
  for name, leaf in paths.walk(params, "params/").items():
    metas[name], parts = leaves.to_parts(leaf)
    arrays.update({packed.join(name, part): x for part, x in parts.items()})
  for i, x in enumerate(jax.tree.leaves(opt_state)):
    name = f"{_OPTIMIZER}/{i:05}"
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      keys[name], x = str(jax.random.key_impl(x)), jax.random.key_data(x)
    arrays[name] = x if isinstance(x, jax.Array) else np.asarray(x)
  shapes = {n: [list(x.shape), np.dtype(x.dtype).name] for n, x in arrays.items()}
  return arrays, {"leaves": metas, "keys": keys, "arrays": shapes}


def _decode(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
  grouped = packed.parts(arrays)
  flat = {
    name.removeprefix("params/"): leaves.from_parts(
      described, {part: arrays[full] for part, full in grouped[name].items()}
    )
    for name, described in meta["leaves"].items()
  }
  return paths.nest(flat)


def _restore_args(meta: Mapping[str, Any], like: State) -> ocp.args.Composite:
  """Ask for each array in its saved shape, with the sharding of its namesake in `like`."""
  wanted = _encode_shardings(like)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = {
    name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype), sharding=wanted.get(name) or here)
    for name, (shape, dtype) in meta["arrays"].items()
  }
  return ocp.args.Composite(arrays=ocp.args.StandardRestore(target))


def _encode_shardings(like: State) -> dict[str, Any]:
  named = {}
  for name, leaf in paths.walk(like.params, "params/").items():
    named.update({packed.join(name, part): x for part, x in leaves.to_parts(leaf)[1].items()})
  flat = jax.tree.leaves(like.opt_state)
  named |= {f"{_OPTIMIZER}/{i:05}": x for i, x in enumerate(flat)}
  return {n: getattr(x, "sharding", None) for n, x in named.items()}


def _save_args(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> ocp.args.Composite:
  return ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))


def _checkpointer() -> ocp.Checkpointer:
  return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _read_meta(reader: Any, where: Any, directory: str | Path) -> dict[str, Any]:
  try:
    meta = reader.restore(where, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if not {"arrays", "leaves", "keys"} <= set(meta):
      raise ValueError(f"its description holds only {sorted(meta)}")
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{directory}: not an orbax checkpoint of treesurgeon: {error}") from error
  return meta


def _key(x: jax.Array, name: str, meta: Mapping[str, Any]) -> jax.Array:
  return jax.random.wrap_key_data(x, impl=meta["keys"][name]) if name in meta["keys"] else x


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
