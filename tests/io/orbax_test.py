# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from treesurgeon import models
from treesurgeon.core import leaves, lineage, model, packing
from treesurgeon.io import orbax

SPEC = models.Spec(
  vocab_size=9, d_model=8, num_layers=3, num_heads=2, d_ff=(16, 16, 8), extra=(("a", "1"),)
)


def make():
  m = model.Model(SPEC, models.init(SPEC, jax.random.key(0), jnp.bfloat16))
  codes = packing.pack(jnp.ones((8, 16), jnp.uint8), bits=4)
  scales = jnp.ones((2, 16), jnp.float32)
  quantized = leaves.QuantizedTensor(codes, scales, None, None, 8, 16, 4, 4, "bfloat16")
  low = leaves.LowRank(jnp.ones((16, 1)), jnp.ones((1, 8)), 0.5)
  return m.update(
    {
      "layers/0/mlp/up/kernel": quantized,
      "layers/1/mlp/up/kernel": leaves.Sum((quantized, jnp.ones((8, 16)))),
      "layers/1/mlp/down/kernel": low,
    }
  ).replace(lineage=(lineage.Record("a.b()", arguments={"x": [1, 2]}),))


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(x, y)


def test_model_round_trip(tmp_path):
  m = make()
  orbax.save(m, tmp_path / "out")
  back = orbax.restore(tmp_path / "out")
  assert back.spec == m.spec and back.spec.extra == m.spec.extra and back.lineage == m.lineage
  same(back.params, m.params)
  assert back.leaf("layers/0/mlp/up/kernel").store == "bfloat16"


def test_model_output_is_not_overwritten_by_accident(tmp_path):
  m = make()
  orbax.save(m, tmp_path / "out")
  with pytest.raises(ValueError, match="out exists and holds"):
    orbax.save(m, tmp_path / "out")
  orbax.save(m.replace(lineage=()), tmp_path / "out", overwrite=True)
  assert orbax.restore(tmp_path / "out").lineage == ()
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_restores_to_the_shardings_of_like(tmp_path):
  m = make()
  orbax.save(m, tmp_path / "out")
  mesh = jax.make_mesh((1,), ("data",))
  wanted = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=wanted), m.params)
  back = orbax.restore(tmp_path / "out", like=like)
  same(back.params, m.params)
  assert {x.sharding for x in jax.tree.leaves(back.params)} == {wanted}


@pytest.mark.parametrize("data", [None, {"epoch": 1, "seen": [2, 3]}, b"\x00state\xff"])
def test_training_state(tmp_path, data):
  m = make()
  weights = {"w": jnp.arange(3.0)}
  optimizer = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
  opt_state = (optimizer.init(weights), jax.random.key(5), np.int32(4))
  with orbax.Keeper(tmp_path / "run", keep=2) as keeper:
    assert keeper.latest() is None
    for step in (10, 20, 30):
      keeper.save(orbax.State(step, m.params, opt_state, data))
    assert keeper.latest() == 30
  like = jax.eval_shape(lambda: (optimizer.init(weights), jax.random.key(0), jnp.int32(0)))
  with orbax.Keeper(tmp_path / "run") as keeper:
    state = keeper.restore(like)
    assert (state.step, state.data) == (30, data)
    same(state.params, m.params)
    same(state.opt_state, jax.tree.map(jnp.asarray, opt_state))
    assert keeper.restore(like, step=20).step == 20
    with pytest.raises(ValueError, match="no checkpoint of step 10; there are: 20, 30"):
      keeper.restore(like, step=10)
    with pytest.raises(ValueError, match=r"optimizer state has \d+ arrays, the one given 1; use"):
      keeper.restore({"mu": jnp.zeros(3)})
    wrong = jax.tree.map(lambda x: jax.ShapeDtypeStruct((7,), jnp.float32), like)
    with pytest.raises(ValueError, match=r"opt_state/00000 has shape \(\), the optimizer .*\(7,\)"):
      keeper.restore(wrong)


def test_what_is_no_checkpoint(tmp_path):
  with pytest.raises(ValueError, match="nowhere: not an orbax checkpoint of treesurgeon"):
    orbax.restore(tmp_path / "nowhere")
  (tmp_path / "some").mkdir()
  with pytest.raises(ValueError, match="some: not an orbax checkpoint of treesurgeon"):
    orbax.restore(tmp_path / "some")
  with orbax.Keeper(tmp_path / "run") as keeper:
    with pytest.raises(ValueError, match="no checkpoint of step None; there are: none"):
      keeper.restore()
    keeper.save(orbax.State(1, {"w": jnp.ones(2)}))
  with pytest.raises(ValueError, match="a training state, not a model"):
    orbax.restore(tmp_path / "run" / "1")
  with pytest.raises(ValueError, match="keep=0 must be at least 1"):
    orbax.Keeper(tmp_path, keep=0)
