# SPDX-License-Identifier: Apache-2.0
"""Fuse models of other architectures and vocabularies into a target, by their distributions.

The heterogeneous half of Zhang et al., "Unconstrained model merging for enhanced LLM reasoning",
2024 (arXiv 2410.13699), which builds on Wan et al., "Knowledge fusion of large language models"
(FuseLLM), 2024 (arXiv 2401.10491): run every source model on the text, bring its next-token
distributions into the target's tokens, keep for each sequence the source whose distributions fit
the text best (MinCE), and train the target on λ CE + (1 − λ) KL(fused ‖ target).

Where we differ: positions are aligned where the text that precedes is the same to the character,
for there both models predict the same event, instead of by dynamic programming over edit distances
of tokens; other positions carry no teacher. Tokens are mapped by equal strings ("exact", FuseLLM's
EM), or to the longest target token that begins them ("prefix": then the text goes on with that
token), instead of the least edit distance, which gives mass to strings that the text does not
have. Mass that maps nowhere is dropped and the rest normalized.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from treesurgeon import models as networks
from treesurgeon.core import descend
from treesurgeon.core import model as model_lib

MAPPINGS = ("exact", "prefix")


def positions(source: Sequence[str], target: Sequence[str]) -> Int[np.ndarray, " target"]:
  """Find for each target token the source token that ends at the same character.

  Args:
    source: a text's tokens as strings, by the source's tokenizer.
    target: the same text's, by the target's.

  Returns:
    Indices into `source`, -1 where no token ends there.

  Raises:
    ValueError: if the two are not the same text.

  Example:
    >>> positions(["ab", "c", "de"], ["a", "bc", "d", "e"]).tolist()
    [-1, 1, -1, 2]
  """
  a, b = "".join(source), "".join(target)
  if not (a.startswith(b) or b.startswith(a)):
    at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    raise ValueError(f"the tokens spell two texts: {a[at : at + 12]!r}, {b[at : at + 12]!r}")
  ends = np.cumsum([len(s) for s in source])
  found = np.cumsum([len(s) for s in target])
  # Of empty tokens that end at one place the last has seen them all.
  where = np.searchsorted(ends, found, side="right") - 1
  return np.where((where >= 0) & (ends[np.maximum(where, 0)] == found), where, -1)


def vocabulary(
  source: Sequence[str], target: Sequence[str], *, how: str = "exact"
) -> Int[np.ndarray, " source"]:
  """Map a source's tokens to the target's.

  Args:
    source: the source's tokens as strings, by id.
    target: the target's.
    how: "exact" or "prefix".

  Returns:
    For each source id a target id, or -1.

  Raises:
    ValueError: for an unknown mapping.

  Example:
    >>> vocabulary(["a", "bc", "x"], ["b", "a"], how="prefix").tolist()
    [1, 0, -1]
  """
  if how not in MAPPINGS:
    raise ValueError(f"how={how!r}; valid: {', '.join(MAPPINGS)}")
  known: dict[str, int] = {}
  for i, token in enumerate(target):
    known.setdefault(token, i)

  def one(token: str) -> int:
    sizes = range(len(token), 0, -1) if how == "prefix" else (len(token),)
    return next((known[token[:n]] for n in sizes if token[:n] in known), -1)

  return np.array([one(t) for t in source], np.int32)


@functools.partial(jax.jit, static_argnames="size")
def translate(
  probs: Float[Array, "source_len source_vocab"],
  rows: Int[Array, " target_len"],
  mapping: Int[Array, " source_vocab"],
  *,
  size: int,
) -> tuple[Float[Array, "target_len {size}"], Float[Array, " target_len"]]:
  """Bring a source's next-token distributions to the target's positions and tokens.

  Args:
    probs: distribution after each source token.
    rows: from `positions`.
    mapping: from `vocabulary`.
    size: the target's vocabulary.

  Returns:
    (distribution after each target token, 1 where there is one and else 0).

  Example:
    >>> p, known = translate(jnp.array([[0.2, 0.2, 0.6]]), jnp.array([0, -1]),
    ...                      jnp.array([1, 0, -1]), size=2)
    >>> p.tolist(), known.tolist()
    ([[0.5, 0.5], [0.0, 0.0]], [1.0, 0.0])
  """
  mine = jnp.where(mapping >= 0, mapping, size)
  moved = jnp.zeros((probs.shape[0], size + 1)).at[:, mine].add(probs.astype(jnp.float32))
  moved = jnp.where(rows[:, None] >= 0, moved[rows][:, :size], 0.0)
  mass = moved.sum(axis=1, keepdims=True)
  return moved / jnp.where(mass > 0, mass, 1.0), (mass[:, 0] > 0).astype(jnp.float32)


def choose(
  teachers: Float[Array, "sources batch length vocab"],
  known: Float[Array, "sources batch length"],
  labels: Int[Array, "batch length"],
) -> tuple[Float[Array, "batch length vocab"], Float[Array, "batch length"]]:
  """Keep for each sequence the source whose distributions fit it best (MinCE).

  Args:
    teachers: distributions of each source.
    known: 1 where a source has one.
    labels: next tokens.

  Returns:
    (distributions, 1 where there is one).

  Example:
    >>> p = jnp.array([[[[0.9, 0.1]]], [[[0.2, 0.8]]]])
    >>> choose(p, jnp.ones((2, 1, 1)), jnp.array([[1]]))[0].tolist() == p[1].tolist()
    True
  """
  picked = jnp.take_along_axis(teachers, labels[None, :, :, None], axis=-1)[..., 0]
  ce = -jnp.log(jnp.maximum(picked, 1e-9)) * known
  count = known.sum(axis=-1)
  ce = jnp.where(count > 0, ce.sum(axis=-1) / jnp.maximum(count, 1.0), jnp.inf)
  best = jnp.argmin(ce, axis=0)
  row = jnp.arange(labels.shape[0])
  return teachers[best, row], known[best, row]


def fusion_loss(
  logits: Float[Array, "n vocab"],
  labels: Int[Array, " n"],
  teacher: Float[Array, "n vocab"],
  known: Float[Array, " n"],
  *,
  lam: ArrayLike = 0.9,
) -> Float[Array, ""]:
  """Compute λ CE + (1 − λ) KL(teacher ‖ network), each a mean over its positions.

  Args:
    logits: the network's.
    labels: next tokens.
    teacher: distributions.
    known: 1 where there is one.
    lam: λ, weight of the labels; FuseLLM uses 0.9.

  Returns:
    Nats a position.

  Example:
    >>> logits = jnp.array([[0.0, 1.0]])
    >>> same = fusion_loss(
    ...   logits, jnp.array([1]), jax.nn.softmax(logits), jnp.ones(1), lam=0.0)
    >>> abs(round(float(same), 6))
    0.0
  """
  logp = jax.nn.log_softmax(logits.astype(jnp.float32))
  ce = -jnp.take_along_axis(logp, labels[:, None], axis=-1)[:, 0].mean()
  entropy = jnp.where(teacher > 0, teacher * jnp.log(jnp.where(teacher > 0, teacher, 1.0)), 0.0)
  kl = (entropy - teacher * logp).sum(axis=-1) * known
  return jnp.asarray(lam * ce + (1 - lam) * kl.sum() / jnp.maximum(known.sum(), 1.0))


def fuse(
  target: model_lib.Model,
  batches: Iterable[Mapping[str, Any]],
  *,
  steps: int,
  rate: float = 1e-3,
  decay: float = 0.0,
  lam: float = 0.9,
) -> model_lib.Model:
  """Train a target on text and on what other models say of it.

  Args:
    target: the model to be trained; all its leaves must be arrays.
    batches: mappings with "tokens" (batch, length), "teacher" (batch, length - 1, vocabulary), the
      distributions of each next token, and "known" (batch, length - 1).
    steps: updates.
    rate: AdamW's step.
    decay: AdamW's weight decay.
    lam: see `fusion_loss`.

  Returns:
    The trained model; `aux["notes"]` tells the first and last loss.

  Raises:
    ValueError: without a batch, or for lam outside 0 to 1.

  Reference:
    Wan et al., Knowledge fusion of large language models, 2024, arXiv 2401.10491.
  """
  if not 0 <= lam <= 1:
    raise ValueError(f"lam={lam} must lie between 0 and 1")
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), target.params)
  made, losses = descend.minimize(
    _batch_loss, wide, list(batches), jnp.float32(lam), optimizer=_adamw(rate, decay),
    steps=steps, spec=target.spec,
  )  # fmt: skip
  params = jax.tree.map(lambda new, old: new.astype(old.dtype), made, target.params)
  note = {"first_loss": float(losses[0]), "last_loss": float(losses[-1])} if len(losses) else {}
  notes = {**target.aux.get("notes", {}), **note}
  return target.replace(params=params, aux={**target.aux, "notes": notes})


def _batch_loss(spec: Any, params: Any, batch: Any, key: jax.Array, lam: jax.Array) -> jax.Array:
  del key
  logits, labels, _ = networks.predictions(spec, params, batch["tokens"])
  teacher = batch["teacher"].reshape(-1, logits.shape[-1])
  return fusion_loss(logits, labels, teacher, batch["known"].reshape(-1), lam=lam)


@functools.lru_cache(maxsize=32)
def _adamw(rate: float, decay: float) -> optax.GradientTransformation:
  return optax.adamw(rate, weight_decay=decay)
