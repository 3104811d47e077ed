# SPDX-License-Identifier: Apache-2.0
"""aTLAS: learn one coefficient for each parameter tensor of each task vector, from few examples.

θ = θ₀ + Σ Λ_i τ_i with Λ_i constant on every tensor; only the coefficients are trained, from zero.
Zhang et al., "Knowledge composition using task vectors with learned anisotropic scaling", 2024
(arXiv 2407.02880). AdamW with step 0.1 and weight decay 0.1, gradients clipped to norm 1 and a
cosine schedule to zero, as in the official scripts. `blocks=K` is their aTLAS × K: the entries of
each tensor are divided at random into K sets with a coefficient each (here drawn from the tensor's
address, so that a file of coefficients is enough to do it again; vectors are divided too, where the
code gives them zeros).

Supervised and few-shot learning take `objective="nll"` on labelled batches; unsupervised adaptation
takes "entropy". The paper's pseudo-labels with weak and strong augmentations of images are left
out: text has no such augmentations. The code keeps the best epoch's coefficients by test accuracy;
here the last are kept.

As a parameter-efficient fine-tuning method: `export` writes the coefficients to a small file, and
`merge.atlas(coefficients=FILE)` merges with it and learns nothing. Neutral at steps=0.
"""

import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from treesurgeon import models as networks
from treesurgeon.core import descend, needs, step, tuning
from treesurgeon.core import model as model_lib
from treesurgeon.merge import adamerging, mixed_models, mixture

OBJECTIVES = ("nll", "entropy")


def loss(
  plan: mixture.Plan, coefficients: Any, batch: Any, key: jax.Array, parts: Any
) -> jax.Array:
  """Compute the merged network's loss on a batch.

  Args:
    plan: what is static; its option names the objective.
    coefficients: shaped like `mixture.start`'s.
    batch: see `models.nll`.
    key: not used.
    parts: `mixture.Parts`.

  Returns:
    Nats a prediction.
  """
  del key
  params = mixture.network(plan, parts, coefficients)
  measure = networks.nll if plan.option == "nll" else networks.entropy
  return measure(plan.spec, params, batch)


def export(m: model_lib.Model, path: str | os.PathLike[str], *, blocks: int = 1) -> int:
  """Write the coefficients that a merge learned to a JSON file.

  Args:
    m: the model that `merge.atlas` (or `merge.adamerging`) returned.
    path: file to write.
    blocks: as they were learned with.

  Returns:
    How many numbers the file holds.

  Raises:
    ValueError: if the model holds no coefficients.

  Example:
    >>> import tempfile
    >>> m = model_lib.Model(None, {}, aux={"coefficients": {"w": [0.25, 0.5]}})
    >>> export(m, tempfile.mkdtemp() + "/c.json")
    2
  """
  found = m.aux.get("coefficients")
  if not found:
    raise ValueError("the model holds no coefficients; export what merge.atlas returned")
  text = json.dumps({"format": "atlas", "blocks": blocks, "coefficients": found}, indent=1)
  pathlib.Path(path).write_text(text, encoding="utf-8")
  return sum(np.size(c) for c in found.values())


def read(path: str) -> tuple[dict[str, Any], int]:
  """Read what `export` wrote.

  Args:
    path: the file.

  Returns:
    (address to coefficients, blocks).

  Raises:
    ValueError: if it is no such file.
  """
  try:
    held = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"coefficients={path!r} cannot be read: {error}") from error
  if not isinstance(held, Mapping) or held.get("format") != "atlas":
    raise ValueError(f"coefficients={path!r} is no file that atlas.export wrote")
  return dict(held["coefficients"]), int(held["blocks"])


