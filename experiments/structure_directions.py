# SPDX-License-Identifier: Apache-2.0
"""Cut a small language model's shape and rank by every method, and test what is claimed of each.

python -P -m treesurgeon.experiments.structure_directions --config=configs/structure.py \
  --workdir=DIR
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from treesurgeon import registry
from treesurgeon.compress import residual
from treesurgeon.core import model as model_lib
from treesurgeon.experiments import launch, small_decoder
from treesurgeon.run import collect, drivers

DRAWS = 3  # of what is chosen at random; their mean counts


def measure(config: Mapping[str, Any], seed: int) -> small_decoder.Numbers:
  """Train a model and make it smaller in every way.

  Args:
    config: see `configs/structure.py`.
    seed: of everything random.

  Returns:
    For each arm the mean loss over both texts, in nats a byte.
  """
  dense, _, tests, feed = small_decoder.train(config, seed)
  # What it calibrates on is of both texts in every batch.
  learn = list(itertools.islice(feed, config["tune"]))
  given = [b["tokens"][:, :-1] for b in itertools.islice(feed, config["calibration"])]
  out: small_decoder.Numbers = {}

  def tell(arm: str, *made: model_lib.Model) -> None:
    loss = float(np.mean([small_decoder.loss(m, tests) for m in made]))
    out[arm] = {"loss": loss}
    print(f"seed {seed}: {arm}: {loss:.4f}", flush=True)

  tell("dense", dense)
  for arm, expressions in config["arms"]:
    made = dense
    for text in expressions:
      trains = "steps=" in text
      materials = collect.Materials(batches=learn if trains else given, donors=[dense])
      go = drivers.run if trains else drivers.run_blockwise
      made = go(registry.parse(text), made, materials, seed=seed)
    tell(arm, made)
  rng = np.random.default_rng(seed)
  for arm, how, count in config["controls"]:
    make = random_layers if how == "layers" else random_slice
    tell(arm, *(make(dense, count, rng) for _ in range(DRAWS)))
  return out


def random_layers(m: model_lib.Model, drop: int, rng: np.random.Generator) -> model_lib.Model:
  """Drop layers at random: the control of depth.

  Args:
    m: the model.
    drop: how many.
    rng: chooses them.

  Returns:
    The model without them.
  """
  gone = rng.choice(m.spec.num_layers, size=drop, replace=False).tolist()
  return drivers.run(registry.load("compress.prune.layer_drop")(layers=tuple(gone)), m)


def random_slice(m: model_lib.Model, width: int, rng: np.random.Generator) -> model_lib.Model:
  """Turn the residual stream at random and cut it: the control of width.

  Args:
    m: the model.
    width: channels that stay.
    rng: draws the turn.

  Returns:
    The narrower model, its norms dividing over the channels that stay.
  """
  q = np.linalg.qr(rng.normal(size=(m.spec.d_model, m.spec.d_model)))[0][:, :width]
  return residual.rotate(m, jnp.asarray(q, jnp.float32))


if __name__ == "__main__":
  launch.run(functools.partial(small_decoder.study, measure))
