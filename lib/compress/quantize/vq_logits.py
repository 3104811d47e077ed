# SPDX-License-Identifier: Apache-2.0
"""VQ-Logits: a head whose many columns are a few, so that logits are computed once a cluster.

The vocabulary's output vectors are clustered by k-means; a token's logit is that of its cluster's
centroid, gathered through a map. Tokens of one cluster are thus equally likely. A tied head needs a
kernel of its own first (`untie`); any other kernel may be selected too.

The paper goes on to train the centroids with the network, from this beginning among others.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.compress.quantize import kmeans
from treesurgeon.core import leaves, lifting, step


def quantize(
  w: Float[Array, "rows cols"], *, key: jax.Array, clusters: int, iterations: int = 100
) -> leaves.ClusteredColumns:
  """Replace columns by the centroids of their clusters.

  Args:
    w: weights, input dimension first; a column a token.
    key: draws first centroids.
    clusters: how many different columns there shall be.
    iterations: of k-means, at most.

  Returns:
    The leaf, centroids in the dtype of `w`.

  Example:
    >>> w = jnp.array([[0.0, 1.0, 8.0, 9.0]])
    >>> quantize(w, key=jax.random.key(0), clusters=2).dense().tolist()
    [[0.5, 0.5, 8.5, 8.5]]
  """
  found = kmeans.fit(w.T, k=clusters, key=key, iterations=iterations)
  kind = jnp.uint8 if clusters <= 2**8 else jnp.uint16 if clusters <= 2**16 else jnp.int32
  return leaves.ClusteredColumns(found.centroids.T.astype(w.dtype), found.index[None].astype(kind))


@step.method("compress.quantize.vq_logits")
def vq_logits(
  *, clusters: int = 1024, iterations: int = 100, select: str | None = None
) -> step.Step:
  """Cluster the columns of the head.

  Args:
    clusters: how many different columns there shall be; no fewer than there are changes nothing.
    iterations: of k-means, at most.
    select: which addresses; None is the language-model head.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> vq_logits(clusters=512)
    (compress.quantize.vq_logits(clusters=512),)

  Reference:
    Shao et al., VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector
    Quantized Logits, 2025, arXiv:2505.10202.
  """
  if clusters < 1:
    raise ValueError(f"clusters={clusters}: valid is 1 or more")
  return lifting.over_leaves(
    _kernel, hyper={"clusters": clusters, "iterations": iterations}, select=select,
    default="lm_head/kernel", raw=True, random=True,
  )  # fmt: skip


def _kernel(w: Any, key: jax.Array, *, clusters: int, iterations: int) -> Any:
  same = isinstance(w, leaves.ClusteredColumns) and w.centroids.shape[-1] == clusters
  if same or clusters >= w.shape[-1]:
    return w
  return quantize(leaves.dense(w), key=key, clusters=clusters, iterations=iterations)
