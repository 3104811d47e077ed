# SPDX-License-Identifier: Apache-2.0
"""peft directories without peft: layout, accounting, fused modules, and what is refused.

`tests/peers/peft_test.py` compares with peft itself.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.adapt import adapters, peft, peft_modules
from treesurgeon.core import leaves, model
from treesurgeon.io import peft_config, safetensors

SIZES = {"vocab_size": 11, "d_model": 8, "num_layers": 2, "num_heads": 2, "d_ff": 12}
LLAMA = models.Spec(**SIZES, num_kv_heads=1, family="llama")
GPT2 = models.Spec(
  **SIZES, family="gpt2", gated=False, norm="layer", positions="learned", tied=True, qkv_bias=True
)
NEOX = models.Spec(**SIZES, family="gpt_neox", gated=False, norm="layer", parallel=True)
Q, K, V = (f"layers/0/attn/{n}/kernel" for n in "qkv")
LAYER = "base_model.model.model.layers.0"


def low_rank(rows, cols, rank=2, scale=2.0, seed=0):
  a, b = jax.random.split(jax.random.key(seed))
  return leaves.LowRank(
    jax.random.normal(a, (rows, rank)), jax.random.normal(b, (rank, cols)), scale
  )


def base(spec):
  return model.Model(spec, models.init(spec, jax.random.key(0)))


def write(directory, tensors, **config):
  """Writes a directory as peft does."""
  table = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
  peft._write(  # the atomic writer is as good as any here
    directory,
    {
      peft.CONFIG: json.dumps(table).encode(),
      peft.WEIGHTS: peft._serialize({k: np.ones(s, np.float32) for k, s in tensors.items()}),
    },
    overwrite=True,
  )
  return directory


def pair(module, rows=8, cols=8, rank=2):
  return {f"{module}.lora_A.weight": (rank, rows), f"{module}.lora_B.weight": (cols, rank)}


def test_layout_is_that_of_peft(tmp_path):
  found = {Q: low_rank(8, 8), V: low_rank(8, 4), "layers/1/mlp/down/kernel": low_rank(12, 8, 3)}
  peft.save(tmp_path / "out", found, LLAMA, base_model="some/model")
  tensors = safetensors.open_file(tmp_path / "out" / peft.WEIGHTS)
  assert {n: tensors.info(n).shape for n in tensors} == {
    **pair(f"{LAYER}.self_attn.q_proj"),
    **pair(f"{LAYER}.self_attn.v_proj", cols=4),
    **pair("base_model.model.model.layers.1.mlp.down_proj", rows=12, rank=3),
  }
  np.testing.assert_array_equal(tensors[f"{LAYER}.self_attn.v_proj.lora_B.weight"], found[V].b.T)
  config = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
  assert config["rank_pattern"] == {"model.layers.1.mlp.down_proj": 3}
  assert config["alpha_pattern"] == {"model.layers.1.mlp.down_proj": 6}
  assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 4, "CAUSAL_LM")
  assert config["base_model_name_or_path"] == "some/model" and config["peft_type"] == "LORA"
  assert config["target_modules"] == [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
  ]
  assert not config["fan_in_fan_out"] and not config["use_rslora"] and not config["use_dora"]


def test_names_are_short_where_they_mean_the_same(tmp_path):
  found = {f"layers/{i}/attn/{n}/kernel": low_rank(8, 8) for i in range(2) for n in "qo"}
  peft.save(tmp_path / "out", found, LLAMA)
  config = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
  assert config["target_modules"] == ["o_proj", "q_proj"]
  assert config["rank_pattern"] == config["alpha_pattern"] == {}


@pytest.mark.parametrize("spec", [GPT2, NEOX], ids=["side by side", "by head"])
def test_fused_modules_split_and_join_exactly(spec, tmp_path):
  shared = low_rank(8, 8)
  found = {
    a: leaves.LowRank(shared.a, low_rank(8, 8, seed=i).b, 2.0) for i, a in enumerate((Q, K, V))
  }
  peft.save(tmp_path / "out", found, spec)
  tensors = safetensors.open_file(tmp_path / "out" / peft.WEIGHTS)
  assert sorted(tensors.info(n).shape for n in tensors) == [(2, 8), (24, 2)]
  back = peft.load(tmp_path / "out", base(spec))
  assert set(back) == set(found)
  for address, low in found.items():
    np.testing.assert_array_equal(back[address].a, low.a)
    np.testing.assert_array_equal(back[address].b, low.b)
    assert back[address].scale == low.scale
  config = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
  assert config["fan_in_fan_out"] == (spec is GPT2)


@pytest.mark.parametrize("spec", [GPT2, NEOX], ids=["side by side", "by head"])
@pytest.mark.parametrize("ranks", [{Q: 2, K: 1, V: 3}, {Q: 2, V: 1}])
def test_fused_modules_of_other_adapters_take_the_block_form(spec, ranks, tmp_path):
  found = {a: low_rank(8, 8, r, seed=i) for i, (a, r) in enumerate(ranks.items())}
  peft.save(tmp_path / "out", found, spec)
  back = peft.load(tmp_path / "out", base(spec))
  assert set(back) == {Q, K, V}
  for address in (Q, K, V):
    assert back[address].rank == sum(ranks.values())
    want = found[address].dense() if address in found else np.zeros((8, 8))
    np.testing.assert_allclose(back[address].dense(), want, atol=1e-6)


def test_fused_modules_have_one_scale(tmp_path):
  found = {Q: low_rank(8, 8, scale=2.0), K: low_rank(8, 8, scale=1.0)}
  with pytest.raises(ValueError, match=r"c_attn fuses .* have the scales \[1.0, 2.0\]"):
    peft.save(tmp_path / "out", found, GPT2)


@pytest.mark.parametrize(("rank", "scale"), [(12, 16 / 12), (7, 5 / 7), (3, 1e-3), (6, 2**-0.5)])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_survives_to_the_last_bit(rank, scale, rslora, tmp_path):
  peft.save(tmp_path / "out", {Q: low_rank(8, 8, rank, scale)}, LLAMA, rslora=rslora)
  (low,) = peft.load(tmp_path / "out", base(LLAMA)).values()
  assert low.scale == pytest.approx(scale, rel=1e-15)
  if not rslora:
    assert low.scale == scale


def test_the_first_pattern_that_matches_wins(tmp_path):
  tensors = pair(f"{LAYER}.self_attn.q_proj", rank=3) | pair(f"{LAYER}.self_attn.o_proj")
  write(
    tmp_path / "a",
    tensors,
    rank_pattern={r"layers\.\d+\.self_attn\.q_proj": 3, "q_proj": 9},
    alpha_pattern={"_attn.q_proj": 100, "q_proj": 6, "proj": 100, "attn.o_proj|down_proj": 1},
  )
  found = peft.load(tmp_path / "a", base(LLAMA))
  assert found[Q].scale == 2.0 and found["layers/0/attn/o/kernel"].scale == 2.0
  config = peft_config.read(tmp_path / "a" / peft.CONFIG)
  assert config.ranks("model.layers.0.self_attn.q_proj") == (3, 9, 2)
  assert config.scale("down_proj", 2) == 0.5


def test_embeddings_and_heads_of_untied_models(tmp_path):
  m = base(LLAMA)
  found = {"embed/tokens/embedding": low_rank(11, 8), "lm_head/kernel": low_rank(8, 11)}
  peft.save(tmp_path / "out", found, LLAMA)
  tensors = safetensors.open_file(tmp_path / "out" / peft.WEIGHTS)
  names = [n.removeprefix("base_model.model.") for n in sorted(tensors)]
  assert names == [
    "lm_head.lora_A.weight",
    "lm_head.lora_B.weight",
    "model.embed_tokens.lora_embedding_A",
    "model.embed_tokens.lora_embedding_B",
  ]
  back = peft.load(tmp_path / "out", m)
  for address, low in found.items():
    np.testing.assert_array_equal(back[address].dense(), low.dense())
  tuned = adapters.attach(m, back)
  assert models.forward(LLAMA, tuned.params, jnp.zeros((1, 2), jnp.int32)).logits.shape == (
    1,
    2,
    11,
  )
  with pytest.raises(
    ValueError, match=r"embedding \(tied to the head in this model\) cannot carry"
  ):
    peft.save(tmp_path / "tied", {"embed/tokens/embedding": low_rank(11, 8)}, GPT2)


@pytest.mark.parametrize(
  ("tensors", "config", "message"),
  [
    (
      pair(f"{LAYER}.self_attn.q_porj"),
      {},
      r"'base_model.model.model.layers.0.self_attn.q_porj.lora_A.weight' fits no module",
    ),
    (
      pair("base_model.model.model.layers.7.self_attn.q_proj"),
      {},
      r"nearest: model.layers.[01].self_attn.q_proj, ",
    ),
    (pair("model.layers.0.self_attn.q_proj"), {}, r"fits no module of the model"),
    (
      {f"{LAYER}.self_attn.q_proj.lora_A.weight": (2, 8)},
      {},
      r"module 'model.layers.0.self_attn.q_proj' has no lora_B",
    ),
    (
      {
        **pair(f"{LAYER}.self_attn.q_proj"),
        f"{LAYER}.self_attn.q_proj.lora_magnitude_vector": (8,),
      },
      {},
      r"lora_magnitude_vector' fits no module",
    ),
    (
      pair(f"{LAYER}.self_attn.q_proj", rank=3),
      {},
      r"lora_A is \(3, 8\).* rank 2 ask for \(2, 8\)",
    ),
    (pair(f"{LAYER}.self_attn.k_proj"), {}, r"lora_B \(8, 2\).* ask for \(2, 8\) and \(4, 2\)"),
    (
      pair("base_model.model.model.embed_tokens", 11),
      {},
      r"is not named as for the kind of its module",
    ),
    (
      {
        **pair("base_model.model.lm_head", cols=11),
        "base_model.model.lm_head.base_layer.weight": (11, 8),
      },
      {},
      r"brings a base weight \(11, 8\) of its own, which is not the model's lm_head/kernel",
    ),
    ({}, {}, r"the file holds no tensors"),
    ({}, {"peft_type": "LOHA"}, r"peft_type is 'LOHA'; supported: plain LoRA and rsLoRA"),
    ({}, {"use_dora": True}, r"use_dora=True is not supported; supported: plain LoRA"),
    ({}, {"bias": "all"}, r"bias='all' is not supported"),
    ({}, {"from_the_future": 3}, r"from_the_future=3 is not supported"),
    ({}, {"init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4' adapts a changed base"),
    ({}, {"r": 0}, r"r=0 must be a positive integer"),
    ({}, {"rank_pattern": {"q_proj": 1.5}}, r"q_proj=1.5 must be a positive integer"),
    ({}, {"alpha_pattern": {"(": 1}}, r"'\(' is not a regular expression"),
    ({}, {"rank_pattern": ["q"]}, r"must be an object"),
  ],
)
def test_what_does_not_fit_is_named(tensors, config, message, tmp_path):
  write(tmp_path / "a", tensors, **config)
  with pytest.raises(ValueError, match=message):
    peft.load(tmp_path / "a", base(LLAMA))


def test_a_head_that_is_the_embedding_is_refused(tmp_path):
  write(tmp_path / "a", pair("base_model.model.lm_head", cols=11))
  with pytest.raises(ValueError, match=r"head is its embedding \(tied\)"):
    peft.load(tmp_path / "a", base(GPT2))


def test_directories_that_are_no_adapter(tmp_path):
  with pytest.raises(ValueError, match=r"adapter_config.json: no such file"):
    peft.load(tmp_path, base(LLAMA))
  (tmp_path / peft.CONFIG).write_text("{")
  with pytest.raises(ValueError, match=r"adapter_config.json: not valid JSON"):
    peft.load(tmp_path, base(LLAMA))
  (tmp_path / peft.CONFIG).write_text("[]")
  with pytest.raises(ValueError, match=r"expected a JSON object; got list"):
    peft.load(tmp_path, base(LLAMA))
  (tmp_path / peft.CONFIG).write_text('{"peft_type": "LORA"}')
  with pytest.raises(ValueError, match=r"adapter_model.safetensors: no such file"):
    peft.load(tmp_path, base(LLAMA))


def test_what_cannot_be_written_is_named(tmp_path):
  out = tmp_path / "out"
  with pytest.raises(ValueError, match="no adapters to export"):
    peft.save(out, {}, LLAMA)
  with pytest.raises(ValueError, match="'treesurgeon' has none of its names"):
    peft.save(out, {Q: low_rank(8, 8)}, models.Spec(**SIZES))
  with pytest.raises(ValueError, match="layers/5/mlp/up/kernel cannot carry a peft adapter"):
    peft.save(out, {"layers/5/mlp/up/kernel": low_rank(8, 12)}, LLAMA)
  with pytest.raises(ValueError, match=r"the adapter is \(8, 9\), the weight \(8, 8\)"):
    peft.save(out, {Q: low_rank(8, 9)}, LLAMA)
  peft.save(out, {Q: low_rank(8, 8)}, LLAMA)
  with pytest.raises(ValueError, match="exists and holds adapter_config.json"):
    peft.save(out, {Q: low_rank(8, 8)}, LLAMA)
  peft.save(out, {Q: low_rank(8, 8, 1)}, LLAMA, overwrite=True)
  assert peft.load(out, base(LLAMA))[Q].rank == 1


def test_bare_backbones_and_old_names_are_read():
  assert peft_modules.table(LLAMA)["layers.0.self_attn.q_proj"].addresses == (Q,)
  table = peft_modules.table(NEOX)
  assert table["embed_out"] == table["lm_head"]
  assert "embed_out" not in peft_modules.table(NEOX, bare=False)
