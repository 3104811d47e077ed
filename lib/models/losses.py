# SPDX-License-Identifier: Apache-2.0
"""What a network says of a batch, and how well: the losses that methods with data share.

A batch is a token array (batch, length), whose every next token is a label, or a mapping with
"tokens" and optional "weights" (batch, length - 1) or "mask" (batch, length), nonzero at tokens
that are no padding, or a mapping of images with "inputs", "labels" (batch,) and optional "weights"
(batch,).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from treesurgeon.models import network, taps

Batch = Any


def predictions(
  spec: Any, params: Any, batch: Batch, *, patch: taps.Patch | None = None
) -> tuple[Float[Array, "n classes"], Int[Array, " n"], Float[Array, " n"]]:
  """Run the network on a batch and line its logits up with their labels.

  Args:
    spec: architecture.
    params: parameters.
    batch: see the module.
    patch: as `forward` takes it.

  Returns:
    (logits, labels, weights), one row a prediction.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> [x.shape for x in predictions(spec, params, jnp.zeros((2, 3), jnp.int32))]
    [(4, 5), (4,), (4,)]
  """
  x, labels, weights = _parts(batch)
  logits = network.forward(spec, params, x, patch=patch).logits
  return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), weights.reshape(-1)


def inputs(batch: Batch) -> Array:
  """Return what of a batch enters the network, for statistics: all tokens, or the images.

  Args:
    batch: see the module.

  Returns:
    The array that `embed` takes.

  Example:
    >>> inputs({"inputs": jnp.ones((2, 4)), "labels": jnp.zeros(2, int)}).shape
    (2, 4)
  """
  if isinstance(batch, Mapping):
    _check(batch)
    batch = batch["inputs" if "inputs" in batch else "tokens"]
  return jnp.asarray(batch)


def nll(
  spec: Any, params: Any, batch: Batch, *, patch: taps.Patch | None = None
) -> Float[Array, ""]:
  """Compute the mean negative log-likelihood of a batch's labels.

  Args:
    spec: architecture.
    params: parameters.
    batch: see the module.
    patch: as `forward` takes it.

  Returns:
    Nats a label, float32.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> round(float(nll(spec, params, jnp.zeros((1, 3), jnp.int32))), 1)
    1.6
  """
  logits, labels, weights = predictions(spec, params, batch, patch=patch)
  each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
  return jnp.sum(each * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def entropy(
  spec: Any, params: Any, batch: Batch, *, patch: taps.Patch | None = None
) -> Float[Array, ""]:
  """Compute the mean Shannon entropy of a batch's predictions; labels are not used.

  Args:
    spec: architecture.
    params: parameters.
    batch: see the module.
    patch: as `forward` takes it.

  Returns:
    Nats a prediction, float32.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> bool(entropy(spec, params, jnp.zeros((1, 3), jnp.int32)) <= jnp.log(5.0) + 1e-5)
    True
  """
  logits, _, weights = predictions(spec, params, batch, patch=patch)
  logp = jax.nn.log_softmax(logits.astype(jnp.float32))
  each = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
  return jnp.sum(each * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def _parts(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return inputs, labels, and weights of the labels' shape."""
  given = batch.get("weights") if isinstance(batch, Mapping) else None
  x = inputs(batch)
  if isinstance(batch, Mapping) and "inputs" in batch:
    labels = jnp.asarray(batch["labels"])
  else:
    x, labels = x[:, :-1], x[:, 1:]
    if given is None and isinstance(batch, Mapping) and "mask" in batch:
      given = jnp.asarray(batch["mask"])[:, 1:] != 0
  ones = jnp.ones(labels.shape, jnp.float32)
  return x, labels, ones if given is None else jnp.asarray(given, jnp.float32)


def _check(batch: Mapping[str, Any]) -> None:
  if "tokens" not in batch and not {"inputs", "labels"} <= set(batch):
    raise ValueError(
      f"a batch holds {', '.join(map(str, batch)) or 'nothing'}; valid: an array of tokens, or a "
      "mapping with 'tokens', or with 'inputs' and 'labels'"
    )
