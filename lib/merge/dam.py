# SPDX-License-Identifier: Apache-2.0
"""DAM, defense-aware merging: AdaMerging inside a subspace that carries no backdoor.

Yang et al., "Mitigating the backdoor effect for multi-task model merging via safety-aware
subspace", 2024 (arXiv 2410.13910), on concrete masks (Tang et al., 2023, arXiv 2312.06173). All
task vectors are multiplied by one mask, θ₀ + Σ λ_i m ⊙ τ_i, learned from unlabelled data: m is
sampled as σ((x + logit u) / T) with u uniform and divided by its mean in each tensor. A step (1)
takes λ from its start one step down the entropy, (2) moves a noise that is added to a task's
inputs, one pattern a task, towards changing the predictions, as a trigger would, and (3) moves the
mask towards low entropy H(x) and low risk under the noise, H(x) + w R(x + δ). Then λ is learned by
AdaMerging with the mask fixed.

`masks=2`, the default, is our reading of the paper's text: m is the product of a task-shared mask,
which follows H alone, and a backdoor-detection mask, which follows both, moved in turn. `masks=1`
is the authors' code (FusionBench), which learns one mask from the sum. `penalty` is R: "entropy",
the code's choice, or "consistency", the cross entropy to the predictions without noise.
Differences from the code: the inner step on λ is plain gradient descent, where Adam with a step of
1 leaves every sensible range; the three parts of a step share their batches; the final mask is the
one without chance, σ(x / T). Images are clipped to their range after the noise; for tokens the
noise goes onto the embeddings. Masks are learned in float32, the merge returns in the base's
storage dtype. mask_steps=0 is `merge.adamerging`. Neutral at init=0, mask_steps=0, steps=0.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon import models as networks
from treesurgeon.core import descend, needs, step, tuning
from treesurgeon.core import model as model_lib
from treesurgeon.merge import adamerging, mixed_models, mixture

PENALTIES = ("entropy", "consistency")


class Numbers(NamedTuple):
  """Hold a step's numbers, data to its program.

  Attributes:
    temperature: T of the masks.
    inner: step of λ.
    strength: w of the penalty.
  """

  temperature: jax.Array
  inner: jax.Array
  strength: jax.Array


class State(NamedTuple):
  """Hold what a step changes.

  Attributes:
    logits: x of every mask, by stored name.
    noise: of every task, along the first axis.
    moments: Adam's, of every mask and of the noise.
  """

  logits: tuple[mixture.Flat, ...]
  noise: jax.Array
  moments: tuple[Any, ...]


def concrete(
  logits: Float[Array, "*shape"], u: Float[Array, "*shape"], *, temperature: ArrayLike
) -> Float[Array, "*shape"]:
  """Sample a relaxed Bernoulli mask.

  Args:
    logits: of the mask's probability.
    u: uniform between 0 and 1; a half gives the mask without chance.
    temperature: T; near 0 the mask is 0 or 1.

  Returns:
    The mask, between 0 and 1.

  Example:
    >>> mask = concrete(jnp.zeros(2), jnp.array([0.5, 0.8]), temperature=0.5)
    >>> [round(float(x), 3) for x in mask]
    [0.5, 0.941]
  """
  return jax.nn.sigmoid((logits + jnp.log(u) - jnp.log1p(-u)) / temperature)


def rescaled(mask: Float[Array, "*shape"], *, stacked: bool) -> Float[Array, "*shape"]:
  """Divide a mask by its mean, that of each layer if layers are stacked along the first axis.

  Args:
    mask: the mask.
    stacked: whether its first axis is the layers'.

  Returns:
    A mask of mean one.

  Example:
    >>> rescaled(jnp.array([[1.0, 3.0], [1.0, 1.0]]), stacked=True).tolist()
    [[0.5, 1.5], [1.0, 1.0]]
  """
  axes = tuple(range(1 if stacked else 0, mask.ndim))
  return mask / mask.mean(axis=axes, keepdims=True)


@step.method("merge.dam")
def dam(
  *,
  models: Sequence[str] = (),
  granularity: str = "tensor",
  init: float | Sequence[float] = 0.3,
  masks: int = 2,
  mask_steps: int = 1000,
  mask_rate: float = 1e-3,
  noise_rate: float = 1e-4,
  inner: float = 1.0,
  penalty: str = "entropy",
  strength: float = 0.1,
  temperature: float = 0.5,
  clip: Sequence[float] | None = (0.0, 1.0),
  steps: int = 1000,
  rate: float = 1e-3,
  select: str | None = None,
) -> step.Step:
  """Add task vectors under a mask that unlabelled data finds useful and safe.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    granularity: "task", "layer" or "tensor": what has a coefficient of its own.
    init: coefficients to begin from, one number or one a donor.
    masks: 2 for a task-shared and a backdoor-detection mask in turn; 1 for one that does both.
    mask_steps: updates of the masks; 0 is AdaMerging.
    mask_rate: Adam's step on the masks' logits.
    noise_rate: Adam's step on the noise.
    inner: step of the coefficients before the masks look at them.
    penalty: "entropy" or "consistency": what the noise must not raise.
    strength: weight of the penalty.
    temperature: of the masks.
    clip: range of the images; None does not clip.
    steps: updates of the coefficients at last.
    rate: Adam's step on them.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform. `evaluate.backdoor.attack_success_rate` tells what it was worth.

  Raises:
    ValueError: for an argument out of range; when applied, if there is no data.

  Example:
    >>> dam(mask_steps=200, strength=1.0)
    (merge.dam(mask_steps=200, strength=1.0),)

  Reference:
    Yang et al., Mitigating the backdoor effect for multi-task model merging via safety-aware
    subspace, 2024, arXiv 2410.13910.
  """
  adamerging.check(granularity=granularity, steps=steps, rate=rate)
  tuning.check(mask_steps=mask_steps, inner=inner, strength=strength)
  for name, value in (
    ("mask_rate", mask_rate), ("noise_rate", noise_rate), ("temperature", temperature)
  ):  # fmt: skip
    if value <= 0:
      raise ValueError(f"{name}={value} must be above 0")
  if masks not in (1, 2) or penalty not in PENALTIES:
    raise ValueError(f"masks={masks}, penalty={penalty!r}; valid: 1, 2; {', '.join(PENALTIES)}")
  pattern = select or ".*"
  bounds = None if clip is None else (float(clip[0]), float(clip[1]))

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    plan, parts = mixed_models.gather(m, evidence["donors"], pattern, granularity=granularity)
    found, losses = mixture.start(plan, len(parts.donors), init), np.zeros(0)
    batches = mixed_models.abreast(evidence["batches"])
    learns = bool(steps or mask_steps) and tuning.learnable(m, batches)
    if mask_steps and learns:
      settings = (plan, penalty, bounds, mask_rate, noise_rate)
      numbers = Numbers(*map(jnp.float32, (temperature, inner, strength)))
      stacked = [_together(b) for b in batches]
      state = _begin(settings, parts, stacked[0], masks)
      for i in range(mask_steps):
        batch = stacked[i % len(stacked)]
        state = _step(settings, state, parts, found, batch, key, jnp.int32(i), numbers)
      parts = _restricted(parts, _sample(plan, state.logits, None, numbers.temperature))
    if steps and learns:
      found, losses = descend.minimize(
        adamerging.mean_entropy, found, batches, parts,
        optimizer=tuning.adam(rate), steps=steps, spec=plan,
      )  # fmt: skip
    return mixed_models.learned(m, plan, parts, found, losses)

  return adamerging.over_model(apply, models, pattern, needs.Batches(of="donors"))


def _together(batch: tuple[Any, ...]) -> Any:
  """Stack the tasks' batches, so that one program runs them all."""
  shapes = [str(jax.tree.map(np.shape, b)) for b in batch]
  if len(set(shapes)) > 1:
    raise ValueError(f"the tasks' batches must have one shape; these have {', '.join(shapes)}")
  return jax.tree.map(lambda *x: jnp.stack(x), *batch)


