# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: router rows against our own forward, tensors, and what is refused.

`tests/peers/mergekit_extras_test.py` loads the results in transformers and compares with mergekit.
"""

import json

import jax
import numpy as np
import pytest
import tokenizers

from treesurgeon import io, models
from treesurgeon.core import model
from treesurgeon.io import checkpoint, raw
from treesurgeon.merge import moe, moe_config, moe_gates, moe_layouts

SIZES = {"vocab_size": 16, "d_model": 8, "num_layers": 2, "num_heads": 2, "d_ff": 12}
LLAMA = models.Spec(**SIZES, family="llama", max_positions=32)
QWEN3 = models.Spec(**SIZES, family="qwen3", max_positions=32, qk_norm="head")
WORDS = {w: i for i, w in enumerate("<s> a b c d e f g".split())}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
  """Three Llamas and a Qwen3, with a tokenizer of single words."""
  root = tmp_path_factory.mktemp("models")
  for seed, (name, spec) in enumerate(
    (("base", LLAMA), ("x", LLAMA), ("y", LLAMA), ("qwen", QWEN3), ("qwen2", QWEN3))
  ):
    io.save(model.Model(spec, models.init(spec, jax.random.key(seed))), root / name)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>"])
    inner.save(str(root / name / "tokenizer.json"))
    (root / name / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
  return root


def configuration(root, *names, base="base", **given):
  prompts = [["a b c", "d"], ["e f", "g g g"]]
  experts = [
    {"source_model": str(root / n), "positive_prompts": prompts[i % 2]} for i, n in enumerate(names)
  ]
  return {"base_model": str(root / base), "experts": experts, "experts_per_token": 1, **given}


def built(document, out, **given):
  return raw.Directory(moe.build(moe_config.parse(document, allow_same=True), out, **given))


def encoded(prompt):
  return np.asarray([[0, *(WORDS[w] for w in prompt.split())]])


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_rows_are_hidden_states_of_the_forward(directories, tmp_path, mode):
  document = configuration(directories, "x", "y", gate_mode=mode)
  document["experts"][0]["negative_prompts"] = ["g f e d"]
  out = built(document, tmp_path / "out")
  base = io.load(directories / "base")

  def states(prompts):
    found = []
    for prompt in prompts:
      seen = models.forward(
        base.spec, base.params, encoded(prompt), observe=lambda n, x: x if n == "in" else None
      ).observed["in"]
      found.append(seen[:, 0].mean(1) if mode == "hidden_avg" else seen[:, 0, -1])
    return np.mean(found, axis=0)

  rows = states(["a b c", "d"]) - states(["g f e d"]), states(["e f", "g g g"])
  for layer in range(2):
    got = out.leaf(moe_layouts.MIXTRAL.gate(layer))
    for i in range(2):
      want = rows[i][layer] / np.linalg.norm(rows[i][layer])
      np.testing.assert_allclose(got[i], want, atol=1e-5)


def test_rows_from_embeddings(directories, tmp_path):
  out = built(configuration(directories, "x", "y", gate_mode="cheap_embed"), tmp_path / "out")
  table = raw.Directory(directories / "base").leaf("model.embed_tokens.weight")
  tokens = np.concatenate([encoded("a b c")[0], encoded("d")[0]])
  want = table[tokens].sum(0)
  for layer in range(2):
    got = out.leaf(moe_layouts.MIXTRAL.gate(layer))[0]
    np.testing.assert_allclose(got, want / np.linalg.norm(want), atol=1e-6)


def test_tensors_are_the_base_and_the_experts(directories, tmp_path):
  out = built(configuration(directories, "x", "y", gate_mode="random"), tmp_path / "out")
  base, x, y = (raw.Directory(directories / n) for n in ("base", "x", "y"))
  kept = [n for n in base.addresses() if ".mlp." not in n]
  for name in kept:
    np.testing.assert_array_equal(out.leaf(name), base.leaf(name))
  for part, short in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
    for e, source in enumerate((x, y)):
      np.testing.assert_array_equal(
        out.leaf(f"model.layers.1.block_sparse_moe.experts.{e}.{short}.weight"),
        source.leaf(f"model.layers.1.mlp.{part}_proj.weight"),
      )
  assert len(out.addresses()) == len(kept) + 2 * (1 + 2 * 3)
  config = out.config
  assert (config["model_type"], config["architectures"]) == ("mixtral", ["MixtralForCausalLM"])
  assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 1)
  names = {p.name for p in out.directory.iterdir()}
  assert {"tokenizer.json", "mergekit_moe_config.yml", "lineage.json", "README.md"} <= names
  record = json.loads((out.directory / "lineage.json").read_text())["records"][-1]
  assert record["expression"] == "merge.moe()" and set(record["inputs"]) == {
    "base", "donor 0", "donor 1"
  }  # fmt: skip


def test_qwen_layouts(directories, tmp_path):
  shared = {"source_model": str(directories / "base"), "positive_prompts": ["a g"]}
  document = configuration(directories, "x", "y", gate_mode="cheap_embed", shared_experts=[shared])
  out = built(document, tmp_path / "two")
  assert out.config["model_type"] == "qwen2_moe" and out.config["norm_topk_prob"]
  assert not out.leaf("model.layers.0.self_attn.k_proj.bias").any()
  assert out.struct("model.layers.1.mlp.shared_expert_gate.weight").shape == (1, 8)
  np.testing.assert_array_equal(
    out.leaf("model.layers.1.mlp.shared_expert.up_proj.weight"),
    raw.Directory(directories / "base").leaf("model.layers.1.mlp.up_proj.weight"),
  )
  document = configuration(directories, "qwen", "qwen2", base="qwen", gate_mode="hidden")
  out = built(document, tmp_path / "three")
  assert out.config["model_type"] == "qwen3_moe" and out.config["moe_intermediate_size"] == 12
  assert "model.layers.0.mlp.experts.1.down_proj.weight" in out.addresses()


@pytest.mark.parametrize(("base", "family"), [("base", "mixtral"), ("qwen", "qwen3_moe")])
def test_a_mixture_of_equal_experts_opens_as_the_dense_model(directories, tmp_path, base, family):
  document = configuration(
    directories, base, base, base, base=base, gate_mode="random", experts_per_token=2
  )
  out = io.load(built(document, tmp_path / "out").directory)
  dense = io.load(directories / base)
  assert (out.spec.family, out.spec.num_experts, out.spec.experts_per_token) == (family, 3, 2)
  tokens = encoded("a b c d e")
  want, got = (models.forward(m.spec, m.params, tokens).logits for m in (dense, out))
  np.testing.assert_allclose(got, want, atol=1e-5)
  if base == "base":
    different = io.load(built(configuration(directories, "x", "y"), tmp_path / "two").directory)
    assert np.isfinite(models.forward(different.spec, different.params, tokens).logits).all()


def test_noise_residual_scale_and_dtype(directories, tmp_path):
  document = configuration(directories, "x", "y", gate_mode="uniform_random")
  document["experts"][0] |= {"residual_scale": 0.5}
  document["experts"][1] |= {"noise_scale": 0.1}
  out = built(document, tmp_path / "out", seed=3)
  x, y = (raw.Directory(directories / n) for n in ("x", "y"))
  module = "model.layers.0.block_sparse_moe.experts"
  np.testing.assert_array_equal(
    out.leaf(f"{module}.0.w2.weight"), 0.5 * x.leaf("model.layers.0.mlp.down_proj.weight")
  )
  np.testing.assert_array_equal(
    out.leaf(f"{module}.0.w1.weight"), x.leaf("model.layers.0.mlp.gate_proj.weight")
  )
  noise = out.leaf(f"{module}.1.w1.weight") - y.leaf("model.layers.0.mlp.gate_proj.weight")
  assert 0.07 < noise.std() < 0.13
  gates = out.leaf(moe_layouts.MIXTRAL.gate(0))
  assert np.abs(gates).max() <= 8**-0.5
  again = built(document, tmp_path / "again", seed=3)
  np.testing.assert_array_equal(
    again.leaf(f"{module}.1.w1.weight"), out.leaf(f"{module}.1.w1.weight")
  )
  half = built({**document, "dtype": "bfloat16"}, tmp_path / "half")
  assert {half.struct(n).dtype.name for n in half.addresses()} == {"bfloat16"}
  assert half.config.get("torch_dtype", half.config.get("dtype")) == "bfloat16"


def test_notes(directories, tmp_path):
  told = []
  document = configuration(directories, "x", "y", "x", gate_mode="cheap_embed")
  document["experts"][2]["positive_prompts"] = document["experts"][0]["positive_prompts"]
  built(document, tmp_path / "out", tell=told.append)
  assert "nearly dependent" in told[0] and "no power of two" in told[1]


def test_prompts_do_not_see_each_other(directories):
  source = checkpoint.Checkpoint(directories / "base")
  prompts = [np.asarray([1, 2, 3, 4]), np.asarray([5])]
  together = moe_gates.hidden(source, prompts)
  for i, prompt in enumerate(prompts):
    np.testing.assert_allclose(moe_gates.hidden(source, [prompt])[0], together[i], atol=1e-5)


ONE = {"source_model": "a", "positive_prompts": ["p"]}
TWO = {"source_model": "b", "positive_prompts": ["q"]}
BOTH = {"base_model": "a", "experts": [ONE, TWO]}
BAD = {
  "mapping": ([], "must be a mapping"),
  "key": ({**BOTH, "gate_mod": "x"}, "unknown key 'gate_mod'; did you mean 'gate_mode'"),
  "expert": ({**BOTH, "experts": [{**ONE, "prompts": []}, TWO]}, r"experts\[0\]: unknown key"),
  "entry": ({**BOTH, "experts": ["a", TWO]}, r"experts\[0\] must be a mapping with a source_model"),
  "none": ({**BOTH, "experts": []}, "experts must be a list of at least one"),
  "base": ({"experts": [ONE, TWO]}, "base_model is None"),
  "mode": ({**BOTH, "gate_mode": "last"}, "gate_mode='last': valid are hidden, hidden_avg"),
  "count": ({**BOTH, "experts_per_token": 3}, "experts_per_token=3 must be 1 to 2"),
  "dtype": ({**BOTH, "dtype": "int8"}, "dtype='int8' is not supported"),
  "architecture": ({**BOTH, "architecture": 3}, "architecture=3 must be a name"),
  "prompts": ({**BOTH, "experts": [ONE, {"source_model": "b"}]}, r"experts\[1\] has no positive"),
  "texts": ({**BOTH, "experts": [{**ONE, "positive_prompts": "p"}, TWO]}, "a list of texts"),
  "number": ({**BOTH, "experts": [{**ONE, "noise_scale": "x"}, TWO]}, "noise_scale='x' must be"),
  "alike": ({**BOTH, "experts": [ONE, {**TWO, "positive_prompts": ["p"]}]}, "the same prompts"),
  "same": ({**BOTH, "experts": [ONE, {**TWO, "source_model": "a"}]}, "--allow_same_experts"),
}  # fmt: skip


@pytest.mark.parametrize(("document", "message"), BAD.values(), ids=BAD.keys())
def test_refuses_configurations(document, message):
  with pytest.raises(ValueError, match=message):
    moe_config.parse(document)


def test_refuses_models_that_do_not_fit(directories, tmp_path):
  wide = models.Spec(**{**SIZES, "d_ff": 14}, family="llama", max_positions=32)
  io.save(model.Model(wide, models.init(wide, jax.random.key(0))), tmp_path / "wide")
  shared = {"source_model": str(directories / "qwen")}
  for document, message in (
    (configuration(directories, "x", "qwen"), "of one type; .*base is llama.*qwen is qwen3"),
    (configuration(directories, "x", "y", architecture="deepseek"), "supported: mixtral, qwen moe"),
    (
      configuration(
        directories, "qwen", base="qwen", gate_mode="random", shared_experts=[shared]
      ),
      "no architecture holds qwen3 experts with 1 shared",
    ),
    (
      configuration(directories, tmp_path / "wide"),
      r"gate_proj.weight has shape \(14, 8\), the base's \(12, 8\)",
    ),
    ({**BOTH, "gate_mode": "random"}, "a is no directory"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      built({"experts_per_token": 1, **document}, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_refuses_biases_without_a_place():
  names = ["model.layers.0.self_attn.o_proj.bias"]
  for layout in (moe_layouts.MIXTRAL, moe_layouts.QWEN2):
    with pytest.raises(ValueError, match="o_proj.bias: .* has no such bias"):
      moe_layouts.check_biases(layout, names, "m")
  moe_layouts.check_biases(moe_layouts.QWEN3, names, "m")


def test_defaults_that_a_config_leaves_out_are_the_dense_ones():
  base = {"model_type": "llama", "num_attention_heads": 4, "intermediate_size": 8, "hidden_size": 8}
  out = moe_layouts.config(moe_layouts.MIXTRAL, base, 2, 1)
  assert (out["num_key_value_heads"], out["rms_norm_eps"], out["rope_theta"]) == (4, 1e-6, 10000.0)
  with pytest.raises(ValueError, match="head_dim=4: qwen moe has heads of 2 only"):
    moe_layouts.config(moe_layouts.QWEN2, {**base, "head_dim": 4}, 2, 1)
