# SPDX-License-Identifier: Apache-2.0
"""Perplexity and bits per byte of a text, by a sliding window.

A document longer than the window is scored in windows that move by a stride; each token is
predicted once, by the first window that reaches it, so it sees at least `window - stride` tokens
before it. Of a document that fits, this is the loss `transformers` gives for `labels=input_ids`:
no token is put in front, and the first token is not predicted. Bits per byte divide the same loss
by the UTF-8 bytes of what was predicted, so models with different tokenizers compare.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.train import data, objectives

LONGEST = 4096  # default bound on the window: logits of a longer one would not fit


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """What a model makes of a text.

  Attributes:
    nll: mean natural-log loss over predicted tokens.
    perplexity: exp(nll).
    bits_per_byte: total loss in bits over the bytes of what was predicted; None for token ids.
    tokens: predicted tokens.
    documents: (total natural-log loss, predicted tokens) of each document, for `bootstrap`.
  """

  nll: float
  perplexity: float
  bits_per_byte: float | None
  tokens: int
  documents: tuple[tuple[float, int], ...] = ()

  def to_json(self) -> dict[str, float | int | None]:
    """Return the figures without the documents."""
    return {f: getattr(self, f) for f in ("nll", "perplexity", "bits_per_byte", "tokens")}


def evaluate(
  model: model_lib.Model,
  text: str | Sequence[Any],
  tokenizer: Any = None,
  *,
  window: int | None = None,
  stride: int | None = None,
  batch: int = 8,
  dtype: Any = None,
) -> Perplexity:
  """Score a text, or several documents of which none sees another.

  Compiles once for each architecture, window and batch; compressed leaves run compressed.

  Args:
    model: a decoder.
    text: a text, or documents: texts or sequences of token ids.
    tokenizer: see `train.data.encode`; not needed for token ids.
    window: tokens the model sees at once; by default its context, at most `LONGEST`, and no
      more than the longest document.
    stride: tokens by which the window moves, by default half of it.
    batch: windows at once.
    dtype: compute dtype; None keeps the parameters'.

  Returns:
    The figures, with losses added up in float64.

  Raises:
    ValueError: for an encoder, an empty text, one of a single token, ids outside the
      vocabulary, a window beyond the context or a stride beyond the window.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> evaluate(m, [[1, 2, 3], [4, 0]], window=4).tokens
    3
  """
  spec = model.spec
  if spec.kind != "decoder":
    raise ValueError(
      f"perplexity is of next tokens, but this model is an {spec.kind}, which sees them"
    )
  documents = [text] if isinstance(text, str) else list(text)
  ids, sizes = _read(documents, tokenizer)
  _check(ids, spec.vocab_size)
  context = spec.max_positions
  longest = max(len(x) for x in ids)
  # A multiple of 64, so that texts of similar length share a compiled program.
  default = min(context, LONGEST, -(-longest // 64) * 64)
  width = default if window is None else window
  if not 2 <= width <= context:
    raise ValueError(f"window={width} must lie between 2 and the model's context of {context}")
  move = max(1, width // 2) if stride is None else stride
  if not 1 <= move <= width:
    raise ValueError(f"stride={move} must lie between 1 and window={width}")
  score = _scorer(spec, None if dtype is None else jnp.dtype(dtype).name)
  params = jax.device_put(model.params)  # a model read from disk would be sent with every batch
  totals, counts = np.zeros(len(ids)), np.zeros(len(ids), np.int64)
  for tokens, weights, owners in _batches(ids, window=width, stride=move, batch=batch):
    nll = np.asarray(score(params, tokens, weights), np.float64)
    np.add.at(totals, owners, nll[: len(owners)])
    np.add.at(counts, owners, weights[: len(owners)].sum(1).astype(np.int64))
  total, tokens = float(totals.sum()), int(counts.sum())
  nll = total / tokens
  return Perplexity(
    nll=nll,
    perplexity=math.exp(nll) if nll < 700 else math.inf,
    bits_per_byte=None if sizes is None else total / math.log(2) / max(1, sum(sizes)),
    tokens=tokens,
    documents=tuple(zip(totals.tolist(), counts.tolist(), strict=True)),
  )


def windows(length: int, *, window: int, stride: int) -> list[tuple[int, int, int]]:
  """Cut a document into windows such that every token but the first is predicted once.

  Args:
    length: tokens in the document.
    window: tokens the model sees at once.
    stride: by how much the window moves.

  Returns:
    (start, first, stop) for each window: it sees [start, stop) and predicts [first, stop).

  Example:
    >>> windows(7, window=4, stride=2)
    [(0, 1, 4), (2, 4, 6), (4, 6, 7)]
  """
  out, first, start = [], 1, 0
  while first < length:
    # With stride == window the next window would see nothing before its first target.
    start = min(start, first - 1)
    stop = min(start + window, length)
    out.append((start, first, stop))
    first, start = stop, start + stride
  return out


def _batches(
  ids: Sequence[np.ndarray], *, window: int, stride: int, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yield padded (tokens, weights of targets, document of each row) of one shape."""
  pieces = [
    (owner, *piece)
    for owner, x in enumerate(ids)
    for piece in windows(len(x), window=window, stride=stride)
  ]
  for at in range(0, len(pieces), batch):
    tokens = np.zeros((batch, window), np.int32)
    weights = np.zeros((batch, window - 1), np.float32)
    some = pieces[at : at + batch]
    for row, (owner, start, first, stop) in enumerate(some):
      tokens[row, : stop - start] = ids[owner][start:stop]
      weights[row, first - start - 1 : stop - start - 1] = 1
    yield tokens, weights, np.array([p[0] for p in some])


