# SPDX-License-Identifier: Apache-2.0
"""Adapters folded into raw tensors: arithmetic against float64, orientation, and what is refused.

`tests/peers/mergekit_extras_test.py` compares with peft's own merge.
"""

import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest

from treesurgeon.core import needs
from treesurgeon.io import with_lora, writer

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
  return RNG.normal(size=shape).astype(dtype)


class Raw:
  """Tensors by name, as a source."""

  spec = types.MappingProxyType({"model_type": "llama"})

  def __init__(self, tensors):
    self.tensors = tensors

  def addresses(self):
    return list(self.tensors)

  def leaf(self, address):
    return self.tensors[address]

  def struct(self, address):
    x = self.tensors[address]
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def base(dtype=np.float32):
  return Raw({
    f"{Q}.weight": normal(6, 6, dtype=dtype),
    f"{UP}.weight": normal(10, 6, dtype=dtype),
    "model.embed_tokens.weight": normal(7, 6, dtype=dtype),
    "lm_head.weight": normal(7, 6, dtype=dtype),
    "model.norm.weight": normal(6, dtype=dtype),
  })  # fmt: skip


def pair(module, out, width, rank=2):
  name = f"base_model.model.{module}"
  return {f"{name}.lora_A.weight": normal(rank, width), f"{name}.lora_B.weight": normal(out, rank)}


@pytest.fixture
def adapter(tmp_path):
  """Writes adapters as peft does."""

  def go(tensors, **config):
    path = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
    with writer.Writer(path) as out:
      for name, x in tensors.items():
        out.write(name, x)
    (path / "model.safetensors").rename(path / with_lora.WEIGHTS)
    table = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (path / with_lora.CONFIG).write_text(json.dumps(table))
    return path

  return go


def delta(tensors, module, scale):
  a, b = (tensors[f"base_model.model.{module}.lora_{p}.weight"].astype(np.float64) for p in "AB")
  return scale * b @ a


def test_is_a_source_and_adds_the_product_in_float32(adapter):
  source, tensors = base(), pair(UP, 10, 6)
  model = with_lora.WithLora(source, adapter(tensors))
  assert isinstance(model, needs.Source) and model.addresses() == source.addresses()
  assert model.spec is source.spec and model.struct(f"{UP}.weight").shape == (10, 6)
  want = source.tensors[f"{UP}.weight"] + delta(tensors, UP, 2.0)
  np.testing.assert_allclose(model.leaf(f"{UP}.weight"), want, atol=1e-6)
  assert model.leaf(f"{Q}.weight") is source.tensors[f"{Q}.weight"]  # untouched: not even copied
  model.prefetch(f"{Q}.weight")


def test_rounds_once_to_the_storage_dtype(adapter):
  source, tensors = base(ml_dtypes.bfloat16), pair(UP, 10, 6)
  got = with_lora.WithLora(source, adapter(tensors)).leaf(f"{UP}.weight")
  want = source.tensors[f"{UP}.weight"].astype(np.float64) + delta(tensors, UP, 2.0)
  assert got.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(got, want.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_patterns_and_rank_stabilization_scale(adapter):
  source, tensors = base(), {**pair(UP, 10, 6, rank=4), **pair(Q, 6, 6)}
  config = {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"q_proj": 6}, "use_rslora": True}
  model = with_lora.WithLora(source, adapter(tensors, **config))
  for module, scale in ((UP, 4 / 2.0), (Q, 6 / np.sqrt(2))):
    want = source.tensors[f"{module}.weight"] + delta(tensors, module, scale)
    np.testing.assert_allclose(model.leaf(f"{module}.weight"), want, atol=1e-5)


@pytest.mark.parametrize(("shape", "flag"), [((6, 10), False), ((6, 6), True)])
def test_weights_that_lie_the_other_way(adapter, shape, flag):
  source = Raw({"transformer.h.0.attn.c_attn.weight": normal(*shape)})
  tensors = pair("transformer.h.0.attn.c_attn", shape[1], shape[0])
  model = with_lora.WithLora(source, adapter(tensors, fan_in_fan_out=flag))
  (name,) = source.tensors
  want = source.tensors[name] + delta(tensors, "transformer.h.0.attn.c_attn", 2.0).T
  np.testing.assert_allclose(model.leaf(name), want, atol=1e-6)


def test_embeddings_and_modules_in_full(adapter):
  source, head = base(), normal(7, 6)
  name = "base_model.model.model.embed_tokens"
  tensors = {
    f"{name}.lora_embedding_A": normal(2, 7),
    f"{name}.lora_embedding_B": normal(6, 2),
    f"{name}.base_layer.weight": source.tensors["model.embed_tokens.weight"],
    "base_model.model.lm_head.weight": head,
  }
  model = with_lora.WithLora(source, adapter(tensors, modules_to_save=["lm_head"]))
  a, b = (tensors[f"{name}.lora_embedding_{p}"].astype(np.float64) for p in "AB")
  want = source.tensors["model.embed_tokens.weight"] + 2.0 * (b @ a).T
  np.testing.assert_allclose(model.leaf("model.embed_tokens.weight"), want, atol=1e-6)
  np.testing.assert_array_equal(model.leaf("lm_head.weight"), head)


