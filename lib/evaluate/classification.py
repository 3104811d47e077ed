# SPDX-License-Identifier: Apache-2.0
"""How well, and how surely, an image classifier answers."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import models
from treesurgeon.core import model as model_lib


def probabilities(m: model_lib.Model, rows: Mapping[str, Any]) -> np.ndarray:
  """Predict the classes of images, all in one batch.

  Args:
    m: an image classifier.
    rows: "inputs" (n, height, width, channels).

  Returns:
    (n, classes) float32.

  Example:
    >>> spec = models.VisionSpec("mlp", image_size=2, num_classes=3, d_model=4, num_layers=1)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> probabilities(m, {"inputs": np.zeros((5, 4), np.float32)}).shape
    (5, 3)
  """
  return np.asarray(_predict(m.spec, m.params, jnp.asarray(rows["inputs"])))


def accuracy(m: model_lib.Model, rows: Mapping[str, Any]) -> float:
  """Compute the share of images whose class is ranked first.

  Args:
    m: an image classifier.
    rows: "inputs" and "labels".

  Returns:
    A share.

  Example:
    >>> spec = models.VisionSpec("mlp", image_size=2, num_classes=3, d_model=4, num_layers=1)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> accuracy(m, {"inputs": np.zeros((5, 4), np.float32), "labels": np.zeros(5, int)})
    1.0
  """
  return float((probabilities(m, rows).argmax(axis=1) == np.asarray(rows["labels"])).mean())


def confidence(m: model_lib.Model, rows: Mapping[str, Any]) -> float:
  """Compute the mean probability of the class ranked first; above the accuracy, it is too high.

  Args:
    m: an image classifier.
    rows: "inputs".

  Returns:
    A probability.

  Example:
    >>> spec = models.VisionSpec("mlp", image_size=2, num_classes=4, d_model=4, num_layers=1)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> confidence(m, {"inputs": np.zeros((5, 4), np.float32)})
    0.25
  """
  return float(probabilities(m, rows).max(axis=1).mean())


@functools.partial(jax.jit, static_argnums=0)
def _predict(spec: Any, params: Any, x: jax.Array) -> jax.Array:
  return jax.nn.softmax(models.forward(spec, params, x).logits)
