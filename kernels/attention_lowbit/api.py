# SPDX-License-Identifier: Apache-2.0
"""`attend(q, k, v, cache, start)`: one call for a quantized cache on any platform.

The choice of an implementation is static: it depends on the platform, shapes and the cache's
widths, never on values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.kernels.attention_lowbit import cache as caches
from treesurgeon.kernels.attention_lowbit import tpu, xla


class Implementation(NamedTuple):
  """One way to attend.

  Attributes:
    attend: as `attend` below.
    unsupported: (q, cache, mask) -> why it cannot, or "".
  """

  attend: Callable[..., jax.Array]
  unsupported: Callable[[jax.Array, caches.QuantizedCache, Any], str]


IMPLEMENTATIONS = {
  "tpu": Implementation(tpu.attend, tpu.unsupported),
  "xla": Implementation(xla.attend, lambda q, cache, mask: ""),
}


def attend(
  q: Float[Array, "batch seq heads channels"],
  k: Float[Array, "batch seq kv_heads channels"],
  v: Float[Array, "batch seq kv_heads channels"],
  cache: caches.QuantizedCache,
  start: int | jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
  window: int | jax.Array = 0,
  mask: jax.Array | None = None,
  implementation: str | None = None,
) -> Float[Array, "batch seq heads channels"]:
  """Attend to past tokens as the cache holds them and, causally, to the new ones as they are.

  Args:
    q: queries; consecutive groups of heads share one key/value head.
    k, v: keys and values of the same tokens, which are not in the cache; `cache.append` adds them.
    cache: of the tokens before.
    start: how many there are; an int or traced.
    scale: multiplier of the scores.
    softcap: c in c * tanh(score / c), or None.
    window: keys that a query sees, itself included; 0 is unlimited. An int or traced.
    mask: [batch, keys], nonzero at real tokens, past and new; None is all.
    implementation: "tpu" or "xla"; None takes the kernel on a TPU, if it can.

  Returns:
    The mixed values in the dtype of `q`; scores, softmax and sums are float32. Gradients are not
    defined: a cache is for inference.

  Raises:
    ValueError: for shapes that disagree, or an implementation that cannot; it says which can.

  Example:
    >>> import jax.numpy as jnp
    >>> cache = caches.init(1, 1, 128, 8, bits=8, group_size=8, residual=8)
    >>> x = jnp.ones((1, 3, 1, 8))
    >>> attend(x, x, x, cache, 0, scale=1.0)[0, 2, 0, 0].tolist()
    1.0

  Reference:
    Liu et al., KIVI: a tuning-free asymmetric 2bit quantization for KV cache, 2024, arXiv
    2402.02750.
  """
  caches.check(cache, k, v, start)
  if (
    q.ndim != 4
    or q.shape[:2] != k.shape[:2]
    or q.shape[3] != k.shape[3]
    or (q.shape[2] % k.shape[2])
  ):
    raise ValueError(
      f"queries of shape {q.shape} for keys of shape {k.shape}; valid: the same but for heads, "
      "whose number is a multiple"
    )
  if mask is not None and (mask.ndim != 2 or mask.shape[0] != q.shape[0]):
    raise ValueError(f"mask has shape {mask.shape}; valid: [batch={q.shape[0]}, keys]")
  options = {"scale": scale, "softcap": softcap, "mask": mask}
  why = {name: one.unsupported(q, cache, mask) for name, one in IMPLEMENTATIONS.items()}
  if implementation is not None:
    reason = why.get(implementation, "it is unknown")
    if reason:
      usable = ", ".join(name for name, reason in why.items() if not reason)
      raise ValueError(
        f"implementation={implementation!r} cannot attend to this cache: {reason}; "
        f"supported: {usable}"
      )
    run = IMPLEMENTATIONS[implementation].attend
    return run(q, k, v, cache, start, window=window, **options)
  if why["tpu"]:
    return xla.attend(q, k, v, cache, start, window=window, **options)
  # Decided when the program is lowered, so that one compiled ahead for a TPU has the kernel.
  choices = [
    lambda *a, run=one.attend: run(*a[:5], window=a[5], **options)
    for one in IMPLEMENTATIONS.values()
  ]
  operands = (q, k, v, cache, jnp.asarray(start), jnp.asarray(window))
  return jax.lax.platform_dependent(*operands, tpu=choices[0], default=choices[1])
