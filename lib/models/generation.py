# SPDX-License-Identifier: Apache-2.0
"""Autoregressive decoding with a key/value cache, compiled once for a shape.

The cache is a tree of the same segments as the parameters. Keys of windowed layers are kept in
full and masked: the memory of a ring buffer is given up for one code path.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from treesurgeon.core import paths
from treesurgeon.kernels.attention_lowbit import cache as caches
from treesurgeon.models import decoder, stack
from treesurgeon.models import spec as specs


def generate(
  spec: specs.Spec,
  params: Mapping[str, Any],
  prompt_tokens: Int[ArrayLike, "batch prompt"],
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  top_k: int = 0,
  key: jax.Array | None = None,
  eos_id: int | None = None,
  cache_bits: int | None = None,
  cache_group_size: int = 32,
  cache_residual: int = 128,
) -> Int[Array, "batch total"]:
  """Continue prompts of equal length.

  Args:
    spec: a decoder's architecture.
    params: parameters; leaves may be compressed.
    prompt_tokens: token ids, without padding.
    max_new_tokens: how many tokens to add.
    temperature: 0 picks the most likely token; otherwise logits are divided by it.
    top_k: with a temperature, sample among the k most likely tokens only; 0 is all.
    key: PRNG key, needed when the temperature is not 0.
    eos_id: a sequence that produced this token is filled with it; once all have, decoding stops.
    cache_bits: 2, 4 or 8 keeps all but the last keys and values in so many bits, as KIVI does
      (Liu et al., arXiv:2402.02750); None keeps them as they are.
    cache_group_size, cache_residual: of such a cache, see `init_cache`.

  Returns:
    Prompt and continuation, [batch, prompt + max_new_tokens].

  Raises:
    ValueError: for an encoder, an empty prompt, no tokens to add, a length beyond a learned
      position table, a temperature without a key, or a cache that `init_cache` refuses.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> models.generate(spec, params, jnp.array([[1, 2]]), max_new_tokens=3).shape
    (1, 5)
  """
  prompt = jnp.asarray(prompt_tokens, jnp.int32)
  total = prompt.shape[1] + max_new_tokens
  if spec.kind != "decoder":
    raise ValueError("generate needs a decoder; this spec is an encoder")
  if max_new_tokens < 1 or prompt.shape[1] < 1:
    raise ValueError(
      f"generate needs a prompt and max_new_tokens >= 1; got {prompt.shape[1]} prompt tokens and "
      f"max_new_tokens={max_new_tokens}"
    )
  if spec.positions == "learned" and total > spec.max_positions:
    raise ValueError(
      f"prompt and continuation are {total} tokens; max_positions is {spec.max_positions}"
    )
  if temperature < 0 or top_k < 0 or top_k > spec.vocab_size:
    raise ValueError(
      f"temperature must be >= 0 and top_k in [0, {spec.vocab_size}]; got {temperature}, {top_k}"
    )
  if temperature > 0 and key is None:
    raise ValueError(f"temperature={temperature} samples, which needs a key")
  key = jax.random.key(0) if key is None else key
  eos = -1 if eos_id is None else eos_id
  sizes = (cache_bits, cache_group_size, cache_residual)
  return _generate(
    spec, max_new_tokens, temperature > 0, top_k, sizes, params, prompt, temperature, key, eos
  )


def init_cache(
  spec: specs.Spec,
  params: Mapping[str, Any],
  batch: int,
  length: int,
  dtype: Any = None,
  *,
  bits: int | None = None,
  group_size: int = 32,
  residual: int = 128,
) -> dict[str, Any]:
  """Make an empty cache.

  Args:
    spec: the architecture.
    params: parameters, whose segments the cache copies.
    batch: number of sequences.
    length: most tokens it will hold.
    dtype: dtype of keys and values; None takes that of the embeddings.
    bits: 2, 4 or 8 quantizes them (`kernels/attention_lowbit/cache.py`): keys per channel in groups
      of tokens, values per token in groups of channels; None does not.
    group_size: of these groups.
    residual: how many of the last tokens stay as they are, a multiple of the group size.

  Returns:
    {segment: {"k", "v"}}, each [layers, batch, length, kv_heads, head_dim]; with bits, {segment:
    QuantizedCache}, its arrays stacked over layers.

  Raises:
    ValueError: for other bits, or sizes that do not divide.

  Example:
    >>> import jax
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=8, num_layers=3, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> models.init_cache(spec, params, 1, 256, bits=2)["0:3"].k_codes.shape
    (3, 1, 1, 1, 4, 128)
  """
  dtype = params["embed"]["tokens"]["embedding"].dtype if dtype is None else dtype
  heads = spec.per_layer("num_kv_heads")
  cache = {}
  for start, stop, _ in paths.segments(params):
    if bits is not None:
      one = caches.init(
        batch, heads[start], length, spec.head_dim, bits=bits, group_size=group_size,
        residual=residual, dtype=dtype,
      )  # fmt: skip
      stack_up = lambda x, n=stop - start: jnp.zeros((n, *x.shape), x.dtype)
      cache[f"{start}:{stop}"] = jax.tree.map(stack_up, one)
      continue
    shape = (stop - start, batch, length, heads[start], spec.head_dim)
    cache[f"{start}:{stop}"] = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
  return cache


def extend(
  spec: specs.Spec,
  params: Mapping[str, Any],
  tokens: Int[ArrayLike, "batch seq"],
  cache: Mapping[str, Any],
  start: int | jax.Array,
) -> tuple[Float[Array, "batch seq vocab"], dict[str, Any]]:
  """Run tokens that follow `start` tokens already in the cache.

  Args:
    spec: the architecture.
    params: parameters.
    tokens: the next token ids; any number, so this is prefill, decoding and verification alike.
    cache: from `init_cache` or an earlier call.
    start: how many tokens the cache holds; an int or traced.

  Returns:
    float32 logits of the given tokens, and the cache that holds them too.
  """
  h, extended = _hidden(spec, params, tokens, cache, start)
  return decoder.head(spec, params, h), extended


def sample(
  logits: Float[Array, "batch vocab"],
  key: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  top_k: int = 0,
) -> Int[Array, " batch"]:
  """Draw one token a sequence.

  Args:
    logits: unnormalized log-probabilities.
    key: PRNG key.
    temperature: divides the logits, > 0.
    top_k: keep the k most likely tokens only; 0 keeps all.

  Returns:
    Token ids, int32.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from treesurgeon.models import generation
    >>> logits = jnp.array([[0.0, 5.0, 1.0]])
    >>> generation.sample(logits, jax.random.key(0), top_k=1).tolist()
    [1]
  """
  if top_k:
    least = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def _hidden(
  spec: specs.Spec, params: Mapping[str, Any], tokens: ArrayLike, cache: Any, start: Any
) -> tuple[jax.Array, Any]:
  tokens = jnp.asarray(tokens)
  positions = jnp.broadcast_to((start + jnp.arange(tokens.shape[1]))[None, :], tokens.shape)
  h = decoder.embed(spec, params, tokens, positions)
  h, _, cache = stack.run(spec, params, h, positions=positions, cache=cache, start=start)
  return h, cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(
  spec: specs.Spec,
  new: int,
  sampling: bool,
  top_k: int,
  sizes: tuple[int | None, int, int],
  params: Mapping[str, Any],
  prompt: jax.Array,
  temperature: jax.Array,
  key: jax.Array,
  eos: jax.Array,
) -> jax.Array:
  batch, length = prompt.shape

  def choose(logits: jax.Array, step: Any) -> jax.Array:
    if not sampling:
      return logits.argmax(axis=-1).astype(jnp.int32)
    drawn = jax.random.fold_in(key, step)
    return sample(logits, drawn, temperature=temperature, top_k=top_k)

  def more(state: Any) -> jax.Array:
    step, _, _, done = state
    return (step < new) & ~done.all()

  def advance(state: Any) -> Any:
    step, tokens, cache, done = state
    at = length + step - 1
    last = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
    logits, cache = extend(spec, params, last, cache, at)
    nxt = jnp.where(done, eos, choose(logits[:, 0], step))
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, nxt[:, None], at + 1, axis=1)
    return step + 1, tokens, cache, done | (nxt == eos)

  # Only the last position is read out: a prompt's logits can be larger than the model.
  bits, group_size, residual = sizes
  cache = init_cache(
    spec, params, batch, length + new, bits=bits, group_size=group_size, residual=residual
  )
  h, cache = _hidden(spec, params, prompt, cache, 0)
  first = choose(decoder.head(spec, params, h[:, -1:])[:, 0], 0)
  # Unreached positions already hold the end token, so that stopping early fills with it.
  tokens = jnp.concatenate([prompt, jnp.full((batch, new), eos, jnp.int32)], axis=1)
  tokens = tokens.at[:, length].set(first)
  state = (jnp.int32(1), tokens, cache, first == eos)
  return jax.lax.while_loop(more, advance, state)[1]
