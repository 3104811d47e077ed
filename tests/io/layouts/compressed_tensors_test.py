# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors directories: bytes as specified, codes back bit for bit, clear refusals."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from treesurgeon import io
from treesurgeon.core import leaves, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.io import export
from treesurgeon.io import safetensors as ours
from treesurgeon.models import hf

CT = "compressed-tensors"
LLAMA = {
  "model_type": "llama", "vocab_size": 20, "hidden_size": 64, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
  "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
NEOX = {
  "model_type": "gpt_neox", "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1,
  "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 32, "n_layer": 1, "n_head": 2}
UP = "layers/0/mlp/up/kernel"
NAME = "model.layers.0.mlp.up_proj"


def pack(codes, bits):
  """Packs codes down the rows, by the definition of a little-endian bitstream."""
  single = (codes[:, None] >> np.arange(bits)[:, None]) & 1
  return jnp.asarray(np.packbits(single.reshape(-1, codes.shape[1]), axis=0, bitorder="little"))


def leaf(rng, rows, cols, *, bits=4, group=32, symmetric=True, format="int", scales="float32"):
  """Draws a quantized leaf; `group` is (rows, columns) of a tile or rows."""
  down, across = group if isinstance(group, tuple) else (group, 1)
  down, across = min(down, rows), min(across, cols)
  codes = rng.integers(0, 2**bits, (rows, cols)).astype(np.uint8)
  if format == "e4m3fn":
    codes[codes % 128 == 127] = 0
  shape = (-(-rows // down), -(-cols // across))
  scale = (2.0 ** rng.integers(-6, 1, shape)).astype(np.float32)
  if scales == "e4m3fn":
    inner = rng.integers(1, 127, shape).astype(np.uint8)
    scale = leaves.QuantizedTensor(
      inner, np.full((1, 1), 0.25, np.float32), None, None, rows=shape[0], cols=shape[1], bits=8,
      group_size=shape[0], format="e4m3fn", group_cols=shape[1],
    )  # fmt: skip
  elif scales == "float32":
    scale = scale * rng.uniform(1, 2, shape).astype(np.float32)
  else:
    scale = scale.astype(jnp.dtype(scales))
  zeros = None if symmetric else jnp.asarray(rng.integers(0, 2**bits, shape).astype(np.uint8))
  return leaves.QuantizedTensor(
    pack(codes, bits), jax.tree.map(jnp.asarray, scale), zeros, None, rows=rows, cols=cols,
    bits=bits, group_size=down, format=format, group_cols=across,
  )  # fmt: skip


def make(config=LLAMA, select=r"layers/.*kernel", wrap=lambda x: x, **form):
  """Makes a model whose selected kernels are quantized."""
  spec, rng, flat = hf.from_config(config), np.random.default_rng(0), {}
  for address in [a for entry in hf.entries(spec) for a in entry.address]:
    shape = hf.address_shape(spec, address)
    dense = rng.standard_normal(shape).astype(np.float32)
    quantized = re.fullmatch(select, address)
    flat[address] = wrap(leaf(rng, *shape, **form)) if quantized else jnp.asarray(dense)
  return model_lib.Model(spec, paths.unflatten(flat))


def written(m, tmp_path, **more):
  report = export.to_layout(m, tmp_path / "out", layout=CT, **more)
  tensors = dict(ours.open_folder(tmp_path / "out"))  # the peer's numpy has no 8-bit floats
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  return report, tensors, config["quantization_config"]


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def check_targets(spec, config, wide):
  """Holds that each layer that is not ignored has one group, those of `wide` one of 8 bits."""
  every = [e.name.removesuffix(".weight") for e in hf.entries(spec) if e.kind == "transpose"]
  found = {}
  for group in config["config_groups"].values():
    for name in every:
      if any(re.match(t.removeprefix("re:"), name) for t in group["targets"]):
        assert name not in found
        found[name] = group["weights"]["num_bits"]
  assert {n for n, b in found.items() if b == 8} == wide
  assert set(found) == set(every) - set(config["ignore"])


def bits_of(words, bits, count):
  """Reads codes off a row of words, by the definition of a little-endian bitstream."""
  stream = int.from_bytes(np.ascontiguousarray(words, "<i4").tobytes(), "little")
  return [(stream >> (i * bits)) & (2**bits - 1) for i in range(count)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_tensors_are_as_specified(tmp_path, bits, symmetric):
  m = make(bits=bits, symmetric=symmetric, select=UP)
  _, tensors, config = written(m, tmp_path)
  q = m.leaf(UP)
  packed = tensors[f"{NAME}.weight_packed"]
  assert packed.dtype == np.int32 and packed.shape == (96, 64 * bits // 32)
  codes = np.array([bits_of(row, bits, 64) for row in packed])
  scales = tensors[f"{NAME}.weight_scale"]
  assert scales.shape == (96, 2)
  zeros = 2 ** (bits - 1)
  if not symmetric:
    columns = tensors[f"{NAME}.weight_zero_point"].T
    assert columns.shape == (2, 96 * bits // 32)
    zeros = np.repeat(np.array([bits_of(c, bits, 96) for c in columns]).T, 32, 1)
  weight = (codes - zeros).astype(np.float32) * np.repeat(scales, 32, 1)
  np.testing.assert_array_equal(weight.T, q.dense())
  assert tensors[f"{NAME}.weight_shape"].tolist() == [96, 64]
  assert f"{NAME}.weight" not in tensors and (f"{NAME}.weight_zero_point" in tensors) != symmetric
  group = config["config_groups"]["group_0"]
  assert group["weights"]["num_bits"] == bits and group["weights"]["symmetric"] == symmetric
  assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("group", 32)


FORMS = {
  "w4": {"bits": 4},
  "w3_channel": {"bits": 3, "group": 1 << 20},
  "w8_asymmetric": {"bits": 8, "symmetric": False},
  "w6_bf16": {"bits": 6, "scales": "bfloat16"},
  "fp8_channel": {"bits": 8, "format": "e4m3fn", "group": 1 << 20},
  "fp8_block": {"bits": 8, "format": "e4m3fn", "group": (32, 48)},
  "fp8_tensor": {"bits": 8, "format": "e4m3fn", "group": (1 << 20, 1 << 20)},
  "mxfp8": {"bits": 8, "format": "e4m3fn", "scales": "float8_e8m0fnu"},
  "mxfp4": {"bits": 4, "format": "e2m1", "scales": "float8_e8m0fnu"},
  "nvfp4": {"bits": 4, "format": "e2m1", "group": 16, "scales": "e4m3fn"},
}


@pytest.mark.parametrize(
  ("config", "router", "kept"),
  [
    ({"model_type": "mixtral", "num_local_experts": 3}, "block_sparse_moe.gate", "w2"),
    (
      {"model_type": "qwen3_moe", "num_experts": 3, "moe_intermediate_size": 32},
      "mlp.gate",
      "down_proj",
    ),
  ],
)
def test_experts_are_layers_like_others_and_routers_stay(tmp_path, config, router, kept):
  config = {**LLAMA, "num_experts_per_tok": 2, **config}
  m = make(config, select=step.BLOCK_KERNELS, bits=4)
  report, tensors, written_config = written(m, tmp_path)
  assert written_config["ignore"] == [f"model.layers.{i}.{router}" for i in (0, 1)] + ["lm_head"]
  assert report.layers == 2 * (4 + 3 * 3)
  at = router.removesuffix("gate")
  assert f"model.layers.1.{at}experts.2.{kept}.weight_packed" in tensors
  again = io.load(tmp_path / "out")
  assert again.spec == m.spec
  same(again.params, m.params)
  assert not report.notes
  # An expert of one layer differs: its number in the layer above means another.
  odd = f"layers/1/{m.spec.feed_forwards()[2]}/down/kernel"
  m = m.update({odd: leaf(np.random.default_rng(1), *m.leaf(odd).shape, bits=8)})
  export.to_layout(m, tmp_path / "mixed", layout=CT)
  same(io.load(tmp_path / "mixed").params, m.params)
  config = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
  (name,) = (e.name for e in hf.entries(m.spec) if e.address == (odd,))
  check_targets(m.spec, config, {name.removesuffix(".weight")})
  (note,) = export.to_layout(m, tmp_path / "mixed", layout=CT, overwrite=True).notes
  assert note.startswith("transformers 5.23 takes one scheme for all experts")


@pytest.mark.parametrize("name", FORMS)
def test_leaves_come_back_bit_for_bit(tmp_path, name):
  m = make(**FORMS[name])
  report, _, config = written(m, tmp_path)
  same(io.load(tmp_path / "out").params, m.params)
  assert config["ignore"] == ["lm_head"]
  assert len(config["config_groups"]) == 1
  assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
  held = [m.leaf(a) for a in m.addresses() if leaves.is_leaf(m.leaf(a))]
  assert report.layers == len(held) == 14
  small = 16 + 4  # weight_shape, global scale
  assert 0 <= report.layer_nbytes - sum(x.nbytes for x in held) <= small * report.layers
  assert report.bits * report.size == 8 * report.nbytes
  assert report.layer_size == sum(x.size for x in held)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("form", ["int", "e4m3fn"])
def test_quantized_inputs_come_back(tmp_path, form, static):
  scale = jnp.full((1, 1), 0.5) if static else None
  per = "tensor" if static else "token"
  wrap = lambda q: leaves.ActivationQuantized(q, scale, format=form, per=per)
  m = make(bits=8, group=1 << 20, format=form, wrap=wrap)
  _, tensors, config = written(m, tmp_path)
  same(io.load(tmp_path / "out").params, m.params)
  group = config["config_groups"]["group_0"]
  assert group["input_activations"]["dynamic"] == (not static)
  assert config["format"] == {"int": "int-quantized", "e4m3fn": "float-quantized"}[form]
  if form == "int":
    q, theirs = m.leaf(UP).weight, tensors[f"{NAME}.weight"]
    assert theirs.dtype == np.int8
    np.testing.assert_array_equal(theirs.T, q.integers().astype(np.int16) - 128)


def test_floats_are_as_specified(tmp_path):
  m = make(select=UP, **FORMS["nvfp4"])
  _, tensors, _ = written(m, tmp_path)
  half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
  values = np.concatenate([half, -half])
  packed = tensors[f"{NAME}.weight_packed"]
  assert packed.dtype == np.uint8 and packed.shape == (96, 32)
  codes = np.stack([packed & 15, packed >> 4], -1).reshape(96, 64)
  scales = tensors[f"{NAME}.weight_scale"].astype(np.float64)
  weight = values[codes] * np.repeat(scales, 16, 1) / tensors[f"{NAME}.weight_global_scale"]
  np.testing.assert_allclose(weight.T, m.leaf(UP).dense(), rtol=1e-6)


def test_fused_layers(tmp_path):
  """GPT-NeoX keeps q, k and v in one layer, head by head."""
  m = make(NEOX, symmetric=False)
  _, tensors, _ = written(m, tmp_path)
  name = "gpt_neox.layers.0.attention.query_key_value"
  codes = np.array([bits_of(row, 4, 32) for row in tensors[f"{name}.weight_packed"]])
  q = m.leaf("layers/0/attn/q/kernel").integers()
  np.testing.assert_array_equal(codes[np.r_[0:16, 48:64]].T, q)
  same(io.load(tmp_path / "out").params, m.params)
  odd = leaf(np.random.default_rng(1), 32, 32, bits=3)
  with pytest.raises(ValueError, match="3-bit.*but both are part of.*query_key_value; compress"):
    export.to_layout(m.update({"layers/0/attn/v/kernel": odd}), tmp_path / "x", layout=CT)


def test_mixed_widths_have_targets_of_their_own(tmp_path):
  m = make(bits=4)
  rng = np.random.default_rng(1)
  wide = ["layers/1/mlp/down/kernel", "layers/0/mlp/up/kernel", "lm_head/kernel"]
  spec = m.spec
  m = m.update({a: leaf(rng, *hf.address_shape(spec, a), bits=8) for a in wide})
  dense = "layers/1/attn/k/kernel"
  m = m.update({dense: jnp.ones(hf.address_shape(spec, dense))})
  report, _, config = written(m, tmp_path)
  assert config["ignore"] == ["model.layers.1.self_attn.k_proj"]
  names = {"model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj", "lm_head"}
  check_targets(spec, config, names)
  assert "vLLM runs gate_proj, up_proj as one" in " ".join(report.notes)
  same(io.load(tmp_path / "out").params, m.params)


def test_tied_heads_are_ignored(tmp_path):
  m = make(LLAMA | {"tie_word_embeddings": True})
  _, tensors, config = written(m, tmp_path)
  assert config["ignore"] == ["lm_head"] and "lm_head.weight" not in tensors


def test_a_directory_is_streamed_into_shards(tmp_path):
  m = make()
  io.save(m, tmp_path / "ours")
  source = io.Checkpoint(tmp_path / "ours")
  for name in ("a", "b"):
    export.to_layout(source, tmp_path / name, layout=CT, max_shard_bytes=9000)
  same(io.load(tmp_path / "a").params, m.params)
  files = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
  assert len(files) > 3
  for name in files:
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
  # What was read of another tool is written our way like any compressed leaf.
  io.save(io.load(tmp_path / "a"), tmp_path / "again")
  same(io.load(tmp_path / "again").params, m.params)
  assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()


def test_sparse_leaves_are_written_with_their_zeros(tmp_path):
  m = make(select=r"layers/.*attn/.*kernel")
  values = jnp.arange(32.0 * 96).reshape(32, 96)
  place = jnp.zeros((4, 96), jnp.uint8)
  m = m.update({UP: leaves.SparseTensor(values, place, rows=64, cols=96, n=1, m=2)})
  _, tensors, config = written(m, tmp_path)
  np.testing.assert_array_equal(tensors[f"{NAME}.weight"].T, m.leaf(UP).dense())
  assert NAME in config["ignore"]


REFUSED = {
  "ragged": (lambda q: leaf(np.random.default_rng(0), 64, 96, group=24), "24 x 1 of 64 x 96"),
  "ordered": (
    lambda q: dataclasses.replace(q, group_index=jnp.zeros((1, 64), jnp.int32)),
    "rows in any order: .*no order of rows any more; use --format=gptq",
  ),
  "sum": (lambda q: leaves.Sum((q, q)), "a sum of 4-bit int .* plus .*--format=hf writes it dense"),
  "zeros": (
    lambda q: dataclasses.replace(q, zeros=jnp.zeros((2, 96), jnp.float32)), "asymmetric, a scale",
  ),
  "table": (
    lambda q: dataclasses.replace(q, format="nf"), "4-bit nf codes.*compressed-tensors holds",
  ),
  "fp4": (
    lambda q: leaf(np.random.default_rng(0), 64, 96, format="e2m1"),
    "4-bit e2m1 .*16 rows with e4m3fn scales",
  ),
  "inputs": (
    lambda q: leaves.ActivationQuantized(q, None), "with 8-bit int inputs, dynamic per token",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, name):
  change, message = REFUSED[name]
  m = make()
  m = m.update({UP: change(m.leaf(UP))})
  with pytest.raises(ValueError, match=f"^{UP} is .*{message}"):
    export.to_layout(m, tmp_path / "out", layout=CT)
  assert not list(tmp_path.iterdir())


def test_models_that_no_layout_holds(tmp_path):
  with pytest.raises(ValueError, match="no layer of the model is quantized; apply compress"):
    export.to_layout(make(select="none"), tmp_path / "out", layout=CT)
  with pytest.raises(ValueError, match="attn/q/kernel .*a Conv1D.*--format=gptq holds it"):
    export.to_layout(make(GPT2), tmp_path / "out", layout=CT)
  m = make()
  table = leaf(np.random.default_rng(0), 20, 64, group=20)
  with pytest.raises(ValueError, match="^embed/tokens/embedding is .* linear layers only"):
    export.to_layout(m.update({"embed/tokens/embedding": table}), tmp_path / "out", layout=CT)


def edit(root, change, settings=None):
  file = root / "model.safetensors"
  held = safetensors.numpy.load_file(file)
  change(held)
  safetensors.numpy.save_file(held, file)
  config = json.loads((root / "config.json").read_text())
  (settings or (lambda c: None))(config["quantization_config"])
  (root / "config.json").write_text(json.dumps(config))


def test_older_files_are_read(tmp_path):
  """3-bit codes padded to ten a word, and the order of rows, both gone since 2026."""
  m = make(bits=3, select=UP)
  written(m, tmp_path)
  codes = np.asarray(m.leaf(UP).integers()).astype(np.uint32)
  words = np.zeros((96, 7), np.uint32)
  for i in range(64):
    words[:, i // 10] |= codes[i] << (i % 10 * 3)
  order = np.tile(np.arange(2, dtype=np.int32), 32)
  new = {f"{NAME}.weight_packed": words.view(np.int32), f"{NAME}.weight_g_idx": order}
  edit(tmp_path / "out", lambda t: t.update(new))
  found = io.load(tmp_path / "out").leaf(UP)
  np.testing.assert_array_equal(found.integers(), codes)
  np.testing.assert_array_equal(found.group_index[0], order)


DAMAGE = {
  "shape": (
    lambda t: t.update({f"{NAME}.weight_scale": np.ones((96, 3), np.float32)}), None,
    "up_proj: .*weight_scale float32 .96, 3.* do not fit 4-bit int codes with a scale for each",
  ),
  "missing": (lambda t: t.pop(f"{NAME}.weight_packed"), None, "are of no known format"),
  "lost": (
    lambda t: [t.pop(f"{NAME}.{p}") for p in ("weight_packed", "weight_scale", "weight_shape")],
    None, "1 missing: model.layers.0.mlp.up_proj.weight",
  ),
  "groups": (lambda t: None, lambda c: c.update(config_groups={}), "has no config_groups"),
  "target": (
    lambda t: None, lambda c: c["config_groups"]["group_0"].update(targets=["re:x"]),
    "no config group .* has the layer",
  ),
  "zero": (
    lambda t: None, lambda c: c["config_groups"]["group_0"]["weights"].update(symmetric=False),
    "asymmetric, but has no weight_zero_point",
  ),
  "cache": (
    lambda t: None, lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "has a kv_cache_scheme",
  ),
  "inputs": (
    lambda t: None,
    lambda c: c["config_groups"]["group_0"].update(
      input_activations={"num_bits": 4, "type": "float", "strategy": "tensor_group"}
    ),
    "input_activations .* are not supported; 8 bits",
  ),
  "method": (lambda t: None, lambda c: c.update(quant_method="hqq"), "quant_method 'hqq' is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_directories_that_do_not_fit(tmp_path, name):
  written(make(select=UP), tmp_path)
  change, settings, message = DAMAGE[name]
  edit(tmp_path / "out", change, settings)
  with pytest.raises(ValueError, match=message):
    io.load(tmp_path / "out")


def test_quantized_scales_of_integers_are_written_in_full(tmp_path):
  m = make(select=UP, group=16, scales="e4m3fn")
  _, tensors, _ = written(m, tmp_path)
  scales = leaves.dense(m.leaf(UP).scales)
  np.testing.assert_array_equal(tensors[f"{NAME}.weight_scale"].T, scales)


def test_shared_exponents_are_bytes(tmp_path):
  m = make(select=UP, **FORMS["mxfp4"])
  _, tensors, config = written(m, tmp_path)
  stored = tensors[f"{NAME}.weight_scale"]
  assert stored.dtype == np.uint8
  scales = np.asarray(m.leaf(UP).scales).astype(ml_dtypes.float8_e8m0fnu).astype(np.float64)
  np.testing.assert_array_equal(2.0 ** (stored.astype(np.float64).T - 127), scales)
  weights = config["config_groups"]["group_0"]["weights"]
  assert weights["scale_dtype"] == "torch.uint8" and weights["strategy"] == "group"
