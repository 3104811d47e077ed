# SPDX-License-Identifier: Apache-2.0
"""Minifloats and integers of 3 to 8 bits for weights and activations: loss against hardware cost.

python -P -m treesurgeon.experiments.minifloat_study --config=configs/minifloat.py --workdir=DIR
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import models, registry
from treesurgeon.compress.quantize import minifloat
from treesurgeon.core import leaves
from treesurgeon.core import model as model_lib
from treesurgeon.experiments import launch, minifloat_tables, small_decoder
from treesurgeon.run import collect, drivers

KEY = jax.random.key(0)
Settings = Mapping[str, Any]
Format = tuple[int, str]  # width, name


def main(config: Settings, workdir: pathlib.Path) -> None:
  """Train, try every pair of formats and every recipe, write numbers, tables and the figure.

  Args:
    config: see `configs/minifloat.py`.
    workdir: where they go.
  """
  found = measure(config)
  (workdir / "results.json").write_text(json.dumps(found) + "\n")
  minifloat_tables.write(workdir, found)


class Bench:
  """A trained network, what it is calibrated on, and what judges it."""

  def __init__(self, config: Settings):
    trained = small_decoder.train(config, config["seed"])
    self.model = trained.model
    self.batches = trained.sets[0] + trained.sets[1]
    self.tokens = np.concatenate([rows["tokens"] for rows in trained.tests])

  def rounded(self, m: model_lib.Model, expression: str) -> model_lib.Model:
    """Apply a transform and make kernels dense: what follows then compiles once for all."""
    given = collect.Materials(batches=self.batches, donors=[m], donor_batches=[self.batches])
    transform = registry.parse(expression)
    data = any(one.needs for one in transform)
    out = (drivers.run_blockwise if data else drivers.run)(transform, m, given)
    return out.replace(params=leaves.map_leaves(leaves.dense, out.params))

  def inputs(self, m: model_lib.Model, form: Format, *, tokens: bool = False) -> model_lib.Model:
    """Quantize the inputs of kernels, one static scale a tensor, or each token by its own."""
    bits, name = form
    per = "per='token'" if tokens else "per='tensor', static=True"
    (one,) = registry.parse(f"compress.quantize.activations(bits={bits}, format={name!r}, {per})")
    return one.apply(m, {} if tokens else {"inputs": self.ranges(m)}, KEY)

  def ranges(self, m: model_lib.Model) -> Mapping[str, Any]:
    """Find what inputs of kernels reach on the calibration text; kept for the original."""
    if m is not self.model:
      return _ranges(m, self.batches)
    if not hasattr(self, "_kept"):
      self._kept = _ranges(m, self.batches)
    return self._kept

  def losses(self, m: model_lib.Model) -> list[float]:
    """Compute the loss of every held-out row, in nats."""
    return np.asarray(_losses(m.spec)(m.params, self.tokens), np.float64).tolist()


def measure(config: Settings) -> dict[str, Any]:
  """Train a network and quantize it in every way.

  Args:
    config: see `configs/minifloat.py`.

  Returns:
    Losses by row: "original", "weights" by format or choice, "pairs" by both formats, some of
    them in "tokens", whose inputs have a scale a token; "recipes" by name and point; "targets" a
    row.
  """
  bench = Bench(config)
  forms = [(b, f) for b in config["widths"] for f in minifloat.formats(b)]
  paired = [(b, f) for b, f in forms if f[:2] not in config["alone"]]
  weights, out = {}, {"original": bench.losses(bench.model), "targets": config["length"]}
  out["weights"], out["pairs"], out["recipes"] = {}, {}, {}
  for form in forms:
    weights[form] = bench.rounded(bench.model, f"compress.quantize.rtn({_text(form)})")
    out["weights"][_name(form)] = bench.losses(weights[form])
  for bits in config["chosen"]:
    for by in minifloat.BY:
      chosen = bench.rounded(bench.model, f"compress.quantize.minifloat(bits={bits}, by={by!r})")
      out["weights"][f"{bits} by {by}"] = bench.losses(chosen)
  print("weights done", flush=True)
  for form in paired:
    frame = bench.inputs(bench.model, form)
    for own in paired:
      both = _joined(frame, weights[own])
      out["pairs"][f"{_name(own)} {_name(form)}"] = bench.losses(both)
    print(f"inputs in {_name(form)} done", flush=True)
  out["tokens"] = {}
  for bits in config["widths"]:
    for key in minifloat_tables.same_width(out["pairs"], bits):
      own, form = map(minifloat_tables.parse, key.split())
      frame = bench.inputs(bench.model, form, tokens=True)
      out["tokens"][key] = bench.losses(_joined(frame, weights[own]))
  for label, before, rounding, correct in config["recipes"]:
    start = bench.rounded(bench.model, before) if before else bench.model
    for bits, name, act_bits, act_name in config["points"]:
      made = bench.rounded(start, rounding.format(form=_text((bits, name))))
      if correct:
        given = collect.Materials(
          batches=bench.batches, donors=[start], donor_batches=[bench.batches]
        )
        made = drivers.run_blockwise(
          registry.parse("compress.quantize.bias_correction()"), made, given
        )
      frame = bench.inputs(start, (act_bits, act_name))
      point = f"{_name((bits, name))} {_name((act_bits, act_name))}"
      out["recipes"].setdefault(label, {})[point] = bench.losses(_joined(frame, made))
  return out


def _text(form: Format) -> str:
  return f"bits={form[0]}, format={form[1]!r}, group_size=-1"


def _name(form: Format) -> str:
  return f"int{form[0]}" if form[1] == "int" else form[1]


def _joined(frame: model_lib.Model, made: model_lib.Model) -> model_lib.Model:
  """Put kernels behind the inputs that a frame quantizes; other leaves come as they are."""

  def join(x: Any, w: Any) -> Any:
    quantized = isinstance(x, leaves.ActivationQuantized)
    return dataclasses.replace(x, weight=w) if quantized else w

  return made.replace(params=leaves.map_leaves(join, frame.params, made.params))


def _ranges(m: model_lib.Model, batches: Sequence[np.ndarray]) -> Mapping[str, Any]:
  (one,) = registry.parse("compress.quantize.activations(per='tensor', static=True)")
  return dict(collect.evidence(one, m, collect.Materials(batches=batches))["inputs"])


@functools.lru_cache(maxsize=2)
def _losses(spec: Any) -> Any:
  @jax.jit
  def losses(params: Any, tokens: jax.Array) -> jax.Array:
    logits, labels, _ = models.predictions(spec, params, tokens)
    told = jax.nn.log_softmax(logits.astype(jnp.float32))
    each = -jnp.take_along_axis(told, labels[:, None], axis=-1)
    return each.reshape(tokens.shape[0], -1).sum(axis=1)

  return losses


if __name__ == "__main__":
  launch.run(main)
