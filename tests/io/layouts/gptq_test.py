# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ directories: bytes as specified, codes back bit for bit, clear refusals."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from treesurgeon import io
from treesurgeon.core import leaves, paths
from treesurgeon.core import model as model_lib
from treesurgeon.io import export
from treesurgeon.models import hf

LLAMA = {
  "model_type": "llama", "vocab_size": 20, "hidden_size": 64, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
  "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 32, "n_layer": 1, "n_head": 2}
NEOX = {
  "model_type": "gpt_neox", "vocab_size": 20, "hidden_size": 64, "num_hidden_layers": 1,
  "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
UP = "layers/0/mlp/up/kernel"
NAME = "model.layers.0.mlp.up_proj"


def pack(codes, bits):
  """Packs codes down the rows, by the definition of a little-endian bitstream."""
  single = (codes[:, None] >> np.arange(bits)[:, None]) & 1
  return jnp.asarray(np.packbits(single.reshape(-1, codes.shape[1]), axis=0, bitorder="little"))


def leaf(rng, rows, cols, *, bits=4, group=32, symmetric=True, order=False, store="float32"):
  group = min(group, rows)
  shape = (-(-rows // group), cols)
  codes = rng.integers(0, 2**bits, (rows, cols)).astype(np.uint8)
  scales = jnp.asarray(rng.uniform(0.01, 0.1, shape).astype(np.float16))
  zeros = None if symmetric else jnp.asarray(rng.integers(1, 2**bits, shape).astype(np.uint8))
  index = np.random.default_rng(rows).permutation(rows).astype(np.int32)[None] // group
  return leaves.QuantizedTensor(
    pack(codes, bits), scales, zeros, jnp.asarray(index) if order else None, rows=rows, cols=cols,
    bits=bits, group_size=group, store=store,
  )  # fmt: skip


def make(config=LLAMA, select=r"layers/.*kernel", **form):
  spec, rng, flat = hf.from_config(config), np.random.default_rng(0), {}
  for address in [a for entry in hf.entries(spec) for a in entry.address]:
    shape = hf.address_shape(spec, address)
    quantized = re.fullmatch(select, address)
    dense = rng.standard_normal(shape).astype(np.float32)
    flat[address] = leaf(rng, *shape, **form) if quantized else dense
  return model_lib.Model(spec, paths.unflatten(flat))


def written(m, tmp_path, layout):
  report = export.to_layout(m, tmp_path / "out", layout=layout)
  tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  return report, tensors, config["quantization_config"]


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def bits_of(words, bits, count):
  """Reads codes off a row of words, by the definition of a little-endian bitstream."""
  stream = int.from_bytes(np.ascontiguousarray(words, "<i4").tobytes(), "little")
  return [(stream >> (i * bits)) & (2**bits - 1) for i in range(count)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_tensors_are_as_specified(tmp_path, bits, layout):
  symmetric = layout == "gptq"
  m = make(bits=bits, symmetric=symmetric, order=not symmetric)
  _, tensors, config = written(m, tmp_path, layout)
  q = m.leaf(UP)
  packed = tensors[f"{NAME}.qweight"]
  assert packed.dtype == np.int32 and packed.shape == (64 * bits // 32, 96)
  codes = np.array([bits_of(column, bits, 64) for column in packed.T]).T
  zeros = np.array([bits_of(row, bits, 96) for row in tensors[f"{NAME}.qzeros"]])
  assert zeros.shape == (2, 96)
  if layout == "gptq":  # stored less one
    assert (zeros == 2 ** (bits - 1) - 1).all()
    zeros = zeros + 1
  index, scales = tensors[f"{NAME}.g_idx"], tensors[f"{NAME}.scales"]
  assert scales.dtype == np.float16 and index.dtype == np.int32
  weight = (codes - zeros[index]).astype(np.float32) * scales[index]
  np.testing.assert_array_equal(weight, q.dense())
  assert (config["bits"], config["group_size"]) == (bits, 32)
  assert (config["sym"], config["desc_act"]) == (symmetric, not symmetric)
  assert config["checkpoint_format"] == layout
  same(io.load(tmp_path / "out").params, m.params)


def test_awq_tensors_are_as_specified(tmp_path):
  m = make(symmetric=False, select=r"layers/.*mlp.*kernel")
  _, tensors, config = written(m, tmp_path, "awq")
  q = m.leaf(UP)
  order = [0, 2, 4, 6, 1, 3, 5, 7]
  for part, want in (("qweight", np.asarray(q.integers())), ("qzeros", np.asarray(q.zeros))):
    words = tensors[f"{NAME}.{part}"].view(np.uint32)
    for nibble, place in enumerate(order):
      np.testing.assert_array_equal((words >> (4 * nibble)) & 15, want[:, place::8])
  assert config["zero_point"] and config["version"] == "gemm" and config["group_size"] == 32
  dense = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo"]
  assert config["modules_to_not_convert"] == [*dense, "lm_head"]
  same(io.load(tmp_path / "out").params, m.params)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
def test_symmetric_leaves_come_back(tmp_path, layout):
  m = make(group=1 << 20)
  _, _, config = written(m, tmp_path, layout)
  assert config["group_size"] == -1
  back = io.load(tmp_path / "out")
  if layout == "awq":  # which has zero points always
    assert (np.asarray(back.leaf(UP).zeros) == 8).all()
  else:
    same(back.params, m.params)
  np.testing.assert_array_equal(back.leaf(UP).dense(), m.leaf(UP).dense())


@pytest.mark.parametrize("config", [GPT2, NEOX])
def test_fused_layers_and_those_of_gpt2(tmp_path, config):
  m = make(config, symmetric=False, order=config is NEOX)
  _, tensors, _ = written(m, tmp_path, "gptq_v2")
  assert sum(n.endswith("qweight") for n in tensors) == 4
  same(io.load(tmp_path / "out").params, m.params)


def test_some_kinds_of_layers(tmp_path):
  m = make(select=r"layers/.*mlp/(up|gate)/kernel")
  _, _, config = written(m, tmp_path, "gptq")
  assert config["modules_in_block_to_quantize"] == [["mlp.gate_proj", "mlp.up_proj"]]
  same(io.load(tmp_path / "out").params, m.params)


def test_experts_are_layers_like_others(tmp_path):
  config = {**LLAMA, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
  m = make(config, select=r"layers/.*(attn|experts)/.*kernel")
  report = export.to_layout(m, tmp_path / "out", layout="gptq")
  assert "transformers 5.23 does not read experts of a gptq directory" in " ".join(report.notes)
  written_config = json.loads((tmp_path / "out" / "config.json").read_text())
  ((*kinds,),) = written_config["quantization_config"]["modules_in_block_to_quantize"]
  assert len(kinds) == 4 + 2 * 3 and "block_sparse_moe.experts.1.w2" in kinds
  same(io.load(tmp_path / "out").params, m.params)


def test_scales_are_rounded_to_float16(tmp_path):
  m = make(select=r"layers/.*mlp.*kernel")
  q = m.leaf(UP)
  fine = jnp.asarray(q.scales, jnp.float32) * 1.0001
  m = m.update({UP: dataclasses.replace(q, scales=fine)})
  _, tensors, _ = written(m, tmp_path, "gptq")
  np.testing.assert_array_equal(tensors[f"{NAME}.scales"], np.asarray(fine).astype(np.float16))


REFUSED = {
  "width": (lambda q: dataclasses.replace(q, bits=5), "gptq", "5-bit int codes.*2, 3, 4 or 8 bits"),
  "awq_width": (
    lambda q: leaf(np.random.default_rng(0), 64, 96, bits=3), "awq", "AWQ holds integers of 4 bits",
  ),
  "ragged": (
    lambda q: leaf(np.random.default_rng(0), 64, 96, group=24), "gptq", "24 x 1 of 64 x 96",
  ),
  "ordered": (
    lambda q: leaf(np.random.default_rng(0), 64, 96, order=True), "awq",
    "AWQ has no place for an order of inputs; --format=gptq has",
  ),
  "format": (lambda q: dataclasses.replace(q, format="nf"), "gptq", "4-bit nf codes"),
  "inputs": (lambda q: leaves.ActivationQuantized(q, None), "gptq", "with 8-bit int inputs"),
  "zeros": (
    lambda q: dataclasses.replace(q, zeros=jnp.zeros((2, 96))), "gptq",
    "zero points must be whole numbers",
  ),
  "mixed": (
    lambda q: leaf(np.random.default_rng(0), 64, 96, bits=8), "gptq", "has one width; --format=c",
  ),
  "groups": (
    lambda q: leaf(np.random.default_rng(0), 64, 96, group=16), "gptq_v2", "one group size, here",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, name):
  change, layout, message = REFUSED[name]
  m = make()
  m = m.update({UP: change(m.leaf(UP))})
  with pytest.raises(ValueError, match=message):
    export.to_layout(m, tmp_path / "out", layout=layout)
  assert not list(tmp_path.iterdir())


def test_odd_shapes_single_layers_and_the_head(tmp_path):
  with pytest.raises(ValueError, match=r"^layers/0/mlp/gate/kernel is .* multiples of 32"):
    export.to_layout(make(LLAMA | {"intermediate_size": 80}), tmp_path / "out", layout="gptq")
  with pytest.raises(ValueError, match="mlp.up_proj is compressed in some layers and dense in oth"):
    export.to_layout(make(select=UP), tmp_path / "out", layout="gptq")
  with pytest.raises(ValueError, match="^lm_head/kernel is .*leave the head dense"):
    export.to_layout(
      make(LLAMA | {"vocab_size": 32}, select=".*kernel"), tmp_path / "out", layout="awq"
    )


def test_values_that_do_not_fit_leave_nothing(tmp_path):
  m = make(select=r"layers/.*mlp.*kernel")
  q = m.leaf(UP)
  zeros = dataclasses.replace(q, zeros=jnp.zeros((2, 96), jnp.uint8))
  with pytest.raises(ValueError, match="up_proj is .*zero points of 0.*use --format=gptq_v2"):
    export.to_layout(m.update({UP: zeros}), tmp_path / "out", layout="gptq")
  large = dataclasses.replace(q, scales=jnp.full((2, 96), 1e6, jnp.float32))
  with pytest.raises(ValueError, match="scales are beyond float16, which awq stores"):
    export.to_layout(m.update({UP: large}), tmp_path / "out", layout="awq")
  assert not list(tmp_path.iterdir())


DAMAGE = {
  "shape": (
    {f"{NAME}.qzeros": np.zeros((3, 12), np.int32)}, {},
    "up_proj: .*qzeros int32 .3, 12.* do not fit 4 bits in groups of 32 of 64 inputs",
  ),
  "bits": ({}, {"bits": 3}, "do not fit 3 bits"),
  "version": ({}, {"checkpoint_format": "marlin"}, "version 'marlin' is not supported"),
  "zeros": (
    {f"{NAME}.qzeros": np.zeros((2, 12), np.int32)}, {}, "sym is true, but its zero points are not",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_directories_that_do_not_fit(tmp_path, name):
  written(make(select=r"layers/.*mlp.*kernel"), tmp_path, "gptq")
  change, settings, message = DAMAGE[name]
  root = tmp_path / "out"
  tensors = safetensors.numpy.load_file(root / "model.safetensors")
  safetensors.numpy.save_file(tensors | change, root / "model.safetensors")
  config = json.loads((root / "config.json").read_text())
  config["quantization_config"] |= settings
  (root / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message):
    io.load(root)


def test_settings_of_single_layers_are_read(tmp_path):
  """GPTQModel's `dynamic` gives layers other widths."""
  m = make(symmetric=False, bits=8, select=r"layers/1/.*kernel")
  wide = make(symmetric=False, select=r"layers/.*kernel")
  export.to_layout(make(symmetric=False, bits=8), tmp_path / "eight", layout="gptq_v2")
  export.to_layout(wide, tmp_path / "out", layout="gptq_v2")
  eight = safetensors.numpy.load_file(tmp_path / "eight" / "model.safetensors")
  four = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  mixed = {k: v for k, v in four.items() if ".layers.1." not in k}
  mixed |= {k: v for k, v in eight.items() if ".layers.1." in k}
  safetensors.numpy.save_file(mixed, tmp_path / "out" / "model.safetensors")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  config["quantization_config"]["dynamic"] = {r"+:.*\.1\..*": {"bits": 8}}
  (tmp_path / "out" / "config.json").write_text(json.dumps(config))
  found = io.Checkpoint(tmp_path / "out")
  assert [found.leaf(f"layers/{i}/mlp/up/kernel").bits for i in range(2)] == [4, 8]
  assert m.leaf("layers/1/mlp/up/kernel").bits == 8
