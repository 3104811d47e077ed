# SPDX-License-Identifier: Apache-2.0
"""Models whose embeddings and heads come in the rows of one vocabulary.

A token that a model lacks gets the row of the only model that has it, else that of the base, else
the average of those that have it, so that a merge of the wrapped models keeps it; padding rows are
the model's mean row (Hewitt, 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html). Rows are
gathered as they are read: memory is that of two embeddings. The choices are mergekit 0.1.5's.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import needs
from treesurgeon.io import vocabulary as vocabulary_lib

_ROWS = re.compile(
  r"(.*\.)?(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|embeddings|shared|"
  r"lm_head|embed_out|output|output_layer|decoder|vocab_projector)\.(weight|bias)"
  r"|cls\.predictions\.bias|lm_head\.(decoder|linear)\.(weight|bias)"
)


def remap(
  vocabulary: vocabulary_lib.Vocabulary,
  sources: Mapping[str, needs.Source],
  *,
  base: str | None = None,
  dtype: Any = None,
) -> dict[str, "Remapped"]:
  """Wrap models so that their embeddings and heads have the rows of one vocabulary.

  Args:
    vocabulary: made by `plan` for these models or more.
    sources: model to its tensors, by the names of its files; they fill each other's gaps.
    base: whose rows come first for a token that several but not all have.
    dtype: what embeddings and heads are cast to before rows are averaged; None is the widest of
      the models'.

  Returns:
    Model to wrapped source.
  """
  return {name: Remapped(vocabulary, sources, name, base=base, dtype=dtype) for name in sources}


class Remapped:
  """A source whose embedding and head have the rows of another vocabulary.

  Args:
    vocabulary: the plan.
    sources: every model that takes part, this one among them.
    name: this one's.
    base: the base model's name.
    dtype: of embeddings and heads; None is the widest of the models'.
  """

  def __init__(
    self,
    vocabulary: vocabulary_lib.Vocabulary,
    sources: Mapping[str, needs.Source],
    name: str,
    *,
    base: str | None = None,
    dtype: Any = None,
  ):
    self.source = sources[name]
    self._sources, self._vocabulary, self._name, self._base = sources, vocabulary, name, base
    self._dtype = dtype
    self._gathers: dict[tuple[str, ...], list[_Gather]] = {}

  @property
  def spec(self) -> Any:
    """Architecture description of the model as it was."""
    return self.source.spec

  def addresses(self) -> Sequence[str]:
    """List the names of every tensor."""
    return self.source.addresses()

  def struct(self, address: str) -> Any:
    """Describe one tensor's shape and dtype as it comes out."""
    held = self.source.struct(address)
    if not is_vocabulary(address):
      return held
    held_in = (self._sources[n].struct(address).dtype for n in self._holders(address))
    dtype = np.dtype(self._dtype) if self._dtype is not None else jnp.result_type(*held_in)
    return jax.ShapeDtypeStruct((self._vocabulary.size, *held.shape[1:]), dtype)

  def leaf(self, address: str) -> Any:
    """Read one tensor; the rows of embeddings and heads are gathered from where they are.

    Args:
      address: one of `addresses()`.

    Returns:
      An array; of embeddings and heads, in the widest dtype of the models'.

    Raises:
      ValueError: for a token whose donor has no row for it, or embeddings of different widths.
    """
    if not is_vocabulary(address):
      return self.source.leaf(address)
    holders, struct = self._holders(address), self.struct(address)
    if holders not in self._gathers:
      self._gathers[holders] = _gathers(self._vocabulary, self._name, holders, self._base)
    out = np.zeros(struct.shape, struct.dtype)
    for gather in self._gathers[holders]:
      found = (
        _take(f"{name}: {address}", self._sources[name].leaf(address), rows, out)
        for name, rows in gather.rows.items()
      )
      total = functools.reduce(np.add, found)
      out[gather.ids] = total if len(gather.rows) == 1 else total / len(gather.rows)
    count = len(self._vocabulary.rows[self._name])
    if len(out) > count:
      out[count:] = np.mean(out[:count], axis=0, dtype=np.float32).astype(out.dtype)
    return out

  def _holders(self, address: str) -> tuple[str, ...]:
    return tuple(n for n, s in self._sources.items() if address in s.addresses())


def is_vocabulary(name: str) -> bool:
  """Tell whether a tensor's first axis counts tokens.

  Args:
    name: in a Hugging Face file.

  Returns:
    Whether it is an embedding or a head.

  Example:
    >>> is_vocabulary("model.embed_tokens.weight"), is_vocabulary("model.norm.weight")
    (True, False)
  """
  return _ROWS.fullmatch(name) is not None


class _Gather(NamedTuple):
  """Output ids and, by model, the rows whose average they get."""

  ids: np.ndarray
  rows: Mapping[str, np.ndarray]


def _gathers(
  vocabulary: vocabulary_lib.Vocabulary, name: str, holders: tuple[str, ...], base: str | None
) -> list[_Gather]:
  """Say where each row of one model's embedding comes from; rows of none stay zero."""
  table = np.stack([vocabulary.rows[h] for h in holders])
  has, me = table >= 0, holders.index(name)
  todo = ~has[me]  # what is not the model's own
  out: list[_Gather] = []
  for word, token in vocabulary.tokens.items():
    i = vocabulary.ids[word]
    if not token.force and has[:, i].all():
      continue
    if token.model and token.model not in holders:
      raise ValueError(
        f"tokenizer.tokens[{word!r}]: its row is to come from {token.model!r}, which is not merged "
        f"here; merged are {', '.join(holders)}"
      )
    if token.force or todo[i]:
      todo[i], table[me, i] = False, -1
      if token.model:
        out.append(_Gather(np.asarray([i]), {token.model: _donated(word, i, token, vocabulary)}))
  own = np.flatnonzero(table[me] >= 0)
  out.append(_Gather(own, {name: table[me, own]}))
  # The only model that has it, else the base, else all that have it.
  if base in holders:
    at = holders.index(base)
    has = np.where(has[at][None, :], (np.arange(len(has)) == at)[:, None], has)
  sets, group = np.unique(has[:, todo], axis=1, return_inverse=True)
  ids = np.flatnonzero(todo)
  for k in range(sets.shape[1]):
    at = ids[group.reshape(-1) == k]
    donors = [h for h, present in zip(holders, sets[:, k], strict=True) if present]
    if donors:
      out.append(_Gather(at, {h: table[holders.index(h), at] for h in donors}))
  return [g for g in out if g.ids.size]


def _donated(
  word: str, i: int, token: vocabulary_lib.Token, vocabulary: vocabulary_lib.Vocabulary
) -> np.ndarray:
  row = vocabulary.rows[token.model][i] if token.row is None else token.row
  if row < 0:
    raise ValueError(f"tokenizer.tokens[{word!r}]: {token.model!r} has no such token")
  return np.asarray([row])


def _take(where: str, array: Any, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
  array = np.asarray(array)
  if array.shape[1:] != out.shape[1:]:
    raise ValueError(
      f"{where} has shape {array.shape}; rows of {out.shape[1:]} are asked for: only the number of "
      "tokens may differ"
    )
  if rows.max() >= len(array):
    raise ValueError(f"{where} has {len(array)} rows; row {rows.max()} is asked for")
  return array[rows].astype(out.dtype, copy=False)
