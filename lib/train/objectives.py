# SPDX-License-Identifier: Apache-2.0
"""What training minimises: cross entropy of next tokens, masked tokens and classes, in float32.

An objective is a function `(spec, params, batch, keys) -> (loss, aux)`. The loss is a weighted mean
over targets and `aux["weight"]` their total weight, so microbatches of unequal weight add up to
the loss of the whole batch. Randomness comes as one key an example, hence does not depend on how a
batch is cut.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from treesurgeon import models

Batch = Any  # tokens (batch, length + 1), or {"tokens": ..., "weights": (batch, length)}
Aux = dict[str, jax.Array]
Objective = Callable[[Any, Mapping[str, Any], Batch, jax.Array], tuple[jax.Array, Aux]]


def cross_entropy(
  logits: Float[Array, "batch length vocab"],
  targets: Int[Array, "batch length"],
  weights: Float[Array, "batch length"] | None = None,
) -> tuple[Float[Array, ""], Aux]:
  """Average the negative log probability of targets, by a float32 log-softmax.

  Args:
    logits: unnormalised log probabilities.
    targets: token ids; those of weight zero may be anything.
    weights: weight of each target; None means one each.

  Returns:
    (mean natural-log loss, {"accuracy": share of targets ranked first, "weight": total weight}).
    With a total weight of zero both means are zero.

  Example:
    >>> loss, aux = cross_entropy(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), jnp.int32))
    >>> round(float(loss), 4), float(aux["weight"])
    (1.3863, 2.0)
  """
  w = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
  nll = token_nll(logits, targets)
  total = w.sum()
  scale = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
  hit = (logits.argmax(-1) == targets).astype(jnp.float32)
  # A masked target may hold an impossible logit, and 0 * inf is not 0.
  loss = jnp.where(w > 0, nll * w, 0.0).sum() * scale
  return loss, {"accuracy": (hit * w).sum() * scale, "weight": total}


def token_nll(
  logits: Float[Array, "batch length vocab"], targets: Int[Array, "batch length"]
) -> Float[Array, "batch length"]:
  """Compute the negative log probability of every target, in float32.

  Args:
    logits: unnormalised log probabilities.
    targets: token ids; those outside the vocabulary are clipped into it.

  Returns:
    Natural-log losses.

  Example:
    >>> token_nll(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), jnp.int32)).shape
    (1, 1)
  """
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


def mask_tokens(
  keys: jax.Array,
  tokens: Int[Array, "batch length"],
  *,
  mask_id: int,
  vocab_size: int,
  rate: float = 0.15,
  special: tuple[int, ...] = (),
) -> tuple[Int[Array, "batch length"], Float[Array, "batch length"]]:
  """Corrupt tokens as BERT does: of those chosen, 80 % masked, 10 % random, 10 % kept.

  Args:
    keys: one key an example.
    tokens: token ids.
    mask_id: id of the mask token.
    vocab_size: random replacements are drawn below it.
    rate: probability that a token is chosen.
    special: ids that are never chosen.

  Returns:
    (inputs, weights): the corrupted tokens, and 1 where a token was chosen.

  Example:
    >>> tokens = jnp.arange(8, dtype=jnp.int32)[None, :]
    >>> x, w = mask_tokens(jax.random.split(jax.random.key(0), 1), tokens, mask_id=9, vocab_size=8)
    >>> bool(((x == tokens) | (w == 1)).all())
    True

  Reference: Devlin et al., BERT, arXiv:1810.04805, section 3.1.
  """

  def one(key: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    choose, how, what = jax.random.split(key, 3)
    chosen = jax.random.uniform(choose, row.shape) < rate
    for token in special:
      chosen &= row != token
    u = jax.random.uniform(how, row.shape)
    other = jax.random.randint(what, row.shape, 0, vocab_size, row.dtype)
    changed = jnp.where(u < 0.8, jnp.asarray(mask_id, row.dtype), jnp.where(u < 0.9, other, row))
    return jnp.where(chosen, changed, row), chosen.astype(jnp.float32)

  return jax.vmap(one)(keys, tokens)


def next_token(*, dtype: Any = None, remat: bool = False) -> Objective:
  """Predict each token from those before it.

  Args:
    dtype: compute dtype of the forward pass; None keeps the parameters'.
    remat: recompute activations in the backward pass instead of keeping them.

  Returns:
    An objective over tokens (batch, length + 1) and optional weights (batch, length), one a target.

  Example:
    >>> objective = next_token()
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0), jnp.float32)
    >>> loss, _ = objective(spec, params, jnp.zeros((1, 3), jnp.int32), None)
    >>> round(float(loss), 1)
    1.6
  """

  def objective(spec: Any, params: Any, batch: Batch, keys: Any) -> tuple[jax.Array, Aux]:
    del keys
    tokens, weights = _parts(batch)
    out = models.forward(spec, params, tokens[:, :-1], dtype=dtype, remat=remat)
    return cross_entropy(out.logits, tokens[:, 1:], weights)

  return objective


def masked_token(
  *,
  mask_id: int,
  rate: float = 0.15,
  special: tuple[int, ...] = (),
  dtype: Any = None,
  remat: bool = False,
) -> Objective:
  """Predict masked tokens from both sides, for encoders.

  Args:
    mask_id: id of the mask token.
    rate: probability that a token is chosen.
    special: ids that are never chosen.
    dtype: compute dtype of the forward pass; None keeps the parameters'.
    remat: recompute activations in the backward pass instead of keeping them.

  Returns:
    An objective over tokens (batch, length) and optional weights of the same shape.

  Raises:
    ValueError: when first used, if the mask token is outside the vocabulary.

  Example:
    >>> callable(masked_token(mask_id=4))
    True
  """

  def objective(spec: Any, params: Any, batch: Batch, keys: Any) -> tuple[jax.Array, Aux]:
    if not 0 <= mask_id < spec.vocab_size:
      raise ValueError(f"mask_id={mask_id} is outside the vocabulary of {spec.vocab_size}")
    tokens, given = _parts(batch)
    inputs, weights = mask_tokens(
      keys, tokens, mask_id=mask_id, vocab_size=spec.vocab_size, rate=rate, special=special
    )
    weights = weights if given is None else weights * given
    out = models.forward(spec, params, inputs, dtype=dtype, remat=remat)
    return cross_entropy(out.logits, tokens, weights)

  return objective


def classification(
  *, label_smoothing: float = 0.0, mixup: float = 0.0, dtype: Any = None
) -> Objective:
  """Predict the class of an image.

  Args:
    label_smoothing: share of a label's weight that is spread evenly over all classes.
    mixup: strength a of mixup: every image and its label are averaged with those of another of the
      batch, with a share drawn from Beta(a, a); 0 is off.
    dtype: compute dtype of the forward pass; None keeps the parameters'.

  Returns:
    An objective over {"inputs": images, "labels": (batch,)} and optional "weights" (batch,). It
    reports the accuracy on the images as they enter the network, by their heavier label.

  Raises:
    ValueError: for a share outside [0, 1) or a negative strength.

  Example:
    >>> spec = models.VisionSpec("mlp", image_size=2, num_classes=3, d_model=4, num_layers=1)
    >>> batch = {"inputs": jnp.zeros((2, 4)), "labels": jnp.array([0, 2])}
    >>> loss, aux = classification()(spec, models.init(spec, jax.random.key(0)), batch, None)
    >>> round(float(loss), 4), float(aux["weight"])
    (1.0986, 2.0)

  Reference: Szegedy et al., arXiv:1512.00567, section 7; Zhang et al., mixup, arXiv:1710.09412.
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
  if mixup < 0:
    raise ValueError(f"mixup={mixup} must be >= 0")

  def objective(spec: Any, params: Any, batch: Batch, keys: Any) -> tuple[jax.Array, Aux]:
    x, labels = jnp.asarray(batch["inputs"]), batch["labels"]
    target = jax.nn.one_hot(labels, spec.num_classes)
    if mixup:
      x, target = _mix(x, target, keys, mixup)
    target = (1 - label_smoothing) * target + label_smoothing / spec.num_classes
    logits = models.forward(spec, params, x, dtype=dtype).logits
    w = jnp.asarray(batch.get("weights", jnp.ones(labels.shape)), jnp.float32)
    total = w.sum()
    scale = 1 / jnp.maximum(total, 1e-9)
    each = -(target * jax.nn.log_softmax(logits)).sum(-1)
    hit = (logits.argmax(-1) == target.argmax(-1)).astype(jnp.float32)
    return (each * w).sum() * scale, {"accuracy": (hit * w).sum() * scale, "weight": total}

  return objective


def default(spec: Any) -> Objective:
  """Return what a network of some kind is trained for unless told otherwise.

  Args:
    spec: the architecture.

  Returns:
    `classification()` for an image classifier, else `next_token()`.

  Example:
    >>> default(models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)).__name__
    'objective'
  """
  return classification() if isinstance(spec, models.VisionSpec) else next_token()


def _mix(
  x: jax.Array, target: jax.Array, keys: jax.Array, strength: float
) -> tuple[jax.Array, jax.Array]:
  """Average every example with its neighbour, by a share that its own key draws."""
  share = jax.vmap(lambda k: jax.random.beta(k, strength, strength))(keys)

  def blend(y: jax.Array) -> jax.Array:
    s = share.reshape((-1,) + (1,) * (y.ndim - 1)).astype(y.dtype)
    return s * y + (1 - s) * jnp.roll(y, 1, axis=0)

  return blend(x), blend(target)


def _parts(batch: Batch) -> tuple[jax.Array, jax.Array | None]:
  if isinstance(batch, Mapping):
    return batch["tokens"], batch.get("weights")
  return batch, None
