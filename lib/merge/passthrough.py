# SPDX-License-Identifier: Apache-2.0
"""Pass a model through, scaled where asked: the merge of one model.

mergekit 0.1.5's `passthrough` (Goddard et al., 2024, arXiv 2403.13257). A scale of 0 at a layer's
`attn/o` and `mlp/down` makes that layer the identity, which is how scaled-down copies of layers are
put into grown models. Computed in float32, returned in the storage dtype; compressed leaves come
back dense. Neutral at scale=1.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from treesurgeon.core import lifting, step, varied


def scaled(w: Float[Array, "*shape"], *, scale: ArrayLike = 1.0) -> Float[Array, "*shape"]:
  """Multiply an array by a number.

  Args:
    w: the array.
    scale: the number.

  Returns:
    The product, in the dtype of `w`.

  Example:
    >>> scaled(jnp.ones(2), scale=0.5).tolist()
    [0.5, 0.5]
  """
  return (jnp.asarray(scale, jnp.float32) * w.astype(jnp.float32)).astype(w.dtype)


@step.method("merge.passthrough")
def passthrough(*, scale: varied.Varied = 1.0, select: str | None = None) -> step.Step:
  """Multiply a model's leaves by a number each.

  Args:
    scale: the number, or rules over addresses.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform.

  Example:
    >>> passthrough(scale=(("layers/1/(attn/o|mlp/down)/.*", 0.0), (".*", 1.0)))
    (merge.passthrough(scale=(('layers/1/(attn/o|mlp/down)/.*', 0.0), ('.*', 1.0))),)

  Reference:
    Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257.
  """
  return lifting.over_leaves(
    scaled, hyper={}, knobs={"scale": scale}, split=True, select=select, default=".*", domain=".*"
  )
