# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules from plain settings, by optax.

`build` returns the direction of a step and the schedule apart. The loop multiplies them by its own
clock, hence moments carried over from another run (after growth, for instance) do not bring
that run's schedule with them. Weight decay is decoupled [1] and leaves norms and biases alone.

[1] Loshchilov and Hutter, Decoupled weight decay regularization, arXiv:1711.05101.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[Any], jax.Array]


class Optimizer(NamedTuple):
  """A direction and how far to go.

  Attributes:
    direction: optax transformation of gradients, without learning rate.
    schedule: step, from 0, to learning rate.
  """

  direction: optax.GradientTransformation
  schedule: Schedule


def build(
  *,
  name: str = "adamw",
  lr: float = 1e-3,
  schedule: str = "cosine",
  steps: int = 1000,
  warmup: int = 0,
  final: float = 0.1,
  cooldown: float = 0.2,
  weight_decay: float = 0.1,
  decay_embeddings: bool = False,
  clip: float | None = 1.0,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
) -> Optimizer:
  """Build an optimizer from settings.

  Args:
    name: a name from `DIRECTIONS`.
    lr: peak learning rate.
    schedule: a name from `SCHEDULES`.
    steps: length of the schedule.
    warmup: steps of linear warm-up from 0, part of `steps`.
    final: learning rate at the end, relative to `lr`.
    cooldown: share of `steps` over which "wsd" decays.
    weight_decay: decoupled, multiplied by the learning rate.
    decay_embeddings: whether embeddings decay too.
    clip: greatest global norm of the gradients; None does not clip.
    b1, b2, eps: of the method; `b1` is the momentum of "sgd".

  Returns:
    The direction and the schedule.

  Raises:
    ValueError: for an unknown name (the nearest is suggested) or a number out of range.

  Example:
    >>> optimizer = build(lr=0.1, schedule="constant", warmup=2)
    >>> [round(float(optimizer.schedule(i)), 3) for i in range(4)]
    [0.05, 0.1, 0.1, 0.1]
  """
  make = DIRECTIONS.get(name) or _unknown("optimizer", name, DIRECTIONS)
  plan = SCHEDULES.get(schedule) or _unknown("schedule", schedule, SCHEDULES)
  for what, value, low, high in (
    ("lr", lr, 0.0, float("inf")),
    ("final", final, 0.0, 1.0),
    ("cooldown", cooldown, 0.0, 1.0),
    ("weight_decay", weight_decay, 0.0, float("inf")),
    ("b1", b1, 0.0, 1.0),
    ("b2", b2, 0.0, 1.0),
    ("warmup", warmup, 0, steps),
    ("clip", 1.0 if clip is None else clip, 0.0, float("inf")),
  ):
    if not low <= value <= high:
      raise ValueError(f"{what}={value} must lie between {low} and {high}")
  parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
  parts.append(make(b1, b2, eps))
  if weight_decay:
    parts.append(
      optax.add_decayed_weights(weight_decay, mask=lambda p: decays(p, embeddings=decay_embeddings))
    )

  def learning_rate(step: Any) -> jax.Array:
    # Warm-up counts from 1: a first step of length zero would be wasted.
    t = jnp.asarray(step, jnp.float32)
    ramp = jnp.minimum(1.0, (t + 1) / warmup) if warmup else 1.0
    return lr * ramp * plan(jnp.maximum(t - warmup, 0.0), max(steps - warmup, 1), final, cooldown)

  return Optimizer(optax.chain(*parts), learning_rate)


def decays(params: Any, *, embeddings: bool = False) -> Any:
  """Mark what weight decay applies to: matrices, whole or in factors, but no norm and no bias.

  Args:
    params: nested parameters; None stands for a frozen array.
    embeddings: whether embeddings count.

  Returns:
    A tree of booleans.

  Example:
    >>> decays({"up": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}})
    {'up': {'bias': False, 'kernel': True}}
  """

  def one(path: Any, _: Any) -> bool:
    names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    return names[-1] == "kernel" or (embeddings and names[-1] == "embedding")

  return jax.tree_util.tree_map_with_path(one, params)


def moments(state: Any, like: Any) -> bool:
  """Tell whether an optimizer state fits another: same structure, shapes and dtypes.

  Args:
    state: the state at hand.
    like: the state, or its shapes, that is wanted.

  Returns:
    True if one can stand for the other.

  Example:
    >>> moments({"mu": jnp.ones(2)}, {"mu": jnp.ones(3)})
    False
  """
  if jax.tree.structure(state) != jax.tree.structure(like):
    return False
  pairs = zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True)
  return all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)


def _constant(t: jax.Array, steps: int, final: float, cooldown: float) -> jax.Array:
  del steps, final, cooldown
  return jnp.ones_like(t)


def _cosine(t: jax.Array, steps: int, final: float, cooldown: float) -> jax.Array:
  """Half a cosine (Loshchilov and Hutter, arXiv:1608.03983, without restarts)."""
  del cooldown
  return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(t / steps, 1.0)))


def _linear(t: jax.Array, steps: int, final: float, cooldown: float) -> jax.Array:
  del cooldown
  return 1 - (1 - final) * jnp.minimum(t / steps, 1.0)


def _wsd(t: jax.Array, steps: int, final: float, cooldown: float) -> jax.Array:
  """Warm up, stay, decay linearly (Hu et al., MiniCPM, arXiv:2404.06395)."""
  length = max(cooldown * steps, 1.0)
  return 1 - (1 - final) * jnp.clip((t - (steps - length)) / length, 0.0, 1.0)


def _unknown(what: str, name: str, table: Mapping[str, Any]) -> Any:
  near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.4)
  hint = f"did you mean {near[0]!r}? " if near else ""
  raise ValueError(f"unknown {what} {name!r}; {hint}valid: {', '.join(sorted(table))}")


DIRECTIONS: Mapping[str, Callable[[float, float, float], optax.GradientTransformation]] = {
  "adamw": lambda b1, b2, eps: optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
  "lion": lambda b1, b2, eps: optax.scale_by_lion(b1=b1, b2=b2),
  "sgd": lambda b1, b2, eps: optax.trace(decay=b1) if b1 else optax.identity(),
}
SCHEDULES: Mapping[str, Callable[[jax.Array, int, float, float], jax.Array]] = {
  "constant": _constant,
  "cosine": _cosine,
  "linear": _linear,
  "wsd": _wsd,
}