@step.method("merge.atlas")
def atlas(
  *,
  models: Sequence[str] = (),
  objective: str = "nll",
  granularity: str = "tensor",
  blocks: int = 1,
  init: float | Sequence[float] = 0.0,
  steps: int = 200,
  rate: float = 0.1,
  decay: float = 0.1,
  clip: float = 1.0,
  coefficients: str = "",
  select: str | None = None,
) -> step.Step:
  """Add task vectors with a learned coefficient for each of their parameter tensors.

  Args:
    models: directories of the donors; empty takes those handed to the driver.
    objective: "nll" learns from labels, "entropy" without.
    granularity: "task", "layer" or "tensor": what has a coefficient of its own.
    blocks: random sets of entries a tensor, each with a coefficient of its own.
    init: coefficients to begin from, one number or one a donor.
    steps: updates, each on one batch.
    rate: AdamW's step, at the start of a cosine schedule to zero.
    decay: weight decay of the coefficients.
    clip: largest norm of a gradient.
    coefficients: file that `export` wrote, to be merged with instead of learning.
    select: regular expression over addresses; None means every leaf.

  Returns:
    A transform. The model's `aux["coefficients"]` holds what was learned, by address, and its
    lineage how many numbers were trained.

  Raises:
    ValueError: for an argument out of range; when applied, if there is no data, or the file's
      coefficients do not fit.

  Example:
    >>> atlas(steps=50, blocks=4)
    (merge.atlas(blocks=4, steps=50),)

  Reference:
    Zhang et al., Knowledge composition using task vectors with learned anisotropic scaling, 2024,
    arXiv 2407.02880.
  """
  adamerging.check(granularity=granularity, steps=steps, rate=rate)
  if objective not in OBJECTIVES:
    raise ValueError(f"objective={objective!r}; valid: {', '.join(OBJECTIVES)}")
  if blocks < 1 or (blocks > 1 and granularity != "tensor"):
    raise ValueError(f"blocks={blocks} must be at least 1, and more need granularity='tensor'")
  if decay < 0 or clip <= 0:
    raise ValueError(f"decay={decay} must not be negative and clip={clip} must be above 0")
  pattern = select or ".*"
  held = read(coefficients) if coefficients else None

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    how = {"granularity": granularity, "blocks": blocks, "option": objective}
    if held is not None:
      how |= {"granularity": "tensor", "blocks": held[1]}
    plan, parts = mixed_models.gather(m, evidence["donors"], pattern, **how)
    found, losses = mixture.start(plan, len(parts.donors), init), np.zeros(0)
    if held is not None:
      found = _fitted(plan, len(parts.donors), held[0])
    elif steps and tuning.learnable(m, batches := list(evidence["batches"])):
      adamw = _optimizer(rate, decay, clip, steps)
      found, losses = descend.minimize(
        loss, found, batches, parts, optimizer=adamw, steps=steps, spec=plan
      )
    return mixed_models.learned(m, plan, parts, found, losses)

  made = adamerging.over_model(apply, models, pattern, needs.Batches())
  if held is not None:
    return made._replace(needs={"donors": made.needs["donors"]})
  return made


def _fitted(plan: mixture.Plan, donors: int, held: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Shape coefficients by address like those of `mixture.start`; what is not held stays at 0."""
  blank = mixture.start(plan, donors, 0.0)
  names = {a for name, _ in plan.chosen for a in mixture.addresses(name)}
  odd = sorted(set(held) - names)
  if odd:
    raise ValueError(f"{odd[0]}: the file of coefficients names it, the model has no such leaf")
  out = {}
  for name, zeros in blank.items():
    rows = []
    for address in mixture.addresses(name):
      shape = (donors, *((plan.blocks,) if plan.blocks > 1 else ()))
      row = np.asarray(held.get(address, np.zeros(shape)), np.float32)
      if row.shape != shape:
        raise ValueError(
          f"{address}: the file holds coefficients of shape {row.shape}, {donors} donors take "
          f"{shape}"
        )
      rows.append(row)
    stacked = np.stack(rows, axis=1) if mixture.stacked(name) else rows[0]
    out[name] = jnp.asarray(stacked.reshape(zeros.shape))
  return out


@functools.lru_cache(maxsize=32)
def _optimizer(rate: float, decay: float, clip: float, steps: int) -> optax.GradientTransformation:
  schedule = optax.cosine_decay_schedule(rate, steps)
  return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(schedule, weight_decay=decay))
