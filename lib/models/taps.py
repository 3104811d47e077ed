# SPDX-License-Identifier: Apache-2.0
"""Named places in the forward pass, where values are observed or replaced.

One mechanism serves calibration (second moments of a layer's inputs), causal tracing, steering
and activation patching. `observe` runs inside the layer scan, so only what it returns is kept.
A patch runs before the observation of the same place: what is observed is what is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Observe = Callable[[str, jax.Array], Any]
Patch = Callable[[str, jax.Array, jax.Array], jax.Array]

BLOCK_TAPS = (
  "in",
  "attn/in",
  "attn/o/in",
  "attn/out",
  "mlp/in",
  "mlp/down/in",
  "mlp/out",
  "out",
)
# Besides these "mid", the stream between the branches, where they are not parallel; in a mixture of
# experts `GATES`, [batch, seq, experts], 0 where an expert is not chosen, and after it, for each
# expert, "mlp/experts/5/in" and so on, which hold all tokens, also those that do not go to it.
GATES = "mlp/gates"
OUTER_TAPS = ("embed/out", "lm_head/in")

_FEEDS = {
  "attn/q": "attn/in",
  "attn/k": "attn/in",
  "attn/v": "attn/in",
  "attn/o": "attn/o/in",
  "mlp/gate": "mlp/in",
  "mlp/up": "mlp/in",
  "mlp/down": "mlp/down/in",
  "mlp/router": "mlp/in",
  "attn_skip": "in",
  "mlp_skip": "mid",
  "dense": "dense/in",
  "conv": "conv/in",
}
_OUTER_FEEDS = {
  "lm_head": "lm_head/in",
  "mlm_head/dense": "mlm_head/in",
  "pooler": "pooler/in",
  "embed/input": "embed/in",
  "embed/patches": "embed/in",
  "head": "head/in",
}


def tap_of(address: str) -> str:
  """Return the name of the tap whose value is multiplied by the kernel at `address`.

  Args:
    address: leaf address, e.g. `layers/3/attn/q/kernel`.

  Returns:
    The tap's name, e.g. `attn/in`.

  Raises:
    ValueError: if no tap feeds a kernel at that address.

  Example:
    >>> from treesurgeon import models
    >>> models.tap_of("layers/3/mlp/down/kernel")
    'mlp/down/in'
  """
  parts = address.split("/")
  found = None
  if parts[-1] == "kernel":
    if parts[0] == "layers":
      of = expert_of("/".join(parts[2:]))
      inner = parts[2:-1] if of is None else ["mlp", *parts[5:-1]]
      found = _FEEDS.get("/".join(inner))
      if found is not None and of is not None:
        found = found.replace("mlp", f"mlp/experts/{of}", 1)
    else:
      found = _OUTER_FEEDS.get("/".join(parts[:-1]))
  if found is None:
    valid = [f"layers/<i>/{k}/kernel" for k in _FEEDS] + [f"{k}/kernel" for k in _OUTER_FEEDS]
    raise ValueError(f"no tap feeds {address!r}; valid: {', '.join(valid)}")
  return found


def expert_of(name: str) -> int | None:
  """Return the expert that a tap or a leaf belongs to.

  Args:
    name: of a tap, or an address within a layer.

  Returns:
    Its number, or None.

  Example:
    >>> expert_of("mlp/experts/5/down/in"), expert_of("mlp/in")
    (5, None)
  """
  parts = name.split("/")
  return int(parts[2]) if parts[:2] == ["mlp", "experts"] else None


class Tap:
  """Apply a patch, then gather an observation, at each named place of one forward pass."""

  def __init__(self, observe: Observe | None, patch: Patch | None, layer: Any = -1):
    self.gathered: dict[str, Any] = {}
    self._observe = observe
    self._patch = patch
    self._layer = layer

  def __call__(self, name: str, value: jax.Array) -> jax.Array:
    """Return the value to go on with."""
    if self._patch is not None:
      value = self._patch(name, value, jnp.asarray(self._layer, jnp.int32))
    if self._observe is not None:
      seen = self._observe(name, value)
      if seen is not None:
        self.gathered[name] = seen
    return value
