# SPDX-License-Identifier: Apache-2.0
"""Objectives that tune a policy towards what is preferred, near a reference: DPO and PPO.

They have the signature of `train.objectives`. The reference is any parameters: the model one starts
from, or a soup of several, as SALSA takes (`merge.salsa`). Its log probabilities are computed
within the step, or come with the batch, which saves a forward pass where batches are used
repeatedly.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.models import preferences
from treesurgeon.train import objectives


def dpo(
  reference_params: Any = None, *, beta: float = 0.1, dtype: Any = None
) -> objectives.Objective:
  """Prefer chosen answers to rejected ones.

  Args:
    reference_params: parameters of π_ref; None reads the batch's "reference_chosen" and
      "reference_rejected" (batch,).
    beta: how dear it is to leave the reference.
    dtype: compute dtype of the forward passes; None keeps the parameters'.

  Returns:
    An objective over pairs, see `models.preferences`. Instead of "chosen" and "chosen_weights" it
    takes "tokens" and "weights" too, by which `loop.fit` knows a batch. It reports the accuracy,
    the share of pairs ranked rightly, and the margin.

  Raises:
    ValueError: if beta is not above 0; when used, without pairs or a reference.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> pairs = {"tokens": jnp.ones((1, 3), jnp.int32), "rejected": jnp.zeros((1, 3), jnp.int32)}
    >>> round(float(dpo(params)(spec, params, pairs, None)[0]), 4)
    0.6931

  Reference: Rafailov et al., Direct preference optimization, arXiv:2305.18290.
  """
  _check_beta(beta)

  def objective(spec: Any, params: Any, batch: Any, keys: Any) -> tuple[jax.Array, objectives.Aux]:
    del keys
    pairs = _pairs(batch)
    chosen, rejected = preferences.pair_log_probs(spec, params, pairs, dtype=dtype)
    if reference_params is not None:
      reference = preferences.pair_log_probs(spec, reference_params, pairs, dtype=dtype)
    elif {"reference_chosen", "reference_rejected"} <= set(pairs):
      reference = (pairs["reference_chosen"], pairs["reference_rejected"])
    else:
      raise ValueError(
        "dpo has no reference: give reference_params, or batches with 'reference_chosen' and "
        "'reference_rejected'"
      )
    each, margin = preferences.dpo(chosen, rejected, *jax.lax.stop_gradient(reference), beta=beta)
    weight = jnp.float32(each.shape[0])
    hit = (margin > 0).mean(dtype=jnp.float32)
    return each.mean(), {"accuracy": hit, "margin": margin.mean(), "weight": weight}

  return objective


def ppo(
  reference_params: Any = None, *, beta: float = 0.1, clip: float = 0.2, dtype: Any = None
) -> objectives.Objective:
  """Raise the reward of sampled answers, less β times their divergence from the reference.

  Args:
    reference_params: parameters of π_ref; None reads the batch's "reference" (batch, length).
    beta: price of a nat.
    clip: how far a token's probability may count as moved since it was sampled.
    dtype: compute dtype of the forward passes; None keeps the parameters'.

  Returns:
    An objective over {"tokens": (batch, length + 1), "weights": (batch, length), 1 for what was
    sampled, "sampled": (batch, length), log probabilities at that time, "rewards": (batch,)}. It
    reports the divergence of an answer. As returns are compared within the batch, microbatches
    (`accumulate`) have baselines of their own.

  Raises:
    ValueError: for beta or clip not above 0.

  Example:
    >>> callable(ppo(beta=0.05))
    True

  Reference: Schulman et al., Proximal policy optimization algorithms, arXiv:1707.06347.
  """
  _check_beta(beta)
  if clip <= 0:
    raise ValueError(f"clip={clip} must be above 0")

  def objective(spec: Any, params: Any, batch: Any, keys: Any) -> tuple[jax.Array, objectives.Aux]:
    del keys
    tokens, weights = jnp.asarray(batch["tokens"]), jnp.asarray(batch["weights"], jnp.float32)
    logp = preferences.token_log_probs(spec, params, tokens, dtype=dtype)
    if reference_params is not None:
      reference = preferences.token_log_probs(spec, reference_params, tokens, dtype=dtype)
    else:
      reference = batch["reference"]
    sampled, rewards = jnp.asarray(batch["sampled"]), jnp.asarray(batch["rewards"])
    loss, kl = preferences.ppo(logp, sampled, reference, rewards, weights, beta=beta, clip=clip)
    return loss, {"divergence": kl.mean(), "weight": weights.sum()}

  return objective


def _pairs(batch: Any) -> Any:
  """Call the loop's "tokens" what they are here."""
  if not isinstance(batch, Mapping) or "tokens" not in batch:
    return batch
  new = {"tokens": "chosen", "weights": "chosen_weights"}
  return {new.get(k, k): v for k, v in batch.items()}


def _check_beta(beta: float) -> None:
  if beta <= 0:
    raise ValueError(f"beta={beta} must be above 0")
