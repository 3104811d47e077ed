# SPDX-License-Identifier: Apache-2.0
"""Patches are small, and come off to the bit."""

import ml_dtypes
import numpy as np
import pytest

from treesurgeon.core import leaves, model
from treesurgeon.merge import patching, weight_patch

DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def draw(seed, scale, dtype=np.float32, layers=2, width=64):
  rng = np.random.default_rng(seed)
  shapes = {"mlp/up/kernel": (48, width), "norm/scale": (48,)}
  return {
    f"layers/{i}/{n}": (scale * rng.standard_normal(s)).astype(dtype)
    for i in range(layers)
    for n, s in shapes.items()
  }


def same(a, b):
  assert a.keys() == b.keys()
  for address in a:
    assert a[address].dtype == b[address].dtype
    assert a[address].tobytes() == b[address].tobytes(), address


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1, 30.0])
def test_taking_off_restores_every_bit(dtype, scale):
  clean = draw(0, 0.1, dtype)
  clean["layers/0/norm/scale"][:4] = [0.0, -0.0, 1e-7, -1e-7]
  patches = [(draw(1, scale), 1.0), (draw(2, scale), -0.3)]
  patched, undo = patching.put(clean, patches)
  if scale > 1e-3:
    assert (patched["layers/0/mlp/up/kernel"] != clean["layers/0/mlp/up/kernel"]).mean() > 0.8
  same(patching.take_off(patched, patches, undo), clean)


def test_subtraction_alone_would_not_restore():
  clean, patch = draw(0, 0.1), draw(1, 0.01)
  patched, _ = patching.put(clean, [(patch, 1.0)])
  name = "layers/0/mlp/up/kernel"
  assert (patched[name] - patch[name] != clean[name]).mean() > 0.1


def test_one_of_several_is_removed_and_another_rescaled():
  clean, first, second = draw(0, 0.1), draw(1, 0.02), draw(2, 0.02)
  both = [(first, 1.0), (second, 0.5)]
  patched, undo = patching.put(clean, both)
  again = patching.take_off(patched, both, undo)
  alone, _ = patching.put(again, [(second, 0.25)])
  wanted, _ = patching.put(clean, [(second, 0.25)])
  same(alone, wanted)


def test_quantized_patches_travel_through_files(tmp_path):
  clean = draw(0, 0.1)
  small = weight_patch.quantize(draw(1, 0.02), bits=4, group_size=16)
  weight_patch.save(tmp_path / "patch", small)
  read = weight_patch.load(tmp_path / "patch")
  assert isinstance(read["layers/0/mlp/up/kernel"], leaves.QuantizedTensor)
  patched, undo = patching.put(clean, [(small, 0.7)])
  patching.save(tmp_path / "undo", undo)
  same(patching.take_off(patched, [(read, 0.7)], patching.load(tmp_path / "undo")), clean)


def test_a_signature_of_few_layers_is_much_smaller_than_the_model(tmp_path):
  models = [model.Part(None, draw(i, 0.1, layers=12, width=1024)) for i in range(3)]
  found = weight_patch.extract(*models, layers=3)
  assert {a.split("/")[1] for a in found} == {"0", "1", "2"}
  for bits, most in ((8, 0.085), (4, 0.055)):
    small = weight_patch.quantize(found, bits=bits, group_size=48)
    weight_patch.save(tmp_path / str(bits), small)
    ratio = weight_patch.size_ratio(tmp_path / str(bits), models[0])
    print(f"{bits}-bit signature of 3 of 12 layers: 1/{1 / ratio:.1f} of the model")
    assert ratio < most


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_what_restores_is_smaller_than_what_is_restored(dtype):
  clean = draw(0, 0.1, dtype)
  _, undo = patching.put(clean, [(draw(1, 0.01), 1.0)])
  share = undo.nbytes() / sum(w.nbytes for w in clean.values())
  print(f"{dtype}: the undo takes {share:.3f} of the patched leaves")
  assert share < 0.35


def test_mistakes_are_named(tmp_path):
  clean, patch = draw(0, 0.1), draw(1, 0.02)
  patched, undo = patching.put(clean, [(patch, 1.0)])
  with pytest.raises(ValueError, match="not the patches that were put on"):
    patching.take_off(patched, [(patch, 0.5)], undo)
  patched["layers/0/norm/scale"] = patched["layers/0/norm/scale"] + 1
  with pytest.raises(ValueError, match="layers/0/norm/scale was changed after it was patched"):
    patching.take_off(patched, [(patch, 1.0)], undo)
  with pytest.raises(ValueError, match="changes layers/0/mlp/up/kernel, which the model lacks"):
    patching.put({}, [(patch, 1.0)])
  with pytest.raises(
    ValueError, match=r"norm/scale: the patch has shape \(48,\), the model \(2,\)"
  ):
    patching.put({**clean, "layers/1/norm/scale": np.ones(2, np.float32)}, [(patch, 1.0)])
  with pytest.raises(ValueError, match="is no weight patch"):
    weight_patch.load(tmp_path)
  with pytest.raises(ValueError, match="holds no undo"):
    patching.load(tmp_path)
  with pytest.raises(ValueError, match="no address matches"):
    weight_patch.extract(*[model.Part(None, clean)] * 3, select="x")
