# SPDX-License-Identifier: Apache-2.0
"""What the loop reads: batches checked on the host, with a place to resume from."""

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


class Feed:
  """Iterate over batches, refusing what the compiled step could not take.

  The first batch is drawn at once, for its shape.

  Args:
    data: batches of tokens, or trees with "tokens", or with "inputs" and "labels".
    vocab_size: ids, or labels, must be below it.

  Attributes:
    length: tokens predicted in a row; 1 where an example has one label.
    tokens: predictions a batch, over all processes.

  Raises:
    ValueError: if there is no batch, or the first is neither of integer tokens (batch, length)
      nor of inputs with integer labels (batch,).
  """

  def __init__(self, data: Iterable[Any], *, vocab_size: int):
    self._vocab = vocab_size
    self._iterator: Any = iter(data)
    self._resumable = hasattr(self._iterator, "get_state")
    self._start = self._iterator.get_state() if self._resumable else None
    try:
      first = next(self._iterator)
    except StopIteration:
      raise ValueError("the data is empty: it holds no batch") from None
    ids = _ids(first)
    self._shapes = _shapes(first)
    self.length = ids.shape[1] - 1 if ids.ndim == 2 else 1
    self.tokens = ids.shape[0] * self.length * jax.process_count()
    self._drawn = 0
    self._places: dict[int, Any] = {}
    if self._resumable:
      self._iterator.set_state(self._start)
    else:
      self._iterator = itertools.chain([first], self._iterator)

  def __next__(self) -> Any:
    try:
      batch = next(self._iterator)
    except StopIteration:
      raise ValueError(
        f"the data ended after {self._drawn} batches; give more epochs or fewer steps"
      ) from None
    self._drawn += 1
    if self._resumable:
      self._places = {
        **{k: v for k, v in self._places.items() if k >= self._drawn - 2},
        self._drawn: self._iterator.get_state(),
      }
    shapes = _shapes(batch)
    if shapes != self._shapes:
      raise ValueError(
        f"batch {self._drawn} is {shapes}; the first was {self._shapes}. Shapes must not change "
        "during a run: drop the remainder, or pad with weights of zero"
      )
    ids = _ids(batch)
    low, high = int(ids.min()), int(ids.max())
    if (low < 0 or high >= self._vocab) and ids.ndim == 1:
      raise ValueError(
        f"batch {self._drawn} holds the label {low if low < 0 else high}; the classes are 0 to "
        f"{self._vocab - 1}"
      )
    if low < 0 or high >= self._vocab:
      raise ValueError(
        f"batch {self._drawn} holds token id {low if low < 0 else high}; the vocabulary is "
        f"0 to {self._vocab - 1}: the tokenizer is of another model"
      )
    return batch

  def state(self, used: int) -> Any:
    """Return, as JSON, where reading stood after `used` batches; None if it cannot be told."""
    return self._places.get(used)

  def resume(self, used: int, state: Any) -> None:
    """Go to where reading stood after `used` batches, by state or by skipping."""
    if self._resumable and state is not None:
      self._iterator.set_state(state)
    else:
      for _ in range(used):
        next(self._iterator, None)
    self._drawn = used


def _ids(batch: Any) -> np.ndarray:
  """Return tokens (batch, length + 1), or labels (batch,)."""
  labels = isinstance(batch, dict) and "inputs" in batch
  ids = np.asarray(batch["labels" if labels else "tokens"] if isinstance(batch, dict) else batch)
  whole = np.issubdtype(ids.dtype, np.integer)
  if labels and (ids.ndim != 1 or not whole or len(batch["inputs"]) != len(ids)):
    raise ValueError(
      f"a batch of {len(batch['inputs'])} inputs must have as many integer labels; got "
      f"{ids.dtype}{ids.shape}"
    )
  if not labels and (ids.ndim != 2 or not whole or ids.shape[1] < 2):
    raise ValueError(
      f"a batch must be integer tokens (batch, length + 1); got {ids.dtype}{ids.shape}"
    )
  return ids


def _shapes(batch: Any) -> Any:
  flat, _ = jax.tree_util.tree_flatten_with_path(batch)
  return ", ".join(
    f"{jax.tree_util.keystr(path)}{np.dtype(x.dtype).name}{list(x.shape)}" for path, x in flat
  )
