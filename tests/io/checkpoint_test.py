# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as peer

from treesurgeon import io, models
from treesurgeon.core import leaves, lineage, model, packing, paths
from treesurgeon.io import packed, safetensors
from treesurgeon.models import hf

LLAMA = {
  "model_type": "llama", "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 3,
  "num_attention_heads": 2, "intermediate_size": 24, "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 16, "n_layer": 3, "n_head": 2}
NEOX = {
  "model_type": "gpt_neox", "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2,
  "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "gpt_neox": NEOX}


def make(name="llama", dtype=jnp.bfloat16, **changes):
  spec = hf.from_config(CONFIGS[name] | changes)
  return model.Model(spec, models.init(spec, jax.random.key(0), dtype))


def directory(tmp_path, name="llama", **changes):
  """Writes a directory the way other programs do, by the safetensors package."""
  m = make(name, **changes)
  root = tmp_path / name
  root.mkdir()
  (root / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
  peer.save_file(tensors_of(m), root / "model.safetensors", {"format": "pt"})
  return root, m


def tensors_of(m):
  flat = {a: np.asarray(x) for a, x in paths.flatten(m.params).items()}
  return {e.name: np.ascontiguousarray(hf.to_tensor(m.spec, e, flat)) for e in hf.entries(m.spec)}


def edit(root, change):
  file = root / "model.safetensors"
  held = peer.load_file(file)
  change(held)
  peer.save_file(held, file)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_load_and_save_round_trip(tmp_path, name):
  root, m = directory(tmp_path, name)
  loaded = io.load(root)
  assert loaded.spec == m.spec
  same(loaded.params, m.params)
  out = io.save(loaded, tmp_path / "out")
  same(io.load(out).params, m.params)
  theirs = peer.load_file(out / "model.safetensors")
  for n, x in tensors_of(m).items():
    np.testing.assert_array_equal(theirs.pop(n), x)
  assert not theirs
  config = json.loads((out / "config.json").read_text())
  assert {k: config[k] for k in CONFIGS[name]} == CONFIGS[name]
  assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", CONFIGS)
def test_leaves_are_read_one_by_one(tmp_path, name):
  root, m = directory(tmp_path, name)
  source = io.Checkpoint(root)
  assert source.addresses() == m.addresses()
  for address in source.addresses():
    same(jnp.asarray(source.leaf(address)), m.leaf(address))
    struct = source.struct(address)
    assert (struct.shape, struct.dtype) == (m.leaf(address).shape, m.leaf(address).dtype)
  with pytest.raises(ValueError, match="no address matches 'layers/9/x'; nearest: "):
    source.leaf("layers/9/x")


def test_leaves_are_views_into_the_file(tmp_path):
  root, _ = directory(tmp_path)
  leaf = io.Checkpoint(root).leaf("layers/0/mlp/up/kernel")
  assert isinstance(leaf, np.ndarray) and not leaf.flags.owndata and not leaf.flags.writeable


def test_unequal_layers_become_segments(tmp_path):
  spec = models.Spec(vocab_size=9, d_model=8, num_layers=3, num_heads=2, d_ff=(16, 16, 8))
  m = model.Model(spec, models.init(spec, jax.random.key(0)))
  loaded = io.load(io.save(m, tmp_path / "out"))
  assert loaded.spec == spec and sorted(loaded.params["layers"]) == ["0:2", "2:3"]
  same(loaded.params, m.params)


def test_load_casts_and_places(tmp_path):
  root, _ = directory(tmp_path)
  seen = []

  def place(name, array):
    seen.append(name)
    return jnp.asarray(array)

  loaded = io.load(root, dtype=jnp.float32, place=place)
  assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype("float32")}
  assert "layers/0:3/mlp/up/kernel" in seen


def test_save_casts(tmp_path):
  out = io.save(make(dtype=jnp.float32), tmp_path / "out", dtype=jnp.float16)
  assert safetensors.open_folder(out).info("lm_head.weight").dtype == np.float16
  assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def test_sharded_output(tmp_path):
  m = make()
  out = io.save(m, tmp_path / "out", max_shard_bytes=4000)
  assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
  same(io.load(out).params, m.params)


def compressed_leaves(m, address):
  w = m.leaf(address)
  rows, cols = w.shape
  codes = jax.random.randint(jax.random.key(1), (rows, cols), 0, 8).astype(jnp.uint8)
  scales = jnp.full((2, cols), 0.5, jnp.bfloat16)
  quantized = leaves.QuantizedTensor(
    packing.pack(codes, bits=3), scales, jnp.ones((2, cols), jnp.uint8), None,
    rows, cols, 3, rows // 2, "bfloat16",
  )  # fmt: skip
  low = leaves.LowRank(w[:, :2], jnp.ones((2, cols), w.dtype), 0.25)
  book = leaves.Codebook(
    jnp.zeros((rows // 4, cols), jnp.uint8), jnp.ones((256, 4), w.dtype), rows, cols, 8, 4
  )
  sparse = leaves.SparseTensor(
    jnp.ones((rows // 2, cols), w.dtype), jnp.full((rows // 8, cols), 0x44, jnp.uint8),
    rows, cols, 2, 4,
  )  # fmt: skip
  return {
    "quantized": quantized, "low": low, "book": book, "sparse": sparse,
    "sum": leaves.Sum((quantized, low)), "sum of arrays": leaves.Sum((w, low)),
  }  # fmt: skip


KINDS = ("quantized", "low", "book", "sparse", "sum", "sum of arrays")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_compressed_leaves_come_back_bit_for_bit(tmp_path, name, kind):
  m = make(name)
  at = ["layers/1/attn/q/kernel", "layers/0/mlp/up/kernel", "layers/1/mlp/up/kernel"]
  m = m.update({a: compressed_leaves(m, a)[kind] for a in at})
  out = io.save(m, tmp_path / "out")
  loaded = io.load(out)
  assert loaded.spec == m.spec
  same(loaded.params, m.params)
  source = io.Checkpoint(out)
  for address in at:
    same(jax.tree.map(jnp.asarray, source.leaf(address)), m.leaf(address))
  assert "Only treesurgeon loads" in (out / "README.md").read_text()
  again = io.save(loaded, tmp_path / "again")
  assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_size_on_disk_is_the_compressed_size(tmp_path):
  m = make()
  kernels = [a for a in m.addresses() if a.startswith("layers") and a.endswith("kernel")]
  m = m.update({a: compressed_leaves(m, a)["quantized"] for a in kernels})
  held = safetensors.open_folder(io.save(m, tmp_path / "out"))
  assert sum(held[n].nbytes for n in held) == m.nbytes()
  assert "model.layers.0.mlp.up_proj.weight::codes" in held
  fused = safetensors.open_folder(
    io.save(
      (g := make("gpt2")).update(
        {"layers/0/attn/q/kernel": compressed_leaves(g, "layers/0/attn/q/kernel")["low"]}
      ),
      tmp_path / "gpt2",
    )
  )
  assert {"layers/0/attn/q/kernel::a", "layers/0/attn/k/kernel"} <= set(fused)
  assert "transformer.h.0.attn.c_attn.bias" in fused


def damage_config(root, change):
  path = root / "config.json"
  config = json.loads(path.read_text())
  change(config)
  path.write_text(json.dumps(config))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda c: c.update({packed.KEY: 3}),
      "treesurgeon_leaves must be an object of version 1; got 3",
    ),
    (lambda c: c[packed.KEY].update(version=2), "must be an object of version 1"),
    (lambda c: c[packed.KEY].update(leaves=[]), "must map tensor names to descriptions"),
    (
      lambda c: next(iter(c[packed.KEY]["leaves"].values())).update(type="X"),
      "unknown leaf type 'X'",
    ),
    (lambda c: next(iter(c[packed.KEY]["leaves"].values())).update(rows=8), "do not fit|has shape"),
    (lambda c: next(iter(c[packed.KEY]["leaves"].values())).update(bits=5), "parts .* do not fit"),
    (
      lambda c: next(iter(c[packed.KEY]["leaves"].values())).update(bits="x"),
      "parts .* do not fit",
    ),
    (lambda c: next(iter(c[packed.KEY]["leaves"].values())).pop("rows"), "lacks the part 'rows'"),
    (lambda c: c.pop(packed.KEY), r"missing: model.*; \d unexpected: .*::codes"),
  ],
)
def test_damaged_descriptions(tmp_path, change, message):
  m = make()
  address = "layers/0/mlp/up/kernel"
  root = io.save(m.update({address: compressed_leaves(m, address)["quantized"]}), tmp_path / "out")
  damage_config(root, change)
  with pytest.raises(ValueError, match=message):
    io.Checkpoint(root)


def test_tied_heads(tmp_path):
  root, m = directory(tmp_path, tie_word_embeddings=True)
  assert not any(a.startswith("lm_head") for a in io.Checkpoint(root).addresses())
  embedding = np.asarray(m.leaf("embed/tokens/embedding"))
  edit(root, lambda t: t.update({"lm_head.weight": embedding}))
  same(io.load(root).params, m.params)
  edit(root, lambda t: t.update({"lm_head.weight": embedding + 1}))
  with pytest.raises(ValueError, match="'lm_head.weight' differs from 'model.embed_tokens.weight'"):
    io.load(root)


def test_buffers_are_ignored(tmp_path):
  root, m = directory(tmp_path)
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  edit(root, lambda t: t.update({name: np.ones(4, np.float32)}))
  same(io.load(root).params, m.params)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda t: t.pop("lm_head.weight"),
      r"llama: the tensors do not fit config.json; 1 missing: lm_head",
    ),
    (lambda t: t.update({"extra": np.ones(2)}), "1 unexpected: extra"),
    (
      lambda t: t.update({"lm_head.weight": np.ones((21, 16), np.float32)}),
      r"tensor 'lm_head.weight' has shape \(21, 16\); config.json says \(20, 16\)",
    ),
    (lambda t: t.pop("model.embed_tokens.weight"), "no token embedding of a llama checkpoint"),
  ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
  root, _ = directory(tmp_path)
  edit(root, change)
  with pytest.raises(ValueError, match=message):
    io.load(root)


def test_foreign_quantization_is_named(tmp_path):
  root, _ = directory(tmp_path)
  damage_config(root, lambda c: c.update(quantization_config={"quant_method": "x"}))
  edit(root, lambda t: t.update({"model.norm.qweight": np.ones(2, np.int32)}))
  with pytest.raises(ValueError, match="quant_method .x. is not supported; compressed-t"):
    io.load(root)


def test_weights_that_are_not_finite(tmp_path):
  root, _ = directory(tmp_path)

  def change(tensors):
    bad = tensors["lm_head.weight"].copy()
    bad[2, 3] = np.nan
    tensors["lm_head.weight"] = bad

  edit(root, change)
  message = r"model.safetensors: tensor 'lm_head.weight' holds 1 NaN or Inf .* at \[2, 3\]"
  with pytest.raises(ValueError, match=message):
    io.load(root)
  source = io.Checkpoint(root)
  source.leaf("layers/0/mlp/up/kernel")
  with pytest.raises(ValueError, match=message):
    source.leaf("lm_head/kernel")


def test_bad_directories(tmp_path):
  with pytest.raises(ValueError, match="no does not exist; expected a directory with config.json"):
    io.load(tmp_path / "no")
  (tmp_path / "notes.txt").write_text("x")
  with pytest.raises(ValueError, match="no config.json; it holds notes.txt"):
    io.load(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json: not valid JSON"):
    io.load(tmp_path)
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(ValueError, match="config.json: expected a JSON object; got list"):
    io.load(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "zebra"}))
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
  with pytest.raises(ValueError, match="pytorch_model.bin: refused"):
    io.load(tmp_path)
  peer.save_file({"a": np.ones(2)}, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="model_type 'zebra' is not supported; valid: "):
    io.load(tmp_path)


def test_companions_lineage_and_card(tmp_path):
  root, m = directory(tmp_path)
  for name in ("tokenizer.json", "generation_config.json", "LICENSE", "evil.py", "optimizer.pt"):
    (root / name).write_text(f"{{}} {name}")
  record = lineage.Record("edit.x(y=1)", seed=3, inputs={"base": "ab12"}, versions={"jax": "1"})
  out = io.save(
    m.replace(lineage=(record,)), tmp_path / "out", tokenizer_from=root, inputs={"a": "ff"},
    evaluation={"nll": {"before": 2.5, "after": 2.25}, "tokens": 100},
  )  # fmt: skip
  assert sorted(os.listdir(out)) == sorted([
    "LICENSE", "README.md", "config.json", "generation_config.json", "lineage.json",
    "model.safetensors", "tokenizer.json",
  ])  # fmt: skip
  assert (out / "tokenizer.json").read_text() == "{} tokenizer.json"
  told = json.loads((out / "lineage.json").read_text())
  assert told["inputs"] == {"a": "ff"} and told["evaluation"]["tokens"] == 100
  assert set(told["outputs"]) == set(os.listdir(out)) - {"lineage.json"}
  assert all(lineage.digest(out / n) == d for n, d in told["outputs"].items())
  text = (out / "README.md").read_text()
  for part in ("1. `edit.x(y=1)`, seed 3", "| base | `ab12` |", "| nll | 2.5 | 2.25 |", "jax 1"):
    assert part in text
  assert "library_name: transformers" in text
  loaded = io.load(out)
  assert loaded.lineage == (record,)
  (out / "lineage.json").write_text('{"records": [{"what": 1}]}')
  with pytest.raises(ValueError, match="lineage.json: not a lineage file: .*unknown field 'what'"):
    io.load(out)


def test_digest_depends_on_weights_and_config_alone(tmp_path):
  root, _ = directory(tmp_path)
  shutil.copytree(root, tmp_path / "copy")
  (tmp_path / "copy" / "notes").write_text("")
  source = io.Checkpoint(root)
  assert set(source.digests) == {"config.json", "model.safetensors"}
  assert source.digest() == io.Checkpoint(tmp_path / "copy").digest()
  damage_config(tmp_path / "copy", lambda c: c.update(note=1))
  assert source.digest() != io.Checkpoint(tmp_path / "copy").digest()