@functools.lru_cache(maxsize=32)
def _scorer(spec: Any, dtype: str | None) -> Any:
  """Compile the loss of each row's weighted targets."""

  @jax.jit
  def score(params: Any, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    logits = models.forward(spec, params, tokens, dtype=dtype).logits[:, :-1]
    # Padding follows what it must not touch: attention is causal, and its targets weigh nothing.
    return jnp.where(weights > 0, objectives.token_nll(logits, tokens[:, 1:]), 0.0).sum(-1)

  return score


def _read(documents: Sequence[Any], tokenizer: Any) -> tuple[list[np.ndarray], list[int] | None]:
  """Tokenize, and count the bytes that follow each document's first token."""
  if not all(isinstance(d, str) for d in documents):
    if any(isinstance(d, str) for d in documents):
      raise ValueError("documents must be all texts or all token ids, not some of each")
    return [np.asarray(d, np.int32).reshape(-1) for d in documents], None
  if documents and tokenizer is None:
    raise ValueError("a text needs a tokenizer; token ids do not")
  ids = data.encode(documents, tokenizer)
  sizes = []
  for text, x in zip(documents, ids, strict=True):
    sizes.append(len(text.encode()) - (first_bytes(text, x, tokenizer) if len(x) else 0))
  return ids, sizes


def first_bytes(text: str, ids: Sequence[int] | np.ndarray, tokenizer: Any) -> int:
  """Count the bytes of a text that its first token spells, which are not predicted.

  Args:
    text: the document.
    ids: its tokens.
    tokenizer: what made them. A byte-level vocabulary is exact to the byte; another tokenizer's
      offsets to the character; without either, the decoded token counts.

  Returns:
    Bytes in UTF-8.

  Example:
    >>> class Bytes:
    ...   def decode(self, ids): return bytes(ids).decode()
    >>> first_bytes("abc", [97, 98, 99], Bytes())
    1
  """
  first = int(ids[0])
  if type(getattr(tokenizer, "decoder", None)).__name__ == "ByteLevel":
    return len(tokenizer.id_to_token(first))  # its alphabet has one character a byte
  if hasattr(tokenizer, "encode_batch"):
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    return len(text[: offsets[0][1]].encode())
  return len(tokenizer.decode([first]).encode()) if hasattr(tokenizer, "decode") else 0


def _check(ids: Sequence[np.ndarray], vocab_size: int) -> None:
  if not sum(len(x) for x in ids):
    raise ValueError(f"the text is empty: {len(ids)} documents hold no token")
  if max(len(x) for x in ids) < 2:
    raise ValueError("the text is too short: no document has 2 tokens, so nothing is predicted")
  for i, x in enumerate(ids):
    if len(x) and not 0 <= int(x.min()) <= int(x.max()) < vocab_size:
      bad = int(x.min()) if x.min() < 0 else int(x.max())
      raise ValueError(
        f"document {i} holds token id {bad}; the vocabulary is 0 to {vocab_size - 1}: the "
        "tokenizer is of another model"
      )
