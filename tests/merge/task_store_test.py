# SPDX-License-Identifier: Apache-2.0
"""A store serves the very bits of the method, in the bytes it promises."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import model, needs
from treesurgeon.merge import tall_masks, task_store
from treesurgeon.run import drivers

KEY = jax.random.key(0)
SPEC = models.Spec(vocab_size=40, d_model=32, num_layers=2, num_heads=2, d_ff=64, max_positions=32)


def draw(count, dtype="float32", shapes=None):
  rng = np.random.default_rng(0)
  shapes = shapes or {"a/kernel": (13, 7), "b": (9,), "c": (), "d": (2, 11, 3)}
  base = {n: jnp.asarray(rng.standard_normal(s), dtype) for n, s in shapes.items()}
  donors = [
    {n: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), dtype) for n, x in base.items()}
    for _ in range(count)
  ]
  return model.Part(None, base), [model.Part(None, d) for d in donors]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_serves_the_bits_of_the_method(dtype, tmp_path):
  base, donors = draw(3, dtype)
  lams = (0.2, 0.5, 0.9)
  task_store.save(tmp_path / "s", base, donors, names=["x", "y", "z"], lam=lams, weights=(1, 2, 1))
  store = task_store.Store(tmp_path / "s")
  assert store.tasks == ["x", "y", "z"]
  assert store.lam == list(lams)
  for task, name in enumerate(store.tasks):
    (one,) = tall_masks.tall_masks(task=task, lam=lams, weights=(1.0, 2.0, 1.0))
    wanted = one.apply(base, {"donors": needs.Aligned(donors)}, KEY)
    served = store.serve(base, name)
    assert list(served.addresses()) == base.addresses()
    for address in served.addresses():
      got = served.leaf(address)
      assert served.struct(address).shape == got.shape
      assert got.dtype == wanted.leaf(address).dtype
      assert np.asarray(got).tobytes() == np.asarray(wanted.leaf(address)).tobytes()
  assert store.serve(base, 1).leaf("b").tolist() == store.serve(base, "y").leaf("b").tolist()


def test_the_ratio_is_two_models_and_a_bit_an_entry(tmp_path):
  base, donors = draw(8, shapes={"kernel": (512, 256), "bias": (256,)})
  task_store.save(tmp_path / "s", base, donors)
  store = task_store.Store(tmp_path / "s")
  ratio = task_store.ratio(store, base)
  print(f"8 float32 tasks: {ratio:.4f} of their checkpoints, {1 / 32 + 2 / 8:.4f} without headers")
  assert ratio == pytest.approx(1 / 32 + 2 / 8, rel=0.15)
  alone = task_store.ratio(store, base, with_base=False)
  assert alone == pytest.approx(ratio - 1 / 8)


def test_a_served_model_streams_to_a_directory(tmp_path):
  base = model.Model(SPEC, models.init(SPEC, KEY))
  donors = [base.replace(params=models.init(SPEC, jax.random.key(1 + i))) for i in range(2)]
  task_store.save(tmp_path / "s", base, donors)
  served = task_store.Store(tmp_path / "s").serve(base, 1)
  (one,) = tall_masks.tall_masks(task=1)
  wanted = one.apply(base, {"donors": needs.Aligned(donors)}, KEY)

  class Sink(dict):
    def done(self, address):
      return address in self

    def write(self, address, leaf):
      self[address] = leaf

  sink = Sink()
  drivers.stream((), served, sink)
  assert served.spec == SPEC
  for address in base.addresses():
    np.testing.assert_array_equal(sink[address], wanted.leaf(address), err_msg=address)


@pytest.mark.parametrize("shape", [(), (1,), (9,), (8, 3), (17, 5), (2, 3, 4)])
def test_masks_round_trip(shape):
  mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)
  packed = task_store.pack_mask(mask)
  assert packed.dtype == jnp.uint8
  np.testing.assert_array_equal(task_store.unpack_mask(packed, shape), mask)


def test_mistakes_are_named(tmp_path):
  base, donors = draw(2)
  with pytest.raises(ValueError, match=r"names=\['x', 'x'\] must be 2 different names"):
    task_store.save(tmp_path / "s", base, donors, names=["x", "x"])
  with pytest.raises(ValueError, match=r"lam=\(0.1,\) has 1 entries for 2 donors"):
    task_store.save(tmp_path / "s", base, donors, lam=[0.1])
  other = model.Part(None, {**donors[0].params, "b": jnp.ones(4)})
  with pytest.raises(ValueError, match=r"b: donor 1 has shape \(4,\), the base has \(9,\)"):
    task_store.save(tmp_path / "s", base, [donors[0], other])
  assert not (tmp_path / "s").exists()
  with pytest.raises(ValueError, match="is no task store"):
    task_store.Store(tmp_path)
  task_store.save(tmp_path / "s", base, donors)
  store = task_store.Store(tmp_path / "s")
  with pytest.raises(ValueError, match="has no task 'x'; it has 0, 1"):
    store.serve(base, "x")
  served = store.serve(model.Part(None, {"b": jnp.ones(4), "new": jnp.ones(4)}), "0")
  with pytest.raises(ValueError, match=r"b: the store holds float32\[9\], the base float32\[4\]"):
    served.leaf("b")
  with pytest.raises(ValueError, match="lacks merged/new; was it made from another base"):
    served.leaf("new")
  about = json.loads((tmp_path / "s" / task_store.FILE).read_text())
  (tmp_path / "s" / task_store.FILE).write_text(json.dumps({**about, "version": 2}))
  with pytest.raises(ValueError, match="version 2 of task_store.json; known: 1"):
    task_store.Store(tmp_path / "s")
