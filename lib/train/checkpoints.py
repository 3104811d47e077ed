# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run through orbax: complete or absent, on one host or many."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

FOLDER = "checkpoints"


class Checkpoints:
  """Keep the newest states of a run below its work directory.

  A state's arrays are stored under their names in the tree, so a checkpoint of another model or
  selection is recognised and refused. Saving is asynchronous; `close` waits.

  Args:
    workdir: the run's directory; None keeps nothing.
    keep: how many checkpoints to keep.
  """

  def __init__(self, workdir: str | Path | None, *, keep: int = 2):
    self._manager = None
    if workdir is None:
      return
    self._where = (Path(workdir) / FOLDER).absolute()
    self._manager = ocp.CheckpointManager(
      self._where,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
      item_names=("state", "meta"),
    )

  def latest(self) -> int | None:
    """Name the newest complete step, None if there is none."""
    return None if self._manager is None else self._manager.latest_step()

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Save a state and JSON beside it, unless the step is saved already."""
    if self._manager is None or step == self._manager.latest_step():
      return
    arrays = _named(state)
    items = ocp.args.Composite(
      state=ocp.args.StandardSave({f"{i:05d}": x for i, x in enumerate(arrays.values())}),
      meta=ocp.args.JsonSave({**meta, "arrays": _describe(arrays)}),
    )
    self._manager.save(step, args=items)

  def meta(self, step: int) -> dict[str, Any]:
    """Read the JSON saved with a step."""
    assert self._manager is not None
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def restore(self, step: int, like: Any) -> Any:
    """Read a state, placed as `like` is; ValueError if it is of another structure."""
    assert self._manager is not None
    arrays = _named(like)
    self._check(step, self.meta(step)["arrays"], _describe(arrays))
    target = {
      f"{i:05d}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      for i, x in enumerate(arrays.values())
    }
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    found = self._manager.restore(step, args=args)["state"]
    return jax.tree.unflatten(jax.tree.structure(like), [found[k] for k in sorted(found)])

  def close(self) -> None:
    """Wait for what is being saved."""
    if self._manager is not None:
      self._manager.close()

  def _check(self, step: int, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for name in sorted(set(saved) | set(wanted)):
      if saved.get(name) != wanted.get(name):
        raise ValueError(
          f"{self._where}/{step} is of another run: {name} is {saved.get(name, 'absent')} there "
          f"and {wanted.get(name, 'absent')} here; give an empty work directory"
        )


def _named(state: Any) -> dict[str, jax.Array]:
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path): x for path, x in flat}


def _describe(arrays: Mapping[str, Any]) -> dict[str, str]:
  return {name: f"{x.dtype.name}{list(x.shape)}" for name, x in arrays.items()}
