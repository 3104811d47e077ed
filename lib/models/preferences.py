# SPDX-License-Identifier: Apache-2.0
"""How likely answers are, and what preferences between them are worth: DPO and PPO's surrogate.

Rafailov et al., "Direct preference optimization: your language model is secretly a reward model",
2023 (arXiv 2305.18290); Schulman et al., "Proximal policy optimization algorithms", 2017 (arXiv
1707.06347), with the Kullback-Leibler divergence from a reference taken off the reward, as Ouyang
et al., 2022 (arXiv 2203.02155) do.

A batch of pairs is a mapping with "chosen" and "rejected", tokens (batch, length + 1) of prompt and
answer, and optional "chosen_weights" and "rejected_weights" (batch, length), 1 for the targets that
belong to the answer.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from treesurgeon.models import network


def token_log_probs(
  spec: Any, params: Any, tokens: Int[Array, "batch tokens"], *, dtype: Any = None
) -> Float[Array, "batch targets"]:
  """Compute the log probability of every token given those before it.

  Args:
    spec: architecture.
    params: parameters.
    tokens: token ids.
    dtype: compute dtype; None keeps the parameters'.

  Returns:
    Nats, float32, one fewer than tokens.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> token_log_probs(spec, params, jnp.zeros((2, 3), jnp.int32)).shape
    (2, 2)
  """
  logits = network.forward(spec, params, tokens[:, :-1], dtype=dtype).logits
  logp = jax.nn.log_softmax(logits.astype(jnp.float32))
  return jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]


def pair_log_probs(
  spec: Any, params: Any, batch: Mapping[str, Any], *, dtype: Any = None
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
  """Compute the log probability of the chosen and of the rejected answers.

  Args:
    spec: architecture.
    params: parameters.
    batch: pairs, see the module.
    dtype: compute dtype; None keeps the parameters'.

  Returns:
    (chosen, rejected), nats an answer.

  Raises:
    ValueError: if the batch holds no pairs.
  """
  check(batch)
  sides = [jnp.asarray(batch[side]) for side in ("chosen", "rejected")]
  if sides[0].shape == sides[1].shape:  # one pass over both
    both = token_log_probs(spec, params, jnp.concatenate(sides), dtype=dtype)
    each = jnp.split(both, 2)
  else:
    each = [token_log_probs(spec, params, x, dtype=dtype) for x in sides]
  sums = []
  for side, logp in zip(("chosen", "rejected"), each, strict=True):
    weights = jnp.asarray(batch.get(f"{side}_weights", jnp.ones(logp.shape)), jnp.float32)
    # Of a token that weighs nothing the probability may be 0, and 0 * inf is not 0.
    sums.append(jnp.where(weights > 0, logp * weights, 0.0).sum(axis=1))
  return sums[0], sums[1]


def dpo(
  chosen: Float[Array, " batch"],
  rejected: Float[Array, " batch"],
  reference_chosen: Float[Array, " batch"],
  reference_rejected: Float[Array, " batch"],
  *,
  beta: ArrayLike = 0.1,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
  """Compute −log σ(β (log π/π_ref of the chosen − that of the rejected)).

  Args:
    chosen: the policy's log probability of the chosen answers.
    rejected: of the rejected ones.
    reference_chosen: the reference's.
    reference_rejected: the reference's.
    beta: β, how dear it is to leave the reference.

  Returns:
    (loss of each pair, its margin β (…)).

  Example:
    >>> zero = jnp.zeros(1)
    >>> round(float(dpo(zero, zero, zero, zero)[0][0]), 4)
    0.6931
  """
  margin = jnp.asarray(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))
  return jax.nn.softplus(-margin), margin


def ppo(
  logp: Float[Array, "batch length"],
  sampled: Float[Array, "batch length"],
  reference: Float[Array, "batch length"],
  rewards: Float[Array, " batch"],
  weights: Float[Array, "batch length"],
  *,
  beta: ArrayLike = 0.1,
  clip: ArrayLike = 0.2,
) -> tuple[Float[Array, ""], Float[Array, " batch"]]:
  """Compute PPO's clipped surrogate of reward − β log(π/π_ref), with the batch's mean as baseline.

  The value network that PPO learns besides is left out: an answer's return, the same for all its
  tokens, is compared with the mean of the batch's.

  Args:
    logp: the policy's log probability of each token.
    sampled: that of the policy which wrote the answers.
    reference: the reference's.
    rewards: of each answer.
    weights: 1 for the tokens that were sampled.
    beta: β, price of a nat of divergence from the reference.
    clip: ε, how far a probability's ratio counts.

  Returns:
    (loss: mean over tokens, divergence of each sampled answer: Σ log π_sampled/π_ref).

  Example:
    >>> x = jnp.zeros((2, 3))
    >>> loss, kl = ppo(x, x, x - 1.0, jnp.array([0.0, 2.0]), jnp.ones((2, 3)))
    >>> abs(float(loss)), kl.tolist()
    (0.0, [3.0, 3.0])
  """
  kl = ((sampled - reference) * weights).sum(axis=1)
  returns = jax.lax.stop_gradient(rewards - beta * kl)
  advantage = (returns - returns.mean())[:, None]
  ratio = jnp.exp(logp - sampled)
  gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
  return -(gain * weights).sum() / jnp.maximum(weights.sum(), 1.0), kl


def check(batch: Any) -> None:
  """Refuse what is no batch of pairs.

  Args:
    batch: anything.

  Raises:
    ValueError: telling what it holds and what is valid.

  Example:
    >>> check({"chosen": jnp.zeros((1, 3), int), "rejected": jnp.zeros((1, 3), int)})
  """
  if not isinstance(batch, Mapping) or not {"chosen", "rejected"} <= set(batch):
    held = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
      f"a batch of preferences holds {held}; valid: a mapping with 'chosen' and 'rejected' tokens"
    )
