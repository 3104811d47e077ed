# SPDX-License-Identifier: Apache-2.0
"""Quantize a small language model by methods of one shot, and test what is claimed of each.

python -P -m treesurgeon.experiments.quantize_directions --config=configs/quantize.py --workdir=DIR
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import registry
from treesurgeon.compress.quantize import aligned
from treesurgeon.core import leaves, programs, step
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import size
from treesurgeon.experiments import launch, small_decoder
from treesurgeon.run import collect, drivers


def measure(config: Mapping[str, Any], seed: int) -> small_decoder.Numbers:
  """Train a model and quantize it in every way.

  Args:
    config: see `configs/quantize.py`.
    seed: of everything random.

  Returns:
    For each arm and cut, mean loss over both texts in nats a byte, and bits a compressed weight.
  """
  trained = small_decoder.train(config, seed)
  m = trained.model
  m = m.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), m.params))
  texts = trained.sets[0] + trained.sets[1]
  out: small_decoder.Numbers = {}

  def tell(name: str, made: model_lib.Model) -> None:
    bits = size.in_memory(made).compressed_bits_per_weight or 16.0
    out[name] = {"loss": small_decoder.loss(made, trained.tests), "bits": bits}
    print(f"seed {seed}: {name}: {out[name]['loss']:.4f} at {bits:.3f} bits", flush=True)

  tell("dense", m)
  for arm, expression, cuts in config["arms"]:
    for cut in cuts:
      made = m
      for one in registry.parse(expression.format(bits=cut.split()[0])):
        few = texts[:1] if "gwq" in one.info["name"] else texts
        go = drivers.run if one.scope == "model" else drivers.run_blockwise
        made = go((one,), made, collect.Materials(batches=few), seed=seed)
      tell(f"{arm} at {cut}", made)
  rng = np.random.default_rng(seed)
  for arm, expression, cuts in config["controls"]:
    for cut in cuts:
      draws = []
      for _ in range(config["draws"]):
        (one,) = registry.parse(expression.format(bits=cut.split()[0]))
        draws.append(randomly(one, m, rng))
      tell(f"{arm} at {cut}", draws[0])
      losses = [small_decoder.loss(x, trained.tests) for x in draws]
      out[f"{arm} at {cut}"]["loss"] = float(np.mean(losses))
  return out


def randomly(one: step.Step, m: model_lib.Model, rng: np.random.Generator) -> model_lib.Model:
  """Let chance choose what a method chooses: the weights that are kept, or the wide groups.

  Args:
    one: `gwq` or `aligned`.
    m: the model.
    rng: draws.

  Returns:
    The quantized model, of as many bytes.

  Raises:
    ValueError: for another method.

  Example:
    >>> m = model_lib.Model(None, {"kernel": jnp.ones((4, 2))})
    >>> (one,) = registry.parse("compress.quantize.gwq(outliers=0.25, select='kernel')")
    >>> randomly(one, m, np.random.default_rng(0)).leaf("kernel").parts[1].positions.shape
    (1, 2)
  """
  names = [a for unit in one.units(m.addresses()) for a in unit]
  if one.info["name"] == "compress.quantize.gwq":
    drawn = {a: jnp.asarray(rng.random(m.leaf(a).shape), jnp.float32) for a in names}
    return one.apply(m, {"gradient": drawn}, jax.random.key(0))
  if one.info["name"] != "compress.quantize.aligned":
    raise ValueError(f"{one!r} leaves nothing to chance; valid: gwq, aligned")
  how = dict(one.info["arguments"])
  share, align, _ = how.pop("wide"), how.pop("align"), how.pop("select")
  changes = {}
  for a in names:
    w = leaves.dense(m.leaf(a))
    groups, blocks = -(-w.shape[0] // how["group_size"]), -(-w.shape[1] // align)
    count = round(share * groups)
    ranks = np.argsort(rng.random((groups, blocks)), axis=0)
    wide = jnp.asarray(np.repeat(ranks < count, align, axis=1)[:, : w.shape[1]])
    hyper = tuple(sorted({**how, "count": count}.items()))
    changes[a] = programs.compiled(aligned.quantize, hyper)(w, {"wide": wide})
  return m.update(changes)


if __name__ == "__main__":
  launch.run(functools.partial(small_decoder.study, measure))
