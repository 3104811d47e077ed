# SPDX-License-Identifier: Apache-2.0
"""Prune a small language model by every method, and test what is claimed of each.

python -P -m treesurgeon.experiments.prune_directions --config=configs/prune.py --workdir=DIR
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import registry
from treesurgeon.core import leaves
from treesurgeon.core import model as model_lib
from treesurgeon.experiments import launch, small_decoder
from treesurgeon.run import collect, drivers


def measure(config: Mapping[str, Any], seed: int) -> small_decoder.Numbers:
  """Train a model and prune it in every way.

  Args:
    config: see `configs/prune.py`.
    seed: of everything random.

  Returns:
    For each arm and cut, mean loss over both texts in nats a byte, and the mean over kernels of
    the output error relative to the output, where nothing was trained.
  """
  dense, sets, tests, feed = small_decoder.train(config, seed)
  given = collect.Materials(batches=sets[0] + sets[1], donor_batches=sets)
  learn = collect.Materials(batches=list(itertools.islice(feed, config["tune"])))
  (surgeon,) = registry.parse("compress.prune.sparsegpt()")
  moments = {a: s.moment for a, s in collect.evidence(surgeon, dense, given)["hessian"].items()}
  out: small_decoder.Numbers = {"dense": {"loss": small_decoder.loss(dense, tests)}}
  for (arm, expression), (cut, how) in itertools.product(config["arms"], config["cuts"]):
    if cut == "2:4" and ("ecoflap" in expression or "per='model'" in expression):
      continue  # a ratio for all, and a comparison over the model, mean nothing there
    trains = "steps=" in expression
    if expression:
      go = drivers.run if trains else drivers.run_blockwise
      made = go(
        registry.parse(expression.format(cut=how)), dense, learn if trains else given, seed=seed
      )
    else:
      made = randomly(dense, list(moments), cut, seed)
    found = {"loss": small_decoder.loss(made, tests)}
    if not trains:
      found["error"] = float(
        np.mean([_error(dense.leaf(a), made.leaf(a), h) for a, h in moments.items()])
      )
    out[f"{arm} at {cut}"] = found
    print(f"seed {seed}: {arm} at {cut}:", json.dumps({k: round(v, 4) for k, v in found.items()}))
  return out


def randomly(m: model_lib.Model, addresses: Sequence[str], cut: str, seed: int) -> model_lib.Model:
  """Prune whatever weights: the control.

  Args:
    m: the model.
    addresses: which kernels.
    cut: "50%", or "2:4".
    seed: of the choice.

  Returns:
    The pruned model.

  Example:
    >>> m = model_lib.Model(None, {"w": jnp.ones((4, 3))})
    >>> float(randomly(m, ["w"], "2:4", 0).leaf("w").sum())
    6.0
  """
  rng, changes = np.random.default_rng(seed), {}
  for address in addresses:
    w = np.array(leaves.dense(m.leaf(address)))
    rows = 4 if ":" in cut else w.size
    score = rng.random((w.shape[0] // 4, 4, w.shape[1]) if ":" in cut else (1, w.size, 1))
    count = 2 if ":" in cut else int(float(cut[:-1]) / 100 * rows)
    gone = np.argsort(np.argsort(score, axis=1), axis=1) < count
    changes[address] = jnp.asarray(np.where(gone.reshape(w.shape), 0, w))
  return m.update(changes)


@jax.jit
def _error(w: jax.Array, pruned: jax.Array, h: jax.Array) -> jax.Array:
  d = pruned - w
  return (d * (h @ d)).sum() / (w * (h @ w)).sum()


if __name__ == "__main__":
  launch.run(functools.partial(small_decoder.study, measure))
