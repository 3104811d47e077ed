# SPDX-License-Identifier: Apache-2.0
"""Every format on disk: what `inspect` counts is what the file holds, and it comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import io, models, registry
from treesurgeon.core import leaves, model, paths
from treesurgeon.io import checkpoint
from treesurgeon.run import describe, drivers

SPEC = models.Spec(vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_ff=24, family="llama")
FORMATS = {
  "rtn(bits=3, group_size=8)": "int3 g8",
  "rtn(bits=5, group_size=7, symmetric=False)": "int5 g7 asym",
  "rtn(bits=8, group_size=-1)": "int8 column",
  "rtn(bits=8, group_size=-1, group_cols=-1)": "int8 tensor",
  "rtn(bits=4, group_size=1, group_cols=-1)": "int4 row",
  "rtn(bits=4, group_size=8, group_cols=8)": "int4 8x8",
  "rtn(bits=8, format='e4m3fn', group_size=-1)": "e4m3fn column",
  "rtn(bits=4, format='e2m1', group_size=8, scale_dtype='float8_e8m0fnu')": "e2m1 g8",
  "rtn(bits=4, format='e2m1', group_size=8, scale_dtype='e4m3fn')": "e2m1 g8 / e4m3fn tensor",
  "rtn(bits=4, format='nf', group_size=8, scale_dtype='int8')": "nf4 g8 / int8",
  "rtn(bits=2, format='ternary', group_size=-1)": "ternary column",
  "rtn(bits=1, format='sign', group_size=8)": "sign g8",
  "rtn(bits=3, format='shift', group_size=8)": "shift g8",
}


@pytest.fixture(scope="module")
def dense():
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16)
  return model.Model(SPEC, jax.tree.map(draw, shapes))


# The others differ in what the unit tests of grids and leaves hold.
QUICK = [c for c in FORMATS if "e4m3fn'" in c and "e2m1" in c or "ternary" in c or "bits=5" in c]


@pytest.mark.parametrize(
  "call", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in FORMATS]
)
def test_what_is_counted_is_on_disk_and_comes_back(call, dense, tmp_path):
  small = drivers.run(registry.parse(f"compress.quantize.{call}"), dense)
  io.save(small, tmp_path / "out")
  source = checkpoint.Checkpoint(tmp_path / "out")
  held = sum(i.stop - i.start for i in (source.tensors.info(n) for n in source.tensors))
  rows = describe.rows(paths.unflatten({a: source.struct(a) for a in source.addresses()}))
  assert describe.total(rows)[1] == held == small.nbytes()
  kinds = {r.kind for r in rows if r.address.endswith("mlp/up/kernel")}
  assert all(k.startswith(FORMATS[call]) for k in kinds), kinds
  again = io.load(tmp_path / "out")
  for address in small.addresses():
    old, new = small.leaf(address), again.leaf(address)
    assert jax.tree.structure(old) == jax.tree.structure(new), address
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
      assert (np.asarray(a).dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())


def test_a_model_in_any_format_runs_as_its_dense_value_does(dense):
  tokens = jnp.arange(8)[None]
  full = dense.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), dense.params))
  for call in ("rtn(bits=4, format='nf', group_size=8, scale_dtype='int8')", "rtn(bits=8)"):
    small = drivers.run(registry.parse(f"compress.quantize.{call}"), full)
    wide = leaves.map_leaves(leaves.dense, small.params)
    got, want = (models.forward(SPEC, p, tokens).logits for p in (small.params, wide))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
