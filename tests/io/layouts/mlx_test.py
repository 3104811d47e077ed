# SPDX-License-Identifier: Apache-2.0
"""MLX directories: bytes as specified, codes back bit for bit, clear refusals.

What MLX and mlx-lm make of such directories is in `tests/peers/mlx_test.py`.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from treesurgeon import io
from treesurgeon.core import leaves, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.io import export
from treesurgeon.models import hf

LLAMA = {
  "model_type": "llama", "vocab_size": 20, "hidden_size": 64, "num_hidden_layers": 1,
  "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
  "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 32, "n_layer": 1, "n_head": 2}
UP, NAME = "layers/0/mlp/up/kernel", "model.layers.0.mlp.up_proj"


def pack(codes, bits):
  """Packs codes down the rows, by the definition of a little-endian bitstream."""
  single = (codes[:, None] >> np.arange(bits)[:, None]) & 1
  return np.packbits(single.reshape(-1, codes.shape[1]), axis=0, bitorder="little")


def leaf(rng, rows, cols, *, bits=4, group=32, zeros="none", dtype=jnp.float32):
  group = min(group, rows)
  shape = (-(-rows // group), cols)
  codes = rng.integers(0, 2**bits, (rows, cols)).astype(np.uint8)
  scales = jnp.asarray(rng.uniform(0.01, 0.1, shape), dtype)
  points = {
    "none": None, "whole": jnp.asarray(rng.integers(0, 2**bits, shape).astype(np.uint8)),
    "float": jnp.asarray(rng.uniform(-3, 9, shape).astype(np.float32)),
  }[zeros]  # fmt: skip
  return leaves.QuantizedTensor(
    jnp.asarray(pack(codes, bits)), scales, points, None, rows=rows, cols=cols, bits=bits,
    group_size=group,
  )  # fmt: skip


def make(config=LLAMA, select=r"layers/.*kernel", **form):
  spec, rng, flat = hf.from_config(config), np.random.default_rng(0), {}
  for address in [a for entry in hf.entries(spec) for a in entry.address]:
    shape = hf.address_shape(spec, address)
    quantized = re.fullmatch(select, address)
    dense = rng.standard_normal(shape).astype(np.float32)
    flat[address] = leaf(rng, *shape, **form) if quantized else dense
  return model_lib.Model(spec, paths.unflatten(flat))


def changed(m, address, value):
  flat = {a: m.leaf(a) for a in m.addresses()}
  return m.replace(params=paths.unflatten({**flat, address: value}))


def written(m, folder):
  report = export.to_layout(m, folder, layout="mlx")
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  return report, tensors, json.loads((folder / "config.json").read_text())


def weight(tensors, name, bits):
  """Computes (outputs, inputs) as MLX documents it: each row of words is a stream of codes."""
  packed = np.ascontiguousarray(tensors[f"{name}.weight"], "<u4")
  streams = [int.from_bytes(row.tobytes(), "little") for row in packed]
  count = packed.shape[1] * 32 // bits
  codes = np.array([[(s >> (i * bits)) & (2**bits - 1) for i in range(count)] for s in streams])
  scales, biases = (tensors[f"{name}.{p}"].astype(np.float64) for p in ("scales", "biases"))
  size = count // scales.shape[1]
  return np.repeat(scales, size, 1) * codes + np.repeat(biases, size, 1)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
  ("bits", "zeros"), [(4, "none"), *((bits, "whole") for bits in (2, 3, 4, 5, 6, 8))]
)
def test_tensors_are_as_specified_and_come_back(tmp_path, bits, zeros):
  m = make(bits=bits, zeros=zeros)
  report, tensors, config = written(m, tmp_path / "out")
  packed = tensors[f"{NAME}.weight"]
  assert packed.dtype == np.uint32 and packed.shape == (128, 64 * bits // 32)
  assert tensors[f"{NAME}.scales"].shape == tensors[f"{NAME}.biases"].shape == (128, 2)
  np.testing.assert_allclose(weight(tensors, NAME, bits).T, m.leaf(UP).dense(), atol=3e-6, rtol=0)
  assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
  assert config["quantization_config"] == config["quantization"]
  assert report.layer_bits == bits + 2  # scale and bias of 32 bits for 32 weights
  same(io.load(tmp_path / "out").params, m.params)


@pytest.mark.parametrize(("bits", "dtype"), [(8, jnp.float16), (4, jnp.bfloat16)])
def test_scales_of_16_bits_stay(tmp_path, bits, dtype):
  m = make(bits=bits, zeros="whole", dtype=dtype)
  report = export.to_layout(m, tmp_path / "out", layout="mlx")
  assert report.layer_bits == bits + 1 and any("rounded to 16 bits" in n for n in report.notes)
  same(io.load(tmp_path / "out").params, m.params)


def test_bfloat16_is_too_short_for_large_zero_points(tmp_path):
  m = make(bits=8, zeros="whole", dtype=jnp.bfloat16)
  report = export.to_layout(m, tmp_path / "out", layout="mlx")
  back, held = io.load(tmp_path / "out").leaf(UP), m.leaf(UP)
  assert any("bfloat16 would be too short" in n for n in report.notes)
  np.testing.assert_array_equal(back.zeros, held.zeros)
  np.testing.assert_array_equal(back.scales, np.asarray(held.scales, np.float32))


def test_zero_points_that_are_not_whole(tmp_path):
  m = make(zeros="float")
  _, tensors, _ = written(m, tmp_path / "out")
  np.testing.assert_allclose(weight(tensors, NAME, 4).T, m.leaf(UP).dense(), atol=1e-6, rtol=0)
  back = io.load(tmp_path / "out").leaf(UP)
  assert back.zeros.dtype == np.float32
  np.testing.assert_allclose(back.dense(), m.leaf(UP).dense(), atol=1e-6, rtol=0)


def test_layers_may_differ_and_groups_may_be_wide(tmp_path):
  rng = np.random.default_rng(1)
  m = changed(make(), UP, leaf(rng, 64, 128, bits=3, group=1 << 20))
  report, tensors, config = written(m, tmp_path / "out")
  assert config["quantization"][NAME] == {"group_size": 64, "bits": 3}
  assert sum(isinstance(v, dict) for v in config["quantization"].values()) == 1
  np.testing.assert_allclose(weight(tensors, NAME, 3).T, m.leaf(UP).dense(), atol=1e-6, rtol=0)
  same(io.load(tmp_path / "out").params, m.params)
  down = "layers/0/mlp/down/kernel"
  wide = leaf(rng, 128, 64)
  wide = leaves.QuantizedTensor(
    wide.codes, jnp.full((1, 1), 0.1), None, None, rows=128, cols=64, bits=4, group_size=128,
    group_cols=64,
  )  # fmt: skip
  written(changed(m, down, wide), tmp_path / "tensor")
  back = io.load(tmp_path / "tensor").leaf(down)
  assert back.scales.shape == (1, 64)
  np.testing.assert_array_equal(back.dense(), wide.dense())
  m = make({**LLAMA, "hidden_size": 256}, group=256)
  report, tensors, _ = written(m, tmp_path / "wide")
  assert tensors[f"{NAME}.scales"].shape == (128, 2)
  assert any("wider than 128" in note for note in report.notes)
  np.testing.assert_array_equal(io.load(tmp_path / "wide").leaf(UP).dense(), m.leaf(UP).dense())


def test_experts_that_mlx_reads(tmp_path):
  mixtral = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
  qwen = {"moe_intermediate_size": 64, "num_experts": 8, "model_type": "qwen3_moe"}
  m, rng = make(LLAMA | mixtral, select=step.BLOCK_KERNELS), np.random.default_rng(1)
  written(m, tmp_path / "out")
  same(io.load(tmp_path / "out").params, m.params)
  up = "layers/0/mlp/experts/1/up/kernel"
  message = "experts.1.* mlx-lm stacks experts: it reads quantized ones of Mixtral, all in the form"
  with pytest.raises(ValueError, match=message):
    written(changed(m, up, leaf(rng, *m.leaf(up).shape, bits=8)), tmp_path / "not")
  with pytest.raises(ValueError, match="experts.0.* mlx-lm stacks experts"):
    written(make(LLAMA | qwen, select=step.BLOCK_KERNELS), tmp_path / "not")


def affine(w, bits, size):
  """Quantizes (outputs, inputs) as `mx.quantize` does: the end farther from 0 is kept exactly."""
  groups = w.reshape(len(w), -1, size)
  low, high = groups.min(-1), groups.max(-1)
  scale = np.maximum((high - low) / (2**bits - 1), 1e-7)
  side = np.abs(low) > np.abs(high)
  scale, edge = np.where(side, scale, -scale), np.where(side, low, high)
  steps = np.round(edge / scale)
  scale = np.where(steps != 0, edge / np.where(steps == 0, 1, steps), scale)
  bias = np.where(steps == 0, 0, edge)
  codes = np.clip(np.round((groups - bias[..., None]) / scale[..., None]), 0, 2**bits - 1)
  codes = codes.astype(np.uint8).reshape(w.shape)
  words = np.ascontiguousarray(pack(codes.T, bits).T).view("<u4")
  return {"weight": words, "scales": scale.astype(np.float32), "biases": bias.astype(np.float32)}


@pytest.mark.parametrize(("bits", "shift"), [(4, 0), (4, 5), (3, 0)])
def test_what_mlx_quantizes_opens_embeddings_included(tmp_path, bits, shift):
  m = make()
  _, tensors, config = written(m, tmp_path / "out")
  rng, want = np.random.default_rng(2), {}
  for name, shape in {NAME: (128, 64), "model.embed_tokens": (20, 64)}.items():
    made = affine(rng.standard_normal(shape).astype(np.float32) + shift, bits, 64)
    tensors |= {f"{name}.{part}": x for part, x in made.items()}
    want[name] = weight(tensors, name, bits)
  assert (tensors[f"{NAME}.scales"] < 0).any()
  safetensors.numpy.save_file(tensors, tmp_path / "out" / "model.safetensors")
  form = {"group_size": 64, "bits": bits}
  config["quantization"] |= {NAME: form, "model.embed_tokens": form, "lm_head": False}
  del config["quantization_config"]  # as versions of two years ago
  (tmp_path / "out" / "config.json").write_text(json.dumps(config))
  back = io.load(tmp_path / "out")
  assert (back.leaf(UP).scales > 0).all()
  np.testing.assert_allclose(back.leaf(UP).dense(), want[NAME].T, atol=1e-5, rtol=0)
  table = next(a for a in back.addresses() if a.startswith("embed/"))
  np.testing.assert_allclose(back.leaf(table), want["model.embed_tokens"], atol=1e-5, rtol=0)


def test_settings_that_do_not_fit_are_refused(tmp_path):
  m = make()
  _, tensors, config = written(m, tmp_path / "out")

  def rewritten(form, **parts):
    text = json.dumps(config | {"quantization": form, "quantization_config": form})
    (tmp_path / "out" / "config.json").write_text(text)
    safetensors.numpy.save_file(tensors | parts, tmp_path / "out" / "model.safetensors")

  rewritten({"group_size": 32, "bits": 4, "mode": "mxfp4"})
  with pytest.raises(ValueError, match="MLX's mode 'mxfp4' is not supported; affine is"):
    io.load(tmp_path / "out")
  rewritten({"group_size": 64, "bits": 4})
  with pytest.raises(ValueError, match="do not fit 4 bits in groups of 64 of 64 inputs"):
    io.load(tmp_path / "out")
  scales = tensors[f"{NAME}.scales"] * np.array([0, 1], np.float32)
  rewritten({"group_size": 32, "bits": 4}, **{f"{NAME}.scales": scales})
  with pytest.raises(ValueError, match=f"{NAME}: a scale is 0 and its bias is not"):
    io.load(tmp_path / "out")


def test_leaves_that_do_not_fit_are_refused(tmp_path):
  def fails(m, message):
    with pytest.raises(ValueError, match=message):
      export.to_layout(m, tmp_path / "out", layout="mlx")
    assert not (tmp_path / "out").exists()

  m, rng = make(), np.random.default_rng(1)
  fails(make(bits=7), r"layers/0/attn/q/kernel is 7-bit int codes.* MLX holds integers of 2, 3")
  fails(changed(m, UP, leaf(rng, 64, 128, group=16)), f"{UP} is .* 32, 64 or 128 of which divide")
  ordered = leaf(rng, 64, 128)
  ordered = leaves.QuantizedTensor(
    ordered.codes, ordered.scales, None, jnp.arange(64)[None] // 32, rows=64, cols=128, bits=4,
    group_size=32,
  )  # fmt: skip
  fails(changed(m, UP, ordered), "no place for an order of inputs; --format=gptq has")
  fails(make(GPT2), "no place for a Conv1D layer")
  huge = leaf(rng, 64, 128)
  huge = leaves.QuantizedTensor(
    huge.codes, jnp.full((2, 128), 6e4, jnp.float16), None, None, rows=64, cols=128, bits=4,
    group_size=32,
  )  # fmt: skip
  fails(changed(m, UP, huge), "its zero points times its scales are beyond float16")
