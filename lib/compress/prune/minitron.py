# SPDX-License-Identifier: Apache-2.0
"""Minitron: cut depth, width, heads and neurons to a given shape by what activations say.

Muralidharan et al., "Compact language models via pruning and knowledge distillation" (arXiv
2407.14679). Importances come from forward passes alone, over 1024 samples in the paper: of a neuron
its activation, of a head the norm of its output, of a channel what the norms put out; each is taken
in the L2 norm over a sequence and in the mean over sequences (the paper's best aggregation), of a
channel also summed over the norms. Of a layer it is the loss without it, or its Block Influence.
What stays keeps its order; every layer keeps as many units as every other. Then distil:
`compress.distill.logits`.

With grouped queries, groups go by the sum of their heads' importances, then heads within each, as
in NVIDIA's Megatron code. Not here: adding what pruned heads held to those that stay, and the
search over shapes. Neutral without any target.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.compress.prune import layer_drop, shortgpt
from treesurgeon.compress.prune import shrink as shrinking
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs, paths, programs, step, tuning
from treesurgeon.grow import take_layers

DEPTH = ("loss", "influence")
_CHANNELS = ("attn/in", "mlp/in", "lm_head/in")


def importance(x: Float[Array, "batch seq *unit"], weights: Float[Array, "batch seq"]) -> Array:
  """Aggregate activations: L2 over a sequence (and a unit's entries), summed over the batch.

  Args:
    x: activations; axes after the third belong to one unit.
    weights: 1 where a token counts.

  Returns:
    One number a unit, float32.

  Example:
    >>> importance(jnp.array([[[3.0], [4.0]], [[1.0], [0.0]]]), jnp.ones((2, 2))).tolist()
    [6.0]
  """
  squares = jnp.square(x.astype(jnp.float32)).sum(axis=tuple(range(3, x.ndim)))
  return jnp.sqrt((squares * weights[:, :, None]).sum(axis=1)).sum(axis=0)


def importances(m: model_lib.Model, batches: Iterable[Any]) -> dict[str, Any]:
  """Measure the importance of all neurons, heads and channels in one pass.

  Args:
    m: the model.
    batches: token batches (`models.losses`); padding, as a "mask" says, does not count.

  Returns:
    {"neurons": one array a layer, "heads": one array a layer, "channels": one array}; float32,
    zeros without a batch.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> importances(m, [])["neurons"][1].shape
    (8,)
  """
  s = m.spec
  total = {
    "neurons": tuple(jnp.zeros(n) for n in s.per_layer("d_ff")),
    "heads": tuple(jnp.zeros(n) for n in s.per_layer("num_heads")),
    "channels": jnp.zeros(s.d_model),
  }
  count = 0
  for batch in batches:
    x = models.inputs(batch)
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    weights = jnp.ones(x.shape, jnp.float32) if mask is None else jnp.asarray(mask) != 0
    given = {"x": x, "weights": weights.astype(jnp.float32)}
    seen = programs.compiled(_look, (("spec", s),))(m.params, given)
    total = jax.tree.map(jnp.add, total, seen)
    count += len(x)
  return jax.tree.map(lambda t: t / max(count, 1), total)


def losses_without(m: model_lib.Model, batches: Iterable[Any]) -> Float[Array, " layers"]:
  """Measure the loss of the model without each of its layers.

  Args:
    m: the model.
    batches: token batches.

  Returns:
    Mean natural-log losses; zeros without a batch.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> losses_without(m, []).shape
    (2,)
  """
  batches, out = list(batches), []
  for i in range(count := paths.num_layers(m.params)):
    rest = take_layers.reassemble(m, layer_drop.kept(count, [i]))
    loss = programs.compiled(_loss, (("spec", rest.spec),))
    each = [loss(rest.params, {"batch": b}) for b in batches]
    out.append(sum(each, jnp.float32(0)) / max(len(each), 1))
  return jnp.stack(out)


def chosen_heads(
  scores: Float[Array, " heads"], *, heads: int, kv_heads: int, groups: int
) -> tuple[Array, Array]:
  """Choose groups of heads, then heads within each.

  Args:
    scores: one a query head.
    heads: query heads that stay, a multiple of `kv_heads`.
    kv_heads: key/value heads that stay.
    groups: key/value heads that there are.

  Returns:
    (query heads, group by group; key/value heads).

  Example:
    >>> q, kv = chosen_heads(jnp.array([9.0, 0.0, 3.0, 4.0]), heads=1, kv_heads=1, groups=2)
    >>> q.tolist(), kv.tolist()
    ([0], [0])
  """
  by_group = scores.reshape(groups, -1)
  kept = shrinking.top(by_group.sum(axis=1), kv_heads)
  inside = jax.vmap(lambda s: shrinking.top(s, heads // kv_heads))(by_group[kept])
  return (kept[:, None] * by_group.shape[1] + inside).reshape(-1), kept


@step.method("compress.prune.minitron")
def minitron(
  *,
  layers: int | None = None,
  d_model: int | None = None,
  d_ff: int | None = None,
  heads: int | None = None,
  kv_heads: int | None = None,
  depth_by: str = "loss",
) -> step.Step:
  """Cut a model to a shape by the importance of layers, channels, neurons and heads.

  Args:
    layers: layers that stay; None keeps all, as for every target.
    d_model: channels of the residual stream that stay.
    d_ff: neurons that stay of every layer.
    heads: query heads that stay of every layer.
    kv_heads: key/value heads that stay; None keeps all, or as many as heads where these have each
      their own.
    depth_by: "loss", of the model without the layer, or "influence", the Block Influence.

  Returns:
    A transform of whole models; it rewrites the architecture too.

  Raises:
    ValueError: for an unknown measure; when applied, for a target that is more than there is.

  Example:
    >>> minitron(d_ff=256, heads=4)
    (compress.prune.minitron(d_ff=256, heads=4),)

  Reference:
    Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, 2024,
    arXiv:2407.14679.
  """
  if depth_by not in DEPTH:
    raise ValueError(f"depth_by={depth_by!r}; valid: {', '.join(DEPTH)}")
  targets = {"layers": layers, "d_model": d_model, "d_ff": d_ff, "heads": heads}
  targets = {n: t for n, t in {**targets, "kv_heads": kv_heads}.items() if t is not None}
  low = [n for n, t in targets.items() if t < 1]
  if low:
    raise ValueError(f"{low[0]}={targets[low[0]]} must be at least 1")

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    if not targets:
      return m
    shrinking.check(m)
    _check(m.spec, targets)
    batches = list(evidence["batches"])
    if layers is not None and layers < m.spec.num_layers:
      measure = losses_without if depth_by == "loss" else shortgpt.influences
      scores = measure(m, batches)
      gone = shortgpt.least(scores, m.spec.num_layers - layers)
      m = take_layers.reassemble(m, layer_drop.kept(m.spec.num_layers, gone))
      if not isinstance(scores, jax.core.Tracer):
        m = tuning.noted(m, shortgpt.told(scores, gone))
    return shrinking.shrink(m, _units(m.spec, targets, importances(m, batches)))

  return tuning.over_model(apply, {"batches": needs.Batches()})


def _units(spec: models.Spec, targets: Mapping[str, int], found: Any) -> shrinking.Units:
  channels = neurons = q = kv = None
  if "d_model" in targets:
    channels = shrinking.top(found["channels"], targets["d_model"])
  if "d_ff" in targets:
    neurons = [shrinking.top(x, targets["d_ff"]) for x in found["neurons"]]
  if "heads" in targets or "kv_heads" in targets:
    pairs = []
    for i, scores in enumerate(found["heads"]):
      count, groups = spec.per_layer("num_heads")[i], spec.per_layer("num_kv_heads")[i]
      keep, keep_kv = _head_counts(targets, count, groups)
      pairs.append(chosen_heads(scores, heads=keep, kv_heads=keep_kv, groups=groups))
    q, kv = zip(*pairs, strict=True)
  return shrinking.Units(channels, neurons, q, kv)


def _head_counts(targets: Mapping[str, int], count: int, groups: int) -> tuple[int, int]:
  keep = targets.get("heads")
  keep_kv = targets.get("kv_heads", keep if keep and groups == count else groups)
  return keep or keep_kv * (count // groups), keep_kv


def _check(spec: models.Spec, targets: Mapping[str, int]) -> None:
  have = {
    "layers": (spec.num_layers,),
    "d_model": (spec.d_model,),
    "d_ff": spec.per_layer("d_ff"),
    "heads": spec.per_layer("num_heads"),
    "kv_heads": spec.per_layer("num_kv_heads"),
  }
  for name, target in targets.items():
    if target > min(have[name]):
      raise ValueError(f"{name}={target} cannot stay; there are {min(have[name])}")
  for count, groups in zip(have["heads"], have["kv_heads"], strict=True):
    keep, keep_kv = _head_counts(targets, count, groups)
    if keep % keep_kv or keep // keep_kv > count // groups:
      raise ValueError(
        f"heads={keep} and kv_heads={keep_kv}: every key/value head serves equally many heads, up "
        f"to {count // groups}"
      )
  if "d_model" in targets and spec.shortcuts:
    raise ValueError("d_model: a stream with shortcut matrices has a basis in every block")
  if "d_model" in targets and spec.kind != "decoder":
    raise ValueError("d_model: the channels of an encoder's heads cannot be cut; valid: a decoder")


def _look(params: Any, x: jax.Array, weights: jax.Array, *, spec: models.Spec) -> dict[str, Any]:
  def observe(name: str, value: jax.Array) -> jax.Array | None:
    if name == "attn/o/in":
      value = value.reshape(*value.shape[:2], -1, spec.head_dim)
    elif name != "mlp/down/in" and name not in _CHANNELS:
      return None
    return importance(value, weights)

  seen = models.forward(spec, params, x, observe=observe).observed
  layers = range(spec.num_layers)
  channels = seen["lm_head/in"] if "lm_head/in" in seen else jnp.zeros(spec.d_model)
  for name in ("attn/in", "mlp/in"):
    channels = channels + sum(seen[name][i] for i in layers)
  return {
    "neurons": tuple(seen["mlp/down/in"][i] for i in layers),
    "heads": tuple(seen["attn/o/in"][i] for i in layers),
    "channels": channels,
  }


def _loss(params: Any, batch: Any, *, spec: models.Spec) -> jax.Array:
  return models.nll(spec, params, batch)
