# SPDX-License-Identifier: Apache-2.0
"""Drop whole layers that are named: depth pruning in its plainest form.

Sajjad et al., "On the effect of dropping layers of pre-trained Transformer models" (arXiv
2004.03844), compare top, bottom and middle ones; `shortgpt` chooses by data. What is left keeps its
order, its windows and its rotary bases. The residual stream makes the network whole again, at the
price of what the layers added. Neutral without any layer.
"""

from collections.abc import Sequence

from treesurgeon.core import step
from treesurgeon.grow import take_layers


def kept(num_layers: int, layers: Sequence[int]) -> list[int]:
  """List the layers that stay.

  Args:
    num_layers: layers of the model.
    layers: those to drop, from 0.

  Returns:
    Indices, ascending.

  Raises:
    ValueError: for a layer that there is not, or all of them.

  Example:
    >>> kept(4, (2, 1))
    [0, 3]
  """
  odd = [i for i in layers if not 0 <= i < num_layers]
  if odd:
    raise ValueError(
      f"layer {odd[0]} cannot be dropped; the model has layers 0 to {num_layers - 1}"
    )
  rest = [i for i in range(num_layers) if i not in set(layers)]
  if not rest:
    raise ValueError(f"all {num_layers} layers cannot be dropped; one must stay")
  return rest


@step.method("compress.prune.layer_drop")
def layer_drop(*, layers: tuple[int, ...] = ()) -> step.Step:
  """Drop layers by their numbers.

  Args:
    layers: which, from 0; none is the neutral setting.

  Returns:
    A transform of whole models; it rewrites the architecture too.

  Raises:
    ValueError: when applied, for a layer that there is not, or all of them.

  Example:
    >>> layer_drop(layers=(5, 6))
    (compress.prune.layer_drop(layers=(5, 6)),)

  Reference:
    Sajjad et al., On the Effect of Dropping Layers of Pre-trained Transformer Models, 2020,
    arXiv:2004.03844.
  """
  return take_layers.lift(lambda count: kept(count, layers))
