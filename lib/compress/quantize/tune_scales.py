# SPDX-License-Identifier: Apache-2.0
"""Train the scales and tables of a quantized network end to end, its codes fixed.

The second stage of EfficientQAT and of GQSA (E2E-OQP): the loss is the network's own on calibration
data, and all that is learned are the floating-point numbers inside compressed leaves, such as
scales, zero points, tables of vectors and thin factors. Everything else stays as it is. Masters are
float32; what was learned is rounded to how it is stored.

Chen et al., EfficientQAT, 2024, arXiv:2407.11062; Zeng et al., GQSA, 2024, arXiv:2412.17560.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from treesurgeon.compress.quantize import tune
from treesurgeon.core import descend, leaves, meshes, needs, paths, step, tuning
from treesurgeon.core import model as model_lib
from treesurgeon.models import losses


@step.method("compress.quantize.tune_scales")
def tune_scales(*, steps: int = 200, rate: float = 1e-5, select: str | None = None) -> step.Step:
  """Train what can be learned of compressed kernels, end to end on calibration data.

  Args:
    steps: updates, each on one batch; 0 changes nothing.
    rate: Adam's step size.
    select: which addresses; None is every kernel inside the layers. Layers that are stored stacked
      are trained together if any of them is selected.

  Returns:
    The transform.

  Raises:
    ValueError: for values out of range; when applied, if no selected leaf is compressed, or there
      is no data.

  Example:
    >>> tune_scales(steps=50)
    (compress.quantize.tune_scales(steps=50),)

  Reference:
    Zeng et al., GQSA: Group Quantization and Sparsity for Accelerating Large Language Model
    Inference, 2024, arXiv:2412.17560.
  """
  tuning.check(steps=steps, rate=rate)
  pattern = select or step.BLOCK_KERNELS

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(paths.select(names, pattern))]

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    chosen = set(paths.select(m.addresses(), pattern))
    flat = paths.walk(m.params)
    taken = [n for n, x in flat.items() if leaves.is_leaf(x) and chosen & _addresses(n)]
    if not taken:
      raise ValueError(f"{min(chosen)} is not compressed, nor is any other selected leaf")
    if not steps:
      return m
    start = {n: tune.parts(flat[n])[0] for n in taken}
    learned, _ = descend.minimize(
      _loss, start, evidence["batches"], dict(flat), optimizer=tuning.adam(rate), steps=steps,
      spec=m.spec,
    )  # fmt: skip
    return m.replace(params=_put(flat, learned))

  wants: dict[str, needs.Need] = {"batches": needs.Batches()}
  return step.Step(wants, meshes.with_auto_axes(apply), "model", {}, units)


def _loss(spec: Any, learned: Any, batch: Any, key: jax.Array, flat: Mapping[str, Any]) -> Any:
  del key
  return losses.nll(spec, _put(flat, learned), batch)


def _put(flat: Mapping[str, Any], learned: Mapping[str, Any]) -> dict[str, Any]:
  return paths.nest({n: tune.parts(x)[1](learned[n]) if n in learned else x
                     for n, x in flat.items()})  # fmt: skip


def _addresses(name: str) -> set[str]:
  """List the addresses that a stored leaf holds, "layers/0:2/..." those of its layers."""
  match = re.fullmatch(r"layers/(\d+):(\d+)/(.*)", name)
  if not match:
    return {name}
  return {f"layers/{i}/{match[3]}" for i in range(int(match[1]), int(match[2]))}