def test_dora_gives_rows_their_magnitudes(adapter):
  source, magnitude = base(), np.abs(normal(10))
  tensors = {**pair(UP, 10, 6), f"base_model.model.{UP}.lora_magnitude_vector": magnitude}
  got = with_lora.WithLora(source, adapter(tensors, use_dora=True)).leaf(f"{UP}.weight")
  np.testing.assert_allclose(np.linalg.norm(got, axis=1), magnitude, rtol=1e-5)
  want = source.tensors[f"{UP}.weight"] + delta(tensors, UP, 2.0)
  np.testing.assert_allclose(
    got / magnitude[:, None], want / np.linalg.norm(want, axis=1)[:, None], atol=1e-5
  )


def test_biases_and_other_spellings(adapter):
  source = Raw({"model.layers.0.o.weight": normal(4, 4), "model.layers.0.o.bias": normal(4)})
  bias = normal(4)
  tensors = {**pair("layers.0.o", 4, 4), "base_model.model.layers.0.o.lora_B.bias": bias}
  model = with_lora.WithLora(source, adapter(tensors, lora_bias=True))
  want = source.tensors["model.layers.0.o.weight"] + delta(tensors, "layers.0.o", 2.0)
  np.testing.assert_allclose(model.leaf("model.layers.0.o.weight"), want, atol=1e-6)
  want = source.tensors["model.layers.0.o.bias"] + 2 * bias
  np.testing.assert_allclose(model.leaf("model.layers.0.o.bias"), want, atol=1e-6)


def test_a_tied_head_that_repeats_the_embedding_is_no_change(adapter):
  source = base()
  del source.tensors["lm_head.weight"]
  rows = normal(7, 6)
  names = ("model.embed_tokens", "lm_head")
  tensors = {f"base_model.model.{n}.weight": rows for n in names}
  model = with_lora.WithLora(source, adapter(tensors))
  np.testing.assert_array_equal(model.leaf("model.embed_tokens.weight"), rows)


def without(tensors, end):
  return {k: v for k, v in tensors.items() if not k.endswith(end)}


EMBED, BOTH = "base_model.model.model.embed_tokens", pair(UP, 10, 6)
BAD = {
  "module": (pair("model.layers.9.mlp.up_proj", 10, 6), {}, "nearest are .*up_proj.*another base"),
  "shape": (pair(UP, 12, 6), {}, r"weight of \(12, 6\).*is \(10, 6\): is the adapter for another"),
  "rank": (pair(UP, 10, 6, rank=3), {}, r"the config's rank is 2"),
  "half": (without(BOTH, "A.weight"), {}, "has no lora_A"),
  "method": (BOTH, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
  "init": (BOTH, {"init_lora_weights": "pissa"}, "adapts a changed base"),
  "setting": (BOTH, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
  "conv": ({k: v[..., None, None] for k, v in BOTH.items()}, {}, "not a matrix"),
  "resized": ({f"{EMBED}.weight": normal(9, 6)}, {}, "resized vocabulary needs the model resized"),
  "nothing": ({}, {}, "holds no tensors"),
  "dora": (
    {**BOTH, f"base_model.model.{UP}.lora_magnitude_vector": normal(3)},
    {"use_dora": True},
    "one a row",
  ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "message"), BAD.values(), ids=BAD.keys())
def test_refuses(adapter, tensors, config, message):
  with pytest.raises(ValueError, match=message):
    with_lora.WithLora(base(), adapter(tensors, **config))


def test_refuses_a_head_that_the_model_ties(adapter):
  source = base()
  del source.tensors["lm_head.weight"]
  with pytest.raises(ValueError, match="head is its embedding"):
    with_lora.WithLora(source, adapter(pair("lm_head", 7, 6)))


def test_refuses_another_base_weight_and_bad_values(adapter):
  source, tensors = base(), pair(UP, 10, 6)
  other = {**tensors, f"base_model.model.{UP}.base_layer.weight": normal(10, 6)}
  with pytest.raises(ValueError, match="a base weight of its own"):
    with_lora.WithLora(source, adapter(other)).leaf(f"{UP}.weight")
  tensors[f"base_model.model.{UP}.lora_A.weight"][0, 0] = np.nan
  with pytest.raises(ValueError, match="NaN"):
    with_lora.WithLora(source, adapter(tensors)).leaf(f"{UP}.weight")


def test_refuses_no_adapter(tmp_path):
  with pytest.raises(ValueError, match=r"adapter_config\.json: no such file"):
    with_lora.WithLora(base(), tmp_path)