@functools.partial(jax.jit, static_argnums=(0, 3), keep_unused=True)
def _begin(settings: Any, parts: mixture.Parts, batch: Any, masks: int) -> State:
  """Start from even odds; compiled, so that the state lies where the parameters do."""
  plan, _, _, mask_rate, noise_rate = settings
  zeros = {n: jnp.zeros(w.shape, jnp.float32) for n, w in parts.base.items()}
  noise = jnp.zeros(_noise_shape(plan.spec, batch), jnp.float32)
  kept = [tuning.adam(mask_rate).init(zeros) for _ in range(masks)]
  return State((zeros,) * masks, noise, (*kept, tuning.adam(noise_rate).init(noise)))


@functools.partial(jax.jit, static_argnums=0)
def _step(
  settings: Any,
  state: State,
  parts: mixture.Parts,
  start: Any,
  batch: Any,
  key: jax.Array,
  i: jax.Array,
  numbers: Numbers,
) -> State:
  plan, penalty, bounds, mask_rate, noise_rate = settings
  chance = _chance(plan, state.logits, jax.random.fold_in(key, i))
  turn = i % len(state.logits)
  guards = turn == len(state.logits) - 1  # the last mask, be it the only one, minds the noise

  def inner_loss(coefficients: Any) -> jax.Array:
    masked = _restricted(parts, _sample(plan, state.logits, chance, numbers.temperature))
    params = mixture.network(plan, masked, coefficients)
    return jax.vmap(lambda b: networks.entropy(plan.spec, params, b))(batch).sum()

  slope = jax.grad(inner_loss)(start)
  coefficients = jax.tree.map(lambda c, g: c - numbers.inner * g, start, slope)

  def merged(logits: tuple[mixture.Flat, ...]) -> Any:
    masked = _restricted(parts, _sample(plan, logits, chance, numbers.temperature))
    return mixture.network(plan, masked, coefficients)

  params = merged(state.logits)

  def harmless(noise: jax.Array) -> jax.Array:
    risk = functools.partial(_risk, plan.spec, params, bounds=None, penalty="consistency")
    return -jax.vmap(risk)(batch, noise).sum()

  change, noise_moments = tuning.adam(noise_rate).update(
    jax.grad(harmless)(state.noise), state.moments[-1]
  )
  moved: Any = optax.apply_updates(state.noise, change)
  weight = jnp.where(guards, numbers.strength, 0.0)

  def mask_loss(logits: tuple[mixture.Flat, ...]) -> jax.Array:
    params = merged(logits)

    def one(b: Any, d: jax.Array) -> jax.Array:
      risk = _risk(plan.spec, params, b, d, bounds=bounds, penalty=penalty)
      return networks.entropy(plan.spec, params, b) + weight * risk

    return jax.vmap(one)(batch, moved).sum()

  slopes = jax.grad(mask_loss)(state.logits)
  logits, moments = [], []
  for j, (x, g, old) in enumerate(zip(state.logits, slopes, state.moments[:-1], strict=True)):
    change, new = tuning.adam(mask_rate).update(g, old)
    pick = functools.partial(jnp.where, turn == j)
    logits.append(jax.tree.map(pick, optax.apply_updates(x, change), x))
    moments.append(jax.tree.map(pick, new, old))
  return State(tuple(logits), moved, (*moments, noise_moments))


