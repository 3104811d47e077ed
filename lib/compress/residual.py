# SPDX-License-Identifier: Apache-2.0
"""Change the basis of the residual stream without changing the function.

A transformer with RMS norms before its branches computes the same for any orthogonal Q when its
hidden states h become h Q, once the norms' gains have moved into the kernels that read them:
rms(h Q) = rms(h) Q (Ashkboos et al., SliceGPT, arXiv:2401.15024; QuaRot, arXiv:2404.00456).
`fold_norms` does the first, `rotate` both. A layer norm is an RMS norm of centred states, so what
writes to the stream is centred and the norm's bias moves into biases of the kernels that read it;
the spec then says `norm="rms"` and has those biases.

One Q serves the whole network: where it changes from block to block, the additions of the stream
need a matrix each (`compress.prune.slicegpt`). Norms after a branch cannot be folded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.core import leaves, paths, programs
from treesurgeon.core import model as model_lib

TABLES = ("embed/tokens/embedding", "embed/positions/embedding", "embed/types/embedding")


def reads(spec: models.Spec) -> dict[str, tuple[str, ...]]:
  """List the kernels of a layer that read the stream, by the norm they read it through.

  Args:
    spec: the architecture.

  Returns:
    Norm to kernels, names within a layer without "/scale" and "/kernel".

  Example:
    >>> reads(models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8))
    {'attn_norm': ('attn/q', 'attn/k', 'attn/v'), 'mlp_norm': ('mlp/gate', 'mlp/up')}
  """
  parts = ("gate", "up") if spec.gated else ("up",)
  attn = ("attn/q", "attn/k", "attn/v")
  mlp = (("mlp/router",) if spec.num_experts else ()) + tuple(
    f"{block}/{part}" for block in spec.feed_forwards() for part in parts
  )
  return {"attn_norm": attn + mlp} if spec.shared_norm else {"attn_norm": attn, "mlp_norm": mlp}


def writes(spec: models.Spec) -> tuple[str, ...]:
  """List the kernels of a layer whose outputs are added to the stream.

  Args:
    spec: the architecture.

  Returns:
    Names within a layer without "/kernel".

  Example:
    >>> writes(models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8))
    ('attn/o', 'mlp/down')
  """
  return ("attn/o", *(f"{block}/down" for block in spec.feed_forwards()))


def fold_norms(m: model_lib.Model) -> model_lib.Model:
  """Move the gains and biases of all norms into the kernels behind them.

  Args:
    m: a transformer with norms before its branches; not modified. A tied head is untied, for it
      takes the final norm's gain.

  Returns:
    A model of the same function: RMS norms of gain 1; computed in float32, in the storage dtypes.

  Raises:
    ValueError: for another kind of network, or a kernel that is compressed.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8, tied=True)
    >>> m = fold_norms(model_lib.Model(spec, models.init(spec, jax.random.key(0))))
    >>> m.spec.tied, m.leaf("final_norm/scale").tolist()
    (False, [1.0, 1.0, 1.0, 1.0])
  """
  check(m)
  spec = m.spec
  new = dataclasses.replace(spec, tied=spec.tied and not spec.final_norm)
  if spec.norm == "layer":
    new = dataclasses.replace(new, norm="rms")
    if spec.norm_bias:
      head = spec.head_bias or spec.final_norm
      new = dataclasses.replace(new, qkv_bias=True, mlp_bias=True, head_bias=head)
  params = programs.compiled(_fold, (("spec", spec),))(m.params, {})
  return m.replace(spec=new, params=params)


def rotate(m: model_lib.Model, q: Float[Array, "dim new"]) -> model_lib.Model:
  """Write the residual stream in another basis: hidden states h become h Q.

  Args:
    m: as for `fold_norms`, which is done first.
    q: orthogonal matrix. With fewer columns than rows, orthonormal ones, the stream is projected,
      which does change the function.

  Returns:
    A model of the same function, its norms folded.

  Raises:
    ValueError: as `fold_norms`, and for a matrix that does not fit.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> turned, tokens = rotate(m, jnp.eye(4)[::-1]), jnp.array([[1, 2]])
    >>> a, b = (models.forward(x.spec, x.params, tokens).logits for x in (m, turned))
    >>> bool(jnp.allclose(a, b, atol=1e-6))
    True
  """
  check(m)
  rows, cols = q.shape
  if rows != m.spec.d_model or cols > rows:
    raise ValueError(
      f"a matrix {rows} x {cols} cannot turn a stream of width {m.spec.d_model}; it needs as many "
      "rows and no more columns"
    )
  m = fold_norms(m)
  params = programs.compiled(turn, (("spec", m.spec),))(m.params, {"q": q})
  return m.replace(spec=dataclasses.replace(m.spec, d_model=cols), params=params)


def turn(
  params: Mapping[str, Any], q: Float[Array, "dim new"], *, spec: models.Spec
) -> dict[str, Any]:
  """Do to parameters whose norms are folded what `rotate` does; to be traced.

  Args:
    params: nested parameters.
    q: as for `rotate`.
    spec: the architecture.

  Returns:
    Nested parameters, in their dtypes.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> turn(params, jnp.eye(4)[:, :2], spec=spec)["lm_head"]["kernel"].shape
    (2, 5)
  """
  outer = paths.walk({k: v for k, v in params.items() if k != "layers"})
  readers = [name for kernels in reads(spec).values() for name in kernels]

  def change(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    out = dict(flat)
    for name in readers:
      out[f"{name}/kernel"] = into(flat[f"{name}/kernel"], q)
    for name in writes(spec):
      for leaf in (f"{name}/kernel", f"{name}/bias"):
        if leaf in flat:
          out[leaf] = onto(flat[leaf], q)
    for norm in reads(spec):
      out[f"{norm}/scale"] = flat[f"{norm}/scale"][..., : q.shape[1]]
    return out

  for name in TABLES:
    if name in outer:
      outer[name] = onto(outer[name], q)
  if "lm_head/kernel" in outer:
    outer["lm_head/kernel"] = into(outer["lm_head/kernel"], q)
  if "final_norm/scale" in outer:
    outer["final_norm/scale"] = outer["final_norm/scale"][: q.shape[1]]
  layers = over_layers({"layers": params["layers"]}, change)
  return {**paths.nest(outer), **layers}


def check(m: model_lib.Model) -> None:
  """Refuse a network whose stream has no free basis, or that is compressed already.

  Args:
    m: the model.

  Raises:
    ValueError: naming what stands in the way.
  """
  spec = m.spec
  if not isinstance(spec, models.Spec):
    raise ValueError(f"the stream of a {type(spec).__name__} cannot be turned; valid: a Spec")
  place = spec.norm_place
  if place != "pre" or spec.embed_norm:
    where = "after the embeddings" if place == "pre" else f"at norm_place={place!r}"
    raise ValueError(
      f"a norm {where} cannot be folded into the kernels behind it; valid: norm_place='pre' and no "
      "norm of the embeddings"
    )
  if spec.num_experts and spec.norm == "layer":
    raise ValueError("norm='layer' folds into biases, which a router has not; valid: norm='rms'")
  if spec.shortcuts:
    raise ValueError("a stream with shortcut matrices changes its basis already (SliceGPT)")
  if spec.mlm_head or spec.pooler:
    raise ValueError("the heads of an encoder read the stream too; valid: a decoder")
  if spec.norm == "layer" and not spec.final_norm:
    raise ValueError("without a final norm the stream cannot be centred, as norm='layer' needs")
  packed = [a for a, x in paths.walk(m.params).items() if leaves.is_leaf(x)]
  if packed:
    raise ValueError(f"{packed[0]} is compressed; fold norms and turn the stream before that")


def over_layers(
  params: Mapping[str, Any], change: Callable[[Mapping[str, jax.Array]], Mapping[str, Any]]
) -> dict[str, Any]:
  """Change the leaves of all layers, those of a segment at once.

  Args:
    params: nested parameters.
    change: {relative address: stacked array} -> the same, for a segment.

  Returns:
    Nested parameters.

  Example:
    >>> tree = {"layers": {"0:2": {"w": jnp.zeros(2)}}}
    >>> over_layers(tree, lambda flat: {k: x + 1 for k, x in flat.items()})["layers"]["0:2"]["w"][0]
    Array(1., dtype=float32)
  """
  return {
    **params,
    "layers": {s: paths.nest(change(paths.walk(t))) for s, t in params["layers"].items()},
  }


def _fold(params: Mapping[str, Any], *, spec: models.Spec) -> dict[str, Any]:
  outer = paths.walk({k: v for k, v in params.items() if k != "layers"})
  layered = spec.norm == "layer"
  biased = layered and spec.norm_bias

  def change(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    out = dict(flat)
    for norm, kernels in reads(spec).items():
      gain, bias = _gain(spec, flat, norm), flat.get(f"{norm}/bias")
      for name in kernels:
        _absorb(out, name, gain, bias)
      out[f"{norm}/scale"] = _neutral(spec, flat[f"{norm}/scale"])
      out.pop(f"{norm}/bias", None)
    for name in writes(spec):
      w = flat[f"{name}/kernel"]
      out[f"{name}/kernel"] = _centred(w) if layered else w
      if f"{name}/bias" in flat and layered:
        out[f"{name}/bias"] = _centred(flat[f"{name}/bias"])
    if biased and "mlp/down/bias" not in out:
      w = flat["mlp/down/kernel"]
      out["mlp/down/bias"] = jnp.zeros((*w.shape[:-2], w.shape[-1]), w.dtype)
    return out

  if spec.final_norm:
    gain, bias = _gain(spec, outer, "final_norm"), outer.get("final_norm/bias")
    if spec.tied:
      outer["lm_head/kernel"] = outer[TABLES[0]].T
    if "lm_head/kernel" in outer:
      _absorb(outer, "lm_head", gain, bias)
    outer["final_norm/scale"] = _neutral(spec, outer["final_norm/scale"])
    outer.pop("final_norm/bias", None)
  for name in TABLES:
    if name in outer and layered:
      outer[name] = _centred(outer[name])
  layers = over_layers({"layers": params["layers"]}, change)
  return {**paths.nest(outer), **layers}


def into(w: Float[Array, "*layers dim cols"], q: Float[Array, "dim new"]) -> jax.Array:
  """Let a kernel read a turned stream: Qᵀ W.

  Args:
    w: kernel or kernels.
    q: the turn.

  Returns:
    In the dtype of `w`.

  Example:
    >>> into(jnp.array([[1.0], [2.0]]), jnp.eye(2)[::-1]).tolist()
    [[2.0], [1.0]]
  """
  q = jnp.swapaxes(q, -1, -2).astype(jnp.float32)
  q = q.reshape((1,) * (w.ndim - q.ndim) + q.shape)
  return jnp.matmul(q, w.astype(jnp.float32), precision="highest").astype(w.dtype)


def onto(w: Float[Array, "*rows dim"], q: Float[Array, "dim new"]) -> jax.Array:
  """Let what writes to the stream write to a turned one: W Q.

  Args:
    w: kernels, biases or embeddings.
    q: the turn.

  Returns:
    In the dtype of `w`.

  Example:
    >>> onto(jnp.array([1.0, 2.0]), jnp.eye(2)[::-1]).tolist()
    [2.0, 1.0]
  """
  flat = w.reshape(-1, w.shape[-1]).astype(jnp.float32)
  turned = jnp.matmul(flat, q.astype(jnp.float32), precision="highest")
  return turned.reshape(*w.shape[:-1], q.shape[-1]).astype(w.dtype)


def _gain(spec: models.Spec, flat: Mapping[str, jax.Array], norm: str) -> jax.Array:
  return flat[f"{norm}/scale"].astype(jnp.float32) + (1.0 if spec.norm_plus_one else 0.0)


def _neutral(spec: models.Spec, scale: jax.Array) -> jax.Array:
  return jnp.full_like(scale, 0.0 if spec.norm_plus_one else 1.0)


def _centred(w: jax.Array) -> jax.Array:
  wide = w.astype(jnp.float32)
  return (wide - wide.mean(axis=-1, keepdims=True)).astype(w.dtype)


def _absorb(out: dict[str, Any], name: str, gain: jax.Array, bias: jax.Array | None) -> None:
  """Let a kernel (and its bias) do what the norm's gain (and bias) did."""
  w = out[f"{name}/kernel"]
  wide = w.astype(jnp.float32)
  out[f"{name}/kernel"] = (gain[..., :, None] * wide).astype(w.dtype)
  if bias is not None:
    row = bias.astype(jnp.float32)[..., None, :]
    more = jnp.matmul(row, wide, precision="highest")[..., 0, :]
    old = out.get(f"{name}/bias")
    out[f"{name}/bias"] = (more if old is None else more + old.astype(jnp.float32)).astype(w.dtype)
