# SPDX-License-Identifier: Apache-2.0
"""What feeds a layer's kernels, and where scales of its channels can be folded without a trace.

Kernels that read x give the same outputs from x / s once their rows are multiplied by s. Whether
x can be divided beforehand depends on what makes it:

* the gain (and bias) of a norm that nothing but these kernels reads: before attention and before
  the feed-forward block, with pre-norm and sandwich layers; one norm for both where it is shared.
  Where the stream itself is read (OLMo2, BERT) there is none, nor before a mixture of experts: the
  router reads there too, and each expert has tokens of its own.
* the columns of v, for attention is linear in its values; query heads that share a value head then
  share its scales.
* the columns of up, where what lies between up and down is linear in it (gated) or lets positive
  factors through (relu).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon import models

Leaves = Mapping[str, Any]


class Feed(NamedTuple):
  """Some kernels of one layer and what makes their input. Names lack the "layers/<i>/".

  Attributes:
    reads: kernels whose rows are the channels.
    writes: leaves whose last axis is divided by the scale: a norm's, or a linear layer's.
    norm: whether the leaves written are a norm's.
    heads: value heads, each read `groups` times in a row; 1 where channels are not shared.
    groups: how often a head is read.
  """

  reads: tuple[str, ...]
  writes: tuple[str, ...]
  norm: bool
  heads: int = 1
  groups: int = 1


def of_layer(spec: Any, layer: int) -> tuple[Feed, ...]:
  """List a layer's feeds whose channels can be scaled.

  Args:
    spec: the architecture; of image classifiers only transformers have any.
    layer: which layer.

  Returns:
    At most one feed a tap: into q, k, v; into o; into gate, up; into down, or each expert's.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> [feed.writes for feed in of_layer(spec, 0)]
    [('attn_norm/scale',), ('attn/v/kernel',), ('mlp_norm/scale',), ('mlp/up/kernel',)]
  """
  if isinstance(spec, models.VisionSpec):
    if spec.kind != "vit":
      return ()
    spec = spec.transformer()
  into_attn = ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel")
  into_mlp = ("mlp/gate/kernel", "mlp/up/kernel") if spec.gated else ("mlp/up/kernel",)
  found = []

  def norm(name: str) -> tuple[str, ...]:
    biased = spec.norm == "layer" and spec.norm_bias
    return (f"{name}/scale", f"{name}/bias") if biased else (f"{name}/scale",)

  def linear(name: str, bias: bool) -> tuple[str, ...]:
    return (f"{name}/kernel", f"{name}/bias") if bias else (f"{name}/kernel",)

  before = spec.norm_place in ("pre", "sandwich")
  if before and not (spec.shared_norm and spec.num_experts):
    both = into_attn + into_mlp if spec.shared_norm else into_attn
    found.append(Feed(both, norm("attn_norm"), True))
  heads, kv = (spec.per_layer(n)[layer] for n in ("num_heads", "num_kv_heads"))
  found.append(
    Feed(("attn/o/kernel",), linear("attn/v", spec.qkv_bias), False, heads=kv, groups=heads // kv)
  )
  if before and not spec.shared_norm and not spec.num_experts:
    found.append(Feed(into_mlp, norm("mlp_norm"), True))
  if spec.gated or spec.activation == "relu":
    for at in spec.feed_forwards():
      found.append(Feed((f"{at}/down/kernel",), linear(f"{at}/up", spec.mlp_bias), False))
  return tuple(found)


def pool(
  feed: Feed, x: Float[Array, " inputs"], how: Callable[..., jax.Array] = jnp.max
) -> Float[Array, " channels"]:
  """Reduce a statistic of the kernels' inputs to one value a channel that can be scaled.

  Args:
    feed: the feed.
    x: one value an input.
    how: reduction over the inputs that share a channel.

  Returns:
    One value a channel.

  Example:
    >>> pool(Feed((), (), False, heads=1, groups=2), jnp.array([1.0, 2.0, 5.0, 0.0])).tolist()
    [5.0, 2.0]
  """
  return how(x.reshape(feed.heads, feed.groups, -1), axis=1).reshape(-1)


def spread(feed: Feed, s: Float[Array, " channels"]) -> Float[Array, " inputs"]:
  """Repeat the channels' scales to one an input.

  Args:
    feed: the feed.
    s: one scale a channel.

  Returns:
    One scale an input.

  Example:
    >>> spread(Feed((), (), False, heads=1, groups=2), jnp.array([5.0, 2.0])).tolist()
    [5.0, 2.0, 5.0, 2.0]
  """
  wide = jnp.repeat(s.reshape(feed.heads, 1, -1), feed.groups, axis=1)
  return wide.reshape(-1)


def fold(
  feed: Feed, leaves: Leaves, s: Float[Array, " channels"], *, plus_one: bool = False
) -> dict[str, jax.Array]:
  """Multiply the rows of the kernels that read by s and divide what writes.

  Args:
    feed: the feed.
    leaves: at least the leaves the feed names, dense.
    s: scales, positive.
    plus_one: whether the norm multiplies by 1 + its gain (`Spec.norm_plus_one`).

  Returns:
    The changed leaves, computed in float32, in their dtypes.

  Example:
    >>> feed = Feed(("up",), ("norm",), True)
    >>> out = fold(feed, {"up": jnp.ones((2, 1)), "norm": jnp.ones(2)}, jnp.array([2.0, 4.0]))
    >>> out["up"].ravel().tolist(), out["norm"].tolist()
    ([2.0, 4.0], [0.5, 0.25])
  """
  changed = {}
  s = s.astype(jnp.float32)
  for name in feed.writes:
    x = leaves[name].astype(jnp.float32)
    one = 1.0 if plus_one and feed.norm and name.endswith("scale") else 0.0
    down = 1 / s.reshape((1,) * (x.ndim - 1) + (-1,))
    changed[name] = x * down + one * (down - 1)  # where s is 1 nothing changes
  wide = spread(feed, s)
  for name in feed.reads:
    changed[name] = changed.get(name, leaves[name].astype(jnp.float32)) * wide[:, None]
  return {name: x.astype(leaves[name].dtype) for name, x in changed.items()}


def layers_of(addresses: Sequence[str]) -> list[int]:
  """List the layers that addresses lie in.

  Args:
    addresses: of leaves inside layers.

  Returns:
    Layer indices, ascending.

  Example:
    >>> layers_of(["layers/3/attn/q/kernel", "layers/1/mlp/up/kernel", "layers/3/mlp/up/kernel"])
    [1, 3]
  """
  return sorted({int(a.split("/")[1]) for a in addresses})


def selected(feed: Feed, at: str, pattern: str) -> bool:
  """Tell whether a feed's kernels are selected, and refuse a selection of some of them.

  Args:
    feed: the feed.
    at: prefix of its layer's addresses.
    pattern: regular expression over addresses.

  Returns:
    Whether all are.

  Raises:
    ValueError: if some are and some are not.

  Example:
    >>> selected(Feed(("mlp/up/kernel",), (), True), "layers/0/", ".*/up/kernel")
    True
  """
  hits = [bool(re.fullmatch(pattern, at + n)) for n in feed.reads]
  if any(hits) and not all(hits):
    raise ValueError(
      f"the selection tears a feed apart; these take one scale: "
      f"{', '.join(at + n for n in feed.reads)}"
    )
  return all(hits)
