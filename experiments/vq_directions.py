# SPDX-License-Identifier: Apache-2.0
"""Quantize a small language model to two bits and less, and test what is claimed of each method.

python -P -m treesurgeon.experiments.vq_directions --config=configs/vq.py --workdir=DIR
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon import registry
from treesurgeon.compress.quantize import bitstack
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import size
from treesurgeon.experiments import launch, small_decoder
from treesurgeon.run import collect, drivers


def measure(config: Mapping[str, Any], seed: int) -> small_decoder.Numbers:
  """Train a model and quantize it in every way.

  Args:
    config: see `configs/vq.py`.
    seed: of everything random.

  Returns:
    For each arm the mean loss over both texts, nats a byte, and bits a compressed weight.
  """
  trained = small_decoder.train(config, seed)
  m = trained.model
  m = m.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), m.params))
  texts = trained.sets[0] + trained.sets[1]
  given = collect.Materials(batches=texts)
  learn = collect.Materials(batches=list(itertools.islice(trained.feed, config["tune"])))
  out: small_decoder.Numbers = {}

  def tell(arm: str, made: model_lib.Model) -> None:
    loss = small_decoder.loss(made, trained.tests)
    out[arm] = {"loss": loss, "bits": size.in_memory(made).compressed_bits_per_weight or 16.0}
    print(f"seed {seed}: {arm}: {loss:.4f} at {out[arm]['bits']:.3f} bits", flush=True)

  tell("dense", m)
  for arm, expression in config["arms"]:
    made = m
    for one in registry.parse(expression):
      if one.scope == "model":
        made = drivers.run((one,), made, learn, seed=seed)
      else:
        made = drivers.run_blockwise((one,), made, given, seed=seed)
    tell(arm, made)
  stacks = registry.parse(
    f"compress.quantize.bitstack(blocks={config['blocks']}, rank=4) + "
    "compress.quantize.bitstack_sort()"
  )
  whole = drivers.run(stacks, m, collect.Materials(batches=texts[:2]), seed=seed)
  sizes = _sizes(whole, config["blocks"])
  for blocks, budget in enumerate(sizes, 1):
    cut = registry.parse(f"compress.quantize.bitstack_cut(budget={budget})")
    tell(f"{blocks} blocks", drivers.run(cut, whole))
  return out


def _sizes(whole: model_lib.Model, blocks: int) -> list[int]:
  """List the bytes of a model with 1, 2, ... blocks in every stack."""
  found = [bitstack.stack(whole.leaf(a)) for a in whole.addresses()]
  levels = [sum(s[i].nbytes for s in found if s) for i in range(blocks)]
  rest = whole.nbytes() - sum(levels)
  return [rest + total for total in itertools.accumulate(levels)]


if __name__ == "__main__":
  launch.run(functools.partial(small_decoder.study, measure))
