# SPDX-License-Identifier: Apache-2.0
"""Array by array, merges equal mergekit's own methods, called in process, for every option.

Both see the same (out, in) matrices here, so `axis` is -1 where the transform would say 0 for a
kernel of ours. What may differ, and why, stands beside each exception.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from mergekit import config as mk_config
from mergekit import merge as mk_merge
from mergekit import options as mk_options
from mergekit.merge_methods import api

from treesurgeon import io
from treesurgeon.merge import (
  arcee_fusion,
  karcher,
  layer_swap,
  model_stock,
  multislerp,
  nearswap,
  nuslerp,
  passthrough,
  ram,
  sce,
  slerp,
)
from treesurgeon.run import collect, drivers

CLOSE = 3e-7
SHAPES = [(64,), (48, 32), (8, 200), (1,)]
NEAR = (2.0, 0.3, 0.01)  # the distance of models, in units of the base's entries
STATIC = ("axis", "deltas", "normalize_weights", "max_iter")

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_distance = pytest.mark.parametrize("near", NEAR)


def draw(shape, count, near=0.3, scale=0.05):
  """Returns a base and `count` models around it."""
  rng = np.random.default_rng([count, *shape])
  base = rng.standard_normal(shape)
  tuned = [base + near * rng.standard_normal(shape) for _ in range(count)]
  return [(scale * x).astype(np.float32) for x in (base, *tuned)]


def theirs(arrays, method, base=None, **parameters):
  tensors = [torch.from_numpy(np.asarray(a, np.float32)) for a in arrays]
  got = api.merge_tensors(
    tensors, method, parameters=parameters, base_index=base, dtype=torch.float32
  )
  return got.numpy()


@functools.cache
def compiled(fn, static):
  return jax.jit(lambda w, donors, knobs: fn(w, donors, **knobs, **dict(static)))


def ours(fn, arrays, **hyper):
  static = tuple((k, hyper.pop(k)) for k in STATIC if k in hyper)
  w, *donors = map(jnp.asarray, arrays)
  return np.asarray(compiled(fn, static)(w, tuple(donors), hyper), np.float32)


def agree(mine, wanted, close=CLOSE):
  assert np.isfinite(mine).all()
  close = close * max(1.0, 2 * np.abs(wanted).max())  # a few units of float32's last place
  np.testing.assert_allclose(mine, wanted, rtol=0, atol=close)


@every_shape
@every_distance
def test_slerp(shape, near):
  arrays = draw(shape, 1, near)
  for t in (0.0, 0.3, 1.0, 1.4):
    agree(ours(slerp.interpolate, arrays, t=t), theirs(arrays, "slerp", 0, t=t))


@every_shape
@every_distance
def test_nuslerp(shape, near):
  base, a, b = draw(shape, 2, near)
  for weights in ((1.0, 1.0), (0.2, 0.6), (1.0, -1.0), (1.5, -0.5)):
    for deltas in (False, True):
      arrays = (base, a, b) if deltas else (a, b)
      for axis in (None, -1, 0):
        wanted = theirs(
          arrays, "nuslerp", 0 if deltas else None, weight=list(weights),
          nuslerp_flatten=axis is None, nuslerp_row_wise=axis == 0,
        )  # fmt: skip
        mine = ours(nuslerp.interpolate, arrays, weights=weights, axis=axis, deltas=deltas)
        agree(mine, wanted)


@every_shape
@every_distance
def test_multislerp(shape, near):
  for count, weights in ((2, (0.7, 0.3)), (4, (1.0, -0.2, 0.5, 0.1))):
    base, *tuned = draw(shape, count, near)
    for normalize in (True, False):
      for eps in (1e-8, 1e-3):
        for deltas in (False, True):
          arrays = [base, *tuned] if deltas else tuned
          wanted = theirs(
            arrays, "multislerp", 0 if deltas else None, weight=list(weights),
            normalize_weights=normalize, eps=eps,
          )  # fmt: skip
          mine = ours(
            multislerp.barycenter, arrays, weights=weights, normalize_weights=normalize, eps=eps,
            deltas=deltas,
          )  # fmt: skip
          agree(mine, wanted)


def test_multislerp_of_one_change_is_the_donor():
  base, a = draw((6, 4), 1)
  wanted = theirs([base, a], "multislerp", 0, weight=[0.3])
  agree(ours(multislerp.barycenter, (base, a), weights=(0.3,), deltas=True), wanted, 0)


@every_shape
@every_distance
def test_karcher(shape, near):
  for count in (2, 5):
    arrays = draw(shape, count, near)[1:]
    for more in ({}, {"max_iter": 2}, {"max_iter": 40, "tol": 1e-4}):
      agree(ours(karcher.mean, arrays, **more), theirs(arrays, "karcher", **more))


@every_shape
@every_distance
def test_model_stock(shape, near):
  for count in (2, 3, 5):
    arrays = draw(shape, count, near)
    for filter_wise in (False, True):
      mine = ours(model_stock.interpolate, arrays, axis=-1 if filter_wise else None)
      agree(mine, theirs(arrays, "model_stock", 0, filter_wise=filter_wise), 1e-6)


@every_shape
@every_distance
def test_nearswap(shape, near):
  arrays = draw(shape, 1, near)
  for t in (0.0, 1e-3, 0.05, 10.0, -1.0):
    agree(ours(nearswap.swap_near, arrays, t=t), theirs(arrays, "nearswap", 0, t=t))


@every_shape
@every_distance
def test_sce(shape, near):
  for count in (1, 2, 3):
    arrays = draw(shape, count, near)
    for share in (1.0, 0.5, 0.1, 0.01, 0.0):
      mine = ours(sce.select_calculate_erase, arrays, select_topk=share)
      agree(mine, theirs(arrays, "sce", 0, select_topk=share))


def test_sce_of_changes_that_partly_agree():
  base, a, b = draw((40, 30), 2)
  same = np.random.default_rng(0).random(base.shape) < 0.4
  b[same] = a[same]
  still = np.random.default_rng(1).random(base.shape) < 0.2
  a[still] = b[still] = base[still]
  for share in (0.9, 0.3):
    mine = ours(sce.select_calculate_erase, (base, a, b), select_topk=share)
    agree(mine, theirs((base, a, b), "sce", 0, select_topk=share, int8_mask=True))


@every_shape
@every_distance
def test_ram(shape, near):
  for count in (1, 3):
    base, *tuned = draw(shape, count, near)
    rng = np.random.default_rng(5)
    tuned = [np.where(rng.random(shape) < 0.4, x, base) for x in tuned]
    for epsilon in (1e-5, 0.02):
      arrays = (base, *tuned)
      agree(ours(ram.merge_changes, arrays, epsilon=epsilon),
            theirs(arrays, "ram", 0, epsilon=epsilon))  # fmt: skip
      for r, alpha in ((0.1, 0.2), (0.5, 2.0)):
        more = {"epsilon": epsilon, "r": r, "alpha": alpha}
        agree(ours(ram.merge_changes, arrays, **more), theirs(arrays, "ramplus_tl", 0, **more))


def test_passthrough():
  (w,) = draw((5, 4), 0)
  for scale in (1.0, 0.0, -0.3):
    mine = np.asarray(passthrough.scaled(jnp.asarray(w), scale=scale))
    agree(mine, theirs([w], "passthrough", scale=[scale]), 0)
  agree(np.asarray(passthrough.scaled(jnp.asarray(w))), theirs([w], "passthrough"), 0)


@pytest.mark.parametrize("near", [3.0, 0.3, 0.1])
@pytest.mark.parametrize("shape", [(64,), (48, 32), (8, 200), (301, 40)], ids=str)
def test_arcee_fusion(shape, near):
  arrays = draw(shape, 1, near, scale=0.3)
  mine, wanted = ours(arcee_fusion.fuse, arrays, axis=-1), theirs(arrays, "arcee_fusion", 0)
  # Their divergences are wrong by up to 3e-7, which shifts scores and the threshold: entries
  # within that of it may fall either way. All others must be equal.
  base, donor = (x.astype(np.float64) for x in arrays)
  p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) + 1e-8 for x in (donor, base))
  kl = (p * np.log(p / q)).sum(-1, keepdims=True)
  score = np.abs(donor - base) * kl
  ranks = (np.array([0.25, 0.5, 0.75]) * (score.size - 1)).astype(int)
  first, median, third = np.sort(score.ravel())[ranks]
  unsure = np.abs(score / (median + 1.5 * (third - first)) - 1) < 6e-7 / kl
  assert unsure.mean() < 0.002
  agree(np.where(unsure, 0, mine), np.where(unsure, 0, wanted))


def test_arrays_without_a_direction():
  a = draw((12, 5), 0)[0]
  zero = np.zeros_like(a)
  pairs = [(a, a), (a, zero), (zero, a), (zero, zero), (a, 2 * a)]
  for pair in pairs:
    agree(ours(slerp.interpolate, pair, t=0.3), theirs(pair, "slerp", 0, t=0.3))
    agree(ours(karcher.mean, pair), theirs(pair, "karcher"))
    agree(ours(nuslerp.interpolate, pair, weights=(0.7, 0.3)),
          theirs(pair, "nuslerp", weight=[0.7, 0.3]))  # fmt: skip
    agree(ours(multislerp.barycenter, pair, weights=(0.7, 0.3)),
          theirs(pair, "multislerp", weight=[0.7, 0.3]))  # fmt: skip
    agree(ours(model_stock.interpolate, (a, *pair)), theirs((a, *pair), "model_stock", 0))


def test_opposite_arrays():
  a = draw((12, 5), 0)[0]
  for pair in [(a, -a), (a, -2 * a), (-3 * a, a)]:
    agree(ours(slerp.interpolate, pair, t=0.3), theirs(pair, "slerp", 0, t=0.3))
    # An arc between them is not defined. We interpolate linearly, they do so if the cosine happens
    # to be rounded to -1.
    agree(ours(nuslerp.interpolate, pair, weights=(0.7, 0.3)), 0.7 * pair[0] + 0.3 * pair[1])
  agree(ours(multislerp.barycenter, (a, -2 * a), weights=(0.7, 0.3)),
        theirs((a, -2 * a), "multislerp", weight=[0.7, 0.3]))  # fmt: skip
  agree(ours(multislerp.barycenter, (a, -2 * a), weights=(0.5, 0.5)),
        theirs((a, -2 * a), "multislerp", weight=[0.5, 0.5]))  # fmt: skip
  # Here they divide rounding errors by each other; ours does not pull.
  agree(ours(karcher.mean, (a, -a)), a)
  # Changes that cancel: t would be infinite.
  arrays = (a, a + 0.5, a - 0.5)
  agree(ours(model_stock.interpolate, arrays), theirs(arrays, "model_stock", 0), 1e-5)


def test_bfloat16_storage():
  arrays = [x.astype(ml_dtypes.bfloat16) for x in draw((48, 32), 3)]
  for fn, method, base, more in (
    (slerp.interpolate, "slerp", 0, {"t": 0.4}),
    (karcher.mean, "karcher", None, {}),
    (model_stock.interpolate, "model_stock", 0, {}),
    (sce.select_calculate_erase, "sce", 0, {"select_topk": 0.3}),
    (ram.merge_changes, "ram", 0, {"epsilon": 1e-3}),
  ):
    chosen = arrays[:2] if method == "slerp" else arrays
    mine = ours(fn, chosen, **more)
    wanted = theirs(chosen, method, base, **more)
    rounded = wanted.astype(ml_dtypes.bfloat16).astype(np.float32)
    # Computed in float32: only what lies at the middle of two bfloat16 numbers may differ.
    assert (mine != rounded).mean() < 0.005
    agree(mine, wanted, 0.004 * np.abs(wanted).max())


def test_layer_swap_equals_slices(tmp_path):
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
    max_position_embeddings=32, tie_word_embeddings=False,
  )  # fmt: skip
  for name in ("task", "language"):
    net = transformers.LlamaForCausalLM(config)
    net.load_state_dict({k: v + torch.randn_like(v) for k, v in net.state_dict().items()})
    net.save_pretrained(tmp_path / name)
  for bottom, top in ((2, 1), (0, 2), (1, 0)):
    parts = [("language", 0, bottom), ("task", bottom, 5 - top), ("language", 5 - top, 5)]
    slices = [
      {"sources": [{"model": str(tmp_path / name), "layer_range": [start, stop]}]}
      for name, start, stop in parts
      if stop > start
    ]
    wanted = {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
    out = tmp_path / f"{bottom}-{top}"
    mk_merge.run_merge(
      mk_config.MergeConfiguration.model_validate(wanted),
      str(out),
      mk_options.MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True),
    )
    task, language, wanted = (io.load(d) for d in (tmp_path / "task", tmp_path / "language", out))
    mine = drivers.run(
      layer_swap.layer_swap(bottom=bottom, top=top, transition=0),
      task,
      collect.Materials(donors=[language]),
    )
    assert sorted(mine.addresses()) == sorted(wanted.addresses())
    for address in mine.addresses():
      agree(np.asarray(mine.leaf(address)), np.asarray(wanted.leaf(address)), 0)
