# SPDX-License-Identifier: Apache-2.0
"""Round the cache of a small language model in several layouts, and test what is claimed of KIVI.

python -P -m treesurgeon.experiments.cache_directions --config=configs/cache.py --workdir=DIR
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon import models
from treesurgeon.experiments import launch, small_decoder
from treesurgeon.kernels.attention_lowbit import cache as caches

LAYOUTS = {  # whether groups of keys, and of values, are per channel
  "kivi": (True, False),
  "all per token": (False, False),
  "all per channel": (True, True),
}


def measure(config: Mapping[str, Any], seed: int) -> small_decoder.Numbers:
  """Train a model and score the second half of texts over a rounded cache of the first.

  Args:
    config: see `configs/cache.py`.
    seed: of everything random.

  Returns:
    For each network, layout and width, the loss in nats a byte and the error of the logits; for
    "cache" the same of the library's own cache.
  """
  trained = small_decoder.train(config, seed)
  spec = trained.model.spec
  tokens = jnp.concatenate([jnp.asarray(rows["tokens"]) for rows in trained.tests])
  sizes = {"group_size": config["group_size"], "residual": config["residual"]}
  half = config["length"] // 2
  score = jax.jit(functools.partial(_score, spec))
  prompt, rest = tokens[:, :half], tokens[:, half:]
  batch, length = tokens.shape
  extend = jax.jit(functools.partial(models.extend, spec))
  out: small_decoder.Numbers = {}
  for network, gain in (("", 1.0), (", outliers", config["gain"])):
    params = widened(trained.model.params, spec.head_dim, gain)
    _, whole = extend(params, prompt, models.init_cache(spec, params, batch, length), 0)
    exact, loss = score(params, rest, whole, half)
    out[f"dense{network}"] = {"loss": float(loss), "logits": 0.0}
    for bits in config["bits"]:
      made = {
        name: rounded(whole, half, layout, bits=bits, **sizes) for name, layout in LAYOUTS.items()
      }
      empty = models.init_cache(spec, params, batch, length, bits=bits, **sizes)
      made["cache"] = extend(params, prompt, empty, 0)[1]
      for name, cache in made.items():
        logits, loss = score(params, rest, cache, half)
        error = jnp.sqrt(jnp.mean((logits - exact) ** 2))
        out[f"{name}{network} at {bits} bits"] = {"loss": float(loss), "logits": float(error)}
        print(f"seed {seed}: {name}{network} at {bits} bits: {loss:.4f}, {error:.4f}", flush=True)
  return out


def widened(params: Mapping[str, Any], channels: int, gain: float) -> dict[str, Any]:
  """Make two channels of each head's keys large and those of its queries small.

  They are a pair that rotates together, so every score stays what it was.

  Args:
    params: of a decoder whose positions are rotary.
    channels: width of a head.
    gain: how many times as large.

  Returns:
    The parameters.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=8, num_layers=1, num_heads=1, d_ff=8)
    >>> new = widened(models.init(spec, jax.random.key(0)), 8, 4.0)
    >>> new["layers"]["0:1"]["attn"]["k"]["kernel"].shape
    (1, 8, 8)
  """
  one = jnp.ones(channels).at[jnp.array([channels // 4, channels // 4 + channels // 2])].set(gain)

  def scale(path: Any, x: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if "/attn/k/" not in name and "/attn/q/" not in name:
      return x
    factor = jnp.tile(one, x.shape[-1] // channels)
    return x * jnp.broadcast_to(factor if "/attn/k/" in name else 1 / factor, x.shape)

  return jax.tree_util.tree_map_with_path(scale, dict(params))


def rounded(
  cache: Mapping[str, Any],
  held: int,
  layout: tuple[bool, bool],
  *,
  bits: int,
  group_size: int,
  residual: int,
) -> dict[str, Any]:
  """Round a full-precision cache in a layout, the last tokens left out.

  Args:
    cache: {segment: {"k", "v"}}, each [layers, batch, length, heads, channels].
    held: how many tokens it holds.
    layout: whether keys, and whether values, are grouped per channel.
    bits, group_size, residual: as of a `QuantizedCache`.

  Returns:
    The cache, the rounded tokens replaced by their codes' values. Groups over tokens are rounded
    `residual` tokens at a time, others one by one, as KIVI does.

  Example:
    >>> cache = {"0:1": {"k": jnp.ones((1, 1, 4, 1, 8)), "v": jnp.ones((1, 1, 4, 1, 8))}}
    >>> new = rounded(cache, 4, (True, False), bits=2, group_size=4, residual=4)
    >>> new["0:1"]["k"].shape
    (1, 1, 4, 1, 8)
  """

  def one(x: jax.Array, channelwise: bool) -> jax.Array:
    count = held // residual * residual if channelwise else max(held - residual, 0)
    y = jnp.swapaxes(x[:, :, :count], 2, 3)  # [layers, batch, heads, tokens, channels]
    size = group_size if channelwise else min(group_size, y.shape[-1])
    round_to: Callable[..., Any] = caches.rounded_keys if channelwise else caches.rounded_values
    codes, scales, mins = round_to(y, bits=bits, group_size=size)
    spread = functools.partial(jnp.repeat, repeats=size, axis=-2 if channelwise else -1)
    y = codes * spread(scales) + spread(mins)
    return x.at[:, :, :count].set(jnp.swapaxes(y, 2, 3))

  return {
    name: {"k": one(part["k"], layout[0]), "v": one(part["v"], layout[1])}
    for name, part in cache.items()
  }


def _score(spec: Any, params: Any, tokens: jax.Array, cache: Any, start: Any) -> Any:
  logits, _ = models.extend(spec, params, tokens[:, :-1], cache, start)
  chosen = jax.nn.log_softmax(logits, axis=-1)
  picked = jnp.take_along_axis(chosen, tokens[:, 1:, None].astype(jnp.int32), axis=-1)
  return logits, -picked.mean()


if __name__ == "__main__":
  launch.run(functools.partial(small_decoder.study, measure))
