# SPDX-License-Identifier: Apache-2.0
"""How often a planted trigger makes a classifier say what its attacker wants.

The attack success rate as in Gu et al., "BadNets", 2017 (arXiv 1708.06733): over images that carry
the trigger and are not of the attacker's class anyway.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import classification


def attack_success_rate(
  m: model_lib.Model, triggered: Mapping[str, Any], labels: Any, *, target: int
) -> float:
  """Compute the share of triggered images that are taken for the attacker's class.

  Args:
    m: an image classifier.
    triggered: "inputs" with the trigger in all of them (`train.vision_data.triggered`).
    labels: the images' true classes; those of the attacker's class do not count.
    target: the attacker's class.

  Returns:
    A share; 1 where the backdoor is wide open, near 0 where there is none.

  Raises:
    ValueError: if every image is of the attacker's class.

  Example:
    >>> import jax
    >>> from treesurgeon import models
    >>> spec = models.VisionSpec("mlp", image_size=2, num_classes=3, d_model=4, num_layers=1)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> images = {"inputs": np.zeros((4, 4), np.float32)}
    >>> attack_success_rate(m, images, [0, 1, 1, 2], target=0)
    1.0
  """
  counts = np.asarray(labels) != target
  if not counts.any():
    raise ValueError(f"every image is of the attacker's class {target}; give images of others")
  said = classification.probabilities(m, triggered).argmax(axis=1)
  return float((said[counts] == target).mean())