def _risk(
  spec: Any, params: Any, batch: Any, noise: jax.Array, *, bounds: Any, penalty: str
) -> jax.Array:
  """Compute what the noise does: the entropy under it, or how far predictions are from before."""
  noisy: Any = batch
  patch: Any = None
  if isinstance(batch, Mapping) and "inputs" in batch:
    x = networks.inputs(batch) + noise.astype(jnp.float32)[None]
    noisy = {**batch, "inputs": x if bounds is None else jnp.clip(x, *bounds)}
  else:

    def disturb(name: str, value: jax.Array, layer: jax.Array) -> jax.Array:
      del layer
      return value + noise.astype(value.dtype)[None] if name == "embed/out" else value

    patch = disturb
  if penalty == "entropy":
    return networks.entropy(spec, params, noisy, patch=patch)
  clean = jax.lax.stop_gradient(networks.predictions(spec, params, batch)[0]).argmax(axis=-1)
  logits, _, weights = networks.predictions(spec, params, noisy, patch=patch)
  each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), clean)
  return jnp.sum(each * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def _noise_shape(spec: Any, batch: Any) -> tuple[int, ...]:
  """Return (tasks, ...): an image's shape, or that of a text's embeddings."""
  x = batch["inputs"] if isinstance(batch, Mapping) and "inputs" in batch else None
  if x is not None:
    return (x.shape[0], *x.shape[2:])
  tokens = batch["tokens"] if isinstance(batch, Mapping) else batch
  return (tokens.shape[0], tokens.shape[2] - 1, spec.d_model)


def _sample(plan: mixture.Plan, logits: Any, chance: Any, temperature: jax.Array) -> mixture.Flat:
  """Put chance into every mask, or none, and multiply and rescale them."""
  out = {}
  for name, _ in plan.chosen:
    product = jnp.ones((), jnp.float32)
    for j, each in enumerate(logits):
      u = jnp.full_like(each[name], 0.5) if chance is None else chance[name][j]
      product = product * concrete(each[name], u, temperature=temperature)
    out[name] = rescaled(product, stacked=mixture.stacked(name))
  return out


def _chance(plan: mixture.Plan, logits: Any, key: jax.Array) -> mixture.Flat:
  """Draw all masks' chance at once, which compiles in a fraction of the time."""
  shapes = {n: logits[0][n].shape for n, _ in plan.chosen}
  ends = np.cumsum([math.prod(s) for s in shapes.values()])
  u = jax.random.uniform(key, (len(logits), int(ends[-1])), minval=1e-6, maxval=1 - 1e-6)
  parts = jnp.split(u, [int(e) for e in ends[:-1]], axis=1)
  return {n: x.reshape(-1, *s) for (n, s), x in zip(shapes.items(), parts, strict=True)}


def _restricted(parts: mixture.Parts, masks: mixture.Flat) -> mixture.Parts:
  """Mask the task vectors."""
  donors = []
  for donor in parts.donors:
    one = {}
    for name, w in parts.base.items():
      base = w.astype(jnp.float32)
      one[name] = base + masks[name] * (donor[name].astype(jnp.float32) - base)
    donors.append(one)
  return mixture.Parts(parts.base, tuple(donors), parts.rest)
