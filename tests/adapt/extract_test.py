# SPDX-License-Identifier: Apache-2.0
"""Adapters extracted from fine-tunes: rank, errors, what is saved in full, what is refused.

`tests/peers/mergekit_extras_test.py` loads them with peft and compares with mergekit's.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from treesurgeon.adapt import extract
from treesurgeon.core import model
from treesurgeon.io import safetensors, with_lora

Q, UP, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.norm"
EMBED, HEAD = "model.embed_tokens", "lm_head"
RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


class Raw(model.Model):
  """Tensors by their flat names, as a source."""

  def __init__(self, tensors):
    super().__init__(None, tensors)

  def addresses(self):
    return list(self.params)

  def leaf(self, address):
    return self.params[address]

  def struct(self, address):
    return jax.eval_shape(lambda: jnp.asarray(self.params[address]))


def tensors():
  return {
    f"{EMBED}.weight": normal(9, 6),
    f"{Q}.weight": normal(6, 6),
    f"{Q}.bias": normal(6),
    f"{UP}.weight": normal(10, 6),
    f"{NORM}.weight": normal(6),
    f"{HEAD}.weight": normal(9, 6),
  }


def changed(base, **by):
  """Returns a copy, the named tensors changed."""
  return {**base, **{k: base[k] + x for k, x in by.items()}}


def test_the_factors_are_the_best_of_their_rank():
  w, w0 = normal(7, 5), normal(7, 5)
  a, b, s = extract.decompose(w, w0, rank=2)
  u, want, vt = np.linalg.svd((w - w0).astype(np.float64), full_matrices=False)
  np.testing.assert_allclose(s, want, rtol=1e-5)
  np.testing.assert_allclose(b @ a, (u[:, :2] * want[:2]) @ vt[:2], atol=1e-5)
  np.testing.assert_allclose(np.sum(a * a, 1), want[:2], rtol=1e-5)  # evenly shared
  np.testing.assert_allclose(np.sum(b * b, 0), want[:2], rtol=1e-5)


def test_a_planted_change_is_recovered(tmp_path):
  base = tensors()
  tuned = changed(base, **{f"{UP}.weight": normal(10, 2) @ normal(2, 6)})
  done = extract.extract(Raw(base), Raw(tuned), tmp_path / "out", max_rank=5, epsilon=1e-4)
  assert done.ranks == {UP: 2} and done.errors[UP] < 1e-6
  assert not done.saved and not done.biases and not done.left
  back = with_lora.WithLora(Raw(base), tmp_path / "out")
  for name in base:
    np.testing.assert_allclose(back.leaf(name), tuned[name], atol=1e-5)


def test_full_rank_and_modules_in_full_give_the_fine_tune(tmp_path):
  base = tensors()
  tuned = {k: v + 0.1 * normal(*v.shape) for k, v in base.items()}
  done = extract.extract(Raw(base), Raw(tuned), tmp_path / "out", max_rank=64, base_model="b")
  assert done.ranks == {Q: 6, UP: 6} and done.biases == [Q]
  assert sorted(done.saved) == sorted([EMBED, HEAD, NORM])
  config = json.loads((tmp_path / "out" / with_lora.CONFIG).read_text())
  # "norm" alone would also match other norms in a larger model, but here it is the only one.
  assert config["modules_to_save"] == ["embed_tokens", "lm_head", "norm"]
  assert (config["bias"], config["r"], config["lora_alpha"]) == ("all", 6, 6)
  assert config["base_model_name_or_path"] == "b"
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
    with_lora.CONFIG,
    with_lora.WEIGHTS,
  ]
  back = with_lora.WithLora(Raw(base), tmp_path / "out")
  for name in base:
    np.testing.assert_allclose(back.leaf(name), tuned[name], atol=1e-5)


def test_ranks_differ_and_bound_the_error(tmp_path):
  base = tensors()
  tuned = changed(
    base, **{f"{UP}.weight": normal(10, 6), f"{Q}.weight": normal(6, 1) @ normal(1, 6)}
  )
  done = extract.extract(Raw(base), Raw(tuned), tmp_path / "out", max_rank=3, epsilon=1e-4)
  assert done.ranks == {Q: 1, UP: 3}
  s = np.linalg.svd(tuned[f"{UP}.weight"] - base[f"{UP}.weight"], compute_uv=False)
  want = np.linalg.norm(s[3:]) / np.linalg.norm(s)
  assert done.errors[UP] == pytest.approx(want, rel=1e-4)
  back = with_lora.WithLora(Raw(base), tmp_path / "out").leaf(f"{UP}.weight")
  got = np.linalg.norm(back - tuned[f"{UP}.weight"]) / np.linalg.norm(s)
  assert got == pytest.approx(want, rel=1e-4)


def test_include_exclude_and_save(tmp_path):
  base = tensors()
  tuned = {k: v + 0.1 * normal(*v.shape) for k, v in base.items()}
  done = extract.extract(
    Raw(base), Raw(tuned), tmp_path / "out", include=["q_proj", "up_proj"], exclude=["embed"],
    save_modules=["up_proj", NORM],
  )  # fmt: skip
  assert list(done.ranks) == [Q] and sorted(done.saved) == sorted([HEAD, UP, NORM])
  assert done.left == [EMBED]
  back = with_lora.WithLora(Raw(base), tmp_path / "out")
  np.testing.assert_array_equal(back.leaf(f"{UP}.weight"), tuned[f"{UP}.weight"])
  np.testing.assert_array_equal(back.leaf(f"{EMBED}.weight"), base[f"{EMBED}.weight"])


def test_a_short_name_is_used_only_where_it_means_no_other_module(tmp_path):
  base = {**tensors(), "model.layers.0.input_layernorm.weight": normal(6)}
  tuned = changed(base, **{f"{Q}.weight": normal(6, 6), f"{NORM}.weight": normal(6)})
  extract.extract(Raw(base), Raw(tuned), tmp_path / "out")
  config = json.loads((tmp_path / "out" / with_lora.CONFIG).read_text())
  assert config["modules_to_save"] == [NORM]  # "norm" would match input_layernorm
  assert config["target_modules"] == ["q_proj"] and config["bias"] == "none"


def test_weights_that_lie_the_other_way(tmp_path):
  name = "transformer.h.0.attn.c_attn"
  base = {f"{name}.weight": normal(6, 18), "transformer.wte.weight": normal(9, 6)}
  tuned = changed(base, **{f"{name}.weight": normal(6, 2) @ normal(2, 18)})
  extract.extract(Raw(base), Raw(tuned), tmp_path / "out", max_rank=2, model_type="gpt2")
  written = safetensors.open_file(tmp_path / "out" / with_lora.WEIGHTS)
  assert written[f"base_model.model.{name}.lora_A.weight"].shape == (2, 6)
  assert json.loads((tmp_path / "out" / with_lora.CONFIG).read_text())["fan_in_fan_out"]
  back = with_lora.WithLora(Raw(base), tmp_path / "out")
  np.testing.assert_allclose(back.leaf(f"{name}.weight"), tuned[f"{name}.weight"], atol=1e-5)


def test_resized_and_tied_embeddings_are_saved_with_their_head(tmp_path):
  base = tensors()
  del base[f"{HEAD}.weight"]
  tuned = changed(base, **{f"{Q}.weight": normal(6, 6)})
  tuned[f"{EMBED}.weight"] = normal(12, 6)
  done = extract.extract(Raw(base), Raw(tuned), tmp_path / "out")
  assert done.saved == [EMBED, HEAD]
  written = safetensors.open_file(tmp_path / "out" / with_lora.WEIGHTS)
  for module in (EMBED, HEAD):
    np.testing.assert_array_equal(
      written[f"base_model.model.{module}.weight"], tuned[f"{EMBED}.weight"]
    )


def test_factors_take_the_storage_dtype_unless_told(tmp_path):
  base = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors().items()}
  tuned = changed(base, **{f"{Q}.weight": normal(6, 6).astype(ml_dtypes.bfloat16)})
  for dtype, want in ((None, "bfloat16"), ("float32", "float32")):
    out = tmp_path / want
    extract.extract(Raw(base), Raw(tuned), out, dtype=dtype)
    written = safetensors.open_file(out / with_lora.WEIGHTS)
    assert {written.info(n).dtype.name for n in written} == {want}


BASE = tensors()
TUNED = changed(BASE, **{f"{Q}.weight": normal(6, 6)})
BAD = {
  "equal": (BASE, {}, "no linear weight to extract changed; what changed is nothing"),
  "norm": (changed(BASE, **{f"{NORM}.weight": 1.0}), {}, f"what changed is {NORM}"),
  "rank": (TUNED, {"max_rank": 0}, "max_rank=0 must be an integer of 1 or more"),
  "epsilon": (TUNED, {"epsilon": -1.0}, "epsilon=-1.0 must be a number of 0 or more"),
  "expression": (TUNED, {"include": ["("]}, r"include='\(' is no regular expression"),
  "unused": (TUNED, {"exclude": ["k_proj"]}, "exclude='k_proj' matches no module"),
  "save": (TUNED, {"save_modules": ["lmhead"]}, "no module 'lmhead'; nearest: lm_head"),
  "missing": (
    {k: v for k, v in TUNED.items() if k != f"{UP}.weight"},
    {},
    f"fine-tune lacks the tensor '{UP}.weight'",
  ),
  "extra": ({**TUNED, "more": normal(2)}, {}, "the base lacks the tensor 'more'"),
  "shape": ({**TUNED, f"{UP}.weight": normal(11, 6)}, {}, r"\(10, 6\), the fine-tune \(11, 6\)"),
}  # fmt: skip


@pytest.mark.parametrize(("tuned", "given", "message"), BAD.values(), ids=BAD.keys())
def test_refuses_and_writes_nothing(tmp_path, tuned, given, message):
  with pytest.raises(ValueError, match=message):
    extract.extract(Raw(BASE), Raw(tuned), tmp_path / "out", **given)
  assert not list(tmp_path.iterdir())


def test_refuses_what_peft_cannot_hold(tmp_path):
  base = {**BASE, "model.layers.0.A_log": normal(4)}
  tuned = {**TUNED, "model.layers.0.A_log": normal(4)}
  with pytest.raises(ValueError, match=r"A_log changed.*exclude='model"):
    extract.extract(Raw(base), Raw(tuned), tmp_path / "out")
  done = extract.extract(Raw(base), Raw(tuned), tmp_path / "out", exclude=["A_log"])
  assert done.left == ["model.layers.0.A_log"]
