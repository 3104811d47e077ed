# SPDX-License-Identifier: Apache-2.0
"""SliceGPT: turn the residual stream to its principal components and cut off the last.

Ashkboos et al., "SliceGPT: Compress large language models by deleting rows and columns" (arXiv
2401.15024). Norms are folded into the kernels behind them (`compress.residual`), so the stream may
be turned by any orthogonal Q. Before each branch Q holds the eigenvectors of the stream's second
moment there, measured after all that comes before was cut; W becomes Qᵀ W or W Q, and of each the
first components stay. Where Q changes, the addition of the stream takes the matrix Qᵀ Q': with
`shortcuts`, as in the paper, every branch has one, and only this library reads the model. Without,
one Q serves the whole network, from normalized states of all places: nothing is added and a
checkpoint stays what its family is, but more is lost.

Norms divide by the root mean square over all channels that there were, as in the paper's code;
their gains hold the factor. As in the code the new width is a multiple of 8. Differences: the
stream before the head is cut too, one width serving all. Neutral at slicing=0, where nothing is
turned.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon import models
from treesurgeon.compress import residual
from treesurgeon.compress.prune import principal
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs, paths, programs, step, tuning

MULTIPLE = 8


def new_width(d_model: int, slicing: float) -> int:
  """Compute what is left of a width.

  Args:
    d_model: channels of the stream.
    slicing: share to cut off.

  Returns:
    A multiple of 8, rounded down, at least 8.

  Example:
    >>> new_width(64, 0.25), new_width(64, 0.3)
    (48, 40)
  """
  return min(d_model, max(MULTIPLE, int((1 - slicing) * d_model) // MULTIPLE * MULTIPLE))


def cut(
  m: model_lib.Model, batches: Iterable[Any], *, width: int, shortcuts: bool
) -> model_lib.Model:
  """Turn the stream and keep its first components.

  Args:
    m: the model; not modified.
    batches: token batches (`models.losses`); padding, as a "mask" says, does not count.
    width: components that stay; all of them keep the function.
    shortcuts: turn before each branch anew.

  Returns:
    The smaller model.

  Raises:
    ValueError: as `residual.check`.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=8, num_layers=1, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> cut(m, [], width=4, shortcuts=False).leaf("lm_head/kernel").shape
    (4, 5)
  """
  m = residual.fold_norms(m)
  if shortcuts:
    made = _cut_by_place(m, principal.by_place(m, batches, width=width))
  else:
    made = residual.rotate(m, principal.of_all(m, batches, width=width))
  factor = (m.spec.d_model / width) ** 0.5
  params = programs.compiled(_regain, (("spec", m.spec), ("factor", factor)))(made.params, {})
  changes: dict[str, Any] = {"d_model": width, "shortcuts": shortcuts, "tied": made.spec.tied}
  if m.spec.qk_norm == "none":  # which shares the epsilon, but not the width
    changes["norm_eps"] = m.spec.norm_eps * m.spec.d_model / width
  if shortcuts:
    changes["family"] = "treesurgeon"
  return m.replace(spec=dataclasses.replace(made.spec, **changes), params=params)


@step.method("compress.prune.slicegpt")
def slicegpt(*, slicing: float = 0.25, shortcuts: bool = True) -> step.Step:
  """Turn the residual stream to its principal components and cut off the last.

  Args:
    slicing: share of the channels to cut off; 0 is the neutral setting.
    shortcuts: turn before each branch anew and keep matrices on the stream; otherwise once.

  Returns:
    A transform of whole models; it rewrites the architecture too.

  Raises:
    ValueError: for a share outside 0 to 1; when applied, for a network whose norms stay where they
      are.

  Example:
    >>> slicegpt(slicing=0.3)
    (compress.prune.slicegpt(slicing=0.3),)

  Reference:
    Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns, 2024,
    arXiv:2401.15024.
  """
  if not 0 <= slicing < 1:
    raise ValueError(f"slicing={slicing}: valid is 0 (cut nothing) to below 1")

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    if not slicing:
      return m
    residual.check(m)
    width = new_width(m.spec.d_model, slicing)
    made = cut(m, evidence["batches"], width=width, shortcuts=shortcuts)
    return tuning.noted(made, {"width": [m.spec.d_model, width]})

  return tuning.over_model(apply, {"batches": needs.Batches()})


def _cut_by_place(m: model_lib.Model, turns: Sequence[jax.Array]) -> model_lib.Model:
  flat = paths.flatten(m.params)
  outer = {a: x for a, x in flat.items() if not a.startswith("layers/")}
  if m.spec.tied:
    outer["lm_head/kernel"] = outer[residual.TABLES[0]].T
  ends = {"first": turns[0], "last": turns[-1]}
  made = programs.compiled(_outer, ())(outer, ends)
  each = 1 if m.spec.parallel else 2
  one = programs.compiled(_layer, (("spec", m.spec),))
  for i in range(m.spec.num_layers):
    start = f"layers/{i}/"
    held = {a.removeprefix(start): x for a, x in flat.items() if a.startswith(start)}
    q = turns[each * i : each * i + each + 1]
    made |= {start + n: x for n, x in one(held, {"q": tuple(q)}).items()}
  spec = dataclasses.replace(m.spec, tied=False)
  return m.replace(spec=spec, params=paths.unflatten(made))


def _outer(flat: Mapping[str, jax.Array], first: jax.Array, last: jax.Array) -> dict[str, Any]:
  out = dict(flat)
  for name in residual.TABLES:
    if name in out:
      out[name] = residual.onto(out[name], first)
  if "lm_head/kernel" in out:
    out["lm_head/kernel"] = residual.into(out["lm_head/kernel"], last)
  if "final_norm/scale" in out:
    out["final_norm/scale"] = out["final_norm/scale"][: last.shape[1]]
  return out


def _layer(
  flat: Mapping[str, jax.Array], q: tuple[jax.Array, ...], *, spec: models.Spec
) -> dict[str, Any]:
  out = dict(flat)
  before, after = {"attn": q[0], "mlp": q[-2]}, {"attn": q[1], "mlp": q[-1]}
  for name in (n for names in residual.reads(spec).values() for n in names):
    out[f"{name}/kernel"] = residual.into(flat[f"{name}/kernel"], before[name.split("/")[0]])
  for name in residual.writes(spec):
    for leaf in (f"{name}/kernel", f"{name}/bias"):
      if leaf in flat:
        out[leaf] = residual.onto(flat[leaf], after[name.split("/")[0]])
  for norm in residual.reads(spec):
    out[f"{norm}/scale"] = flat[f"{norm}/scale"][: q[0].shape[1]]
  for name in ("attn",) if spec.parallel else ("attn", "mlp"):
    turn = jnp.matmul(before[name].T, after[name], precision="highest")
    out[f"{name}_skip/kernel"] = turn.astype(flat["attn/o/kernel"].dtype)
  return out


def _regain(params: Mapping[str, Any], *, spec: models.Spec, factor: float) -> dict[str, Any]:
  """Let the norms divide by what they did when there were more channels."""
  shift = 1.0 if spec.norm_plus_one else 0.0
  names = {f"{n}/scale" for n in (*residual.reads(spec), "final_norm")}

  def change(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {
      n: ((x.astype(jnp.float32) + shift) * factor - shift).astype(x.dtype) if n in names else x
      for n, x in flat.items()
    }

  outer = change(paths.walk({k: v for k, v in params.items() if k != "layers"}))
  return {**paths.nest(outer), **residual.over_layers({"layers": params["layers"]}, change)}
