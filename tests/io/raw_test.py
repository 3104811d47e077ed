# SPDX-License-Identifier: Apache-2.0
import json
import re

import ml_dtypes
import numpy as np
import pytest

from treesurgeon.core import lineage, needs
from treesurgeon.io import raw, writer

TENSORS = {
  "model.layers.10.w": np.arange(6, dtype=np.float32).reshape(2, 3),
  "model.layers.2.w": np.ones((2, 3), ml_dtypes.bfloat16),
  "position_ids": np.arange(4),
}


def put(directory, tensors=None, config=None):
  with writer.Writer(directory) as out:
    for name, array in (TENSORS if tensors is None else tensors).items():
      out.write(name, array)
  (directory / "config.json").write_text(json.dumps(config or {"model_type": "mystery"}))
  return directory


def test_a_directory_is_read_under_the_files_own_names(tmp_path):
  source = raw.Directory(put(tmp_path / "m"))
  assert isinstance(source, needs.Source) and source.spec is None
  assert source.addresses() == list(TENSORS)
  for name, array in TENSORS.items():
    source.prefetch(name)
    np.testing.assert_array_equal(source.leaf(name), array)
    assert source.struct(name).shape == array.shape and source.struct(name).dtype == array.dtype
  assert source.config["model_type"] == "mystery" and source.lineage == ()
  assert set(source.digests) == {"config.json", "model.safetensors"} and len(source.digest()) == 64
  (tmp_path / "m" / "config.json").unlink()
  assert raw.Directory(tmp_path / "m").config == {}


def test_what_cannot_be_read_is_named(tmp_path):
  source = raw.Directory(put(tmp_path / "m"))
  with pytest.raises(ValueError, match=re.escape("no tensor 'model.layers.3.w'; nearest: model")):
    source.leaf("model.layers.3.w")
  bad = raw.Directory(put(tmp_path / "bad", {"w": np.array([1.0, np.nan], np.float32)}))
  with pytest.raises(ValueError, match=r"tensor 'w' holds 1 NaN or Inf"):
    bad.leaf("w")
  put(tmp_path / "q", config={"quantization_config": {"quant_method": "gptq"}})
  with pytest.raises(ValueError, match="'quantization_config' tells of quantized"):
    raw.Directory(tmp_path / "q")
  pickled = tmp_path / "p"
  pickled.mkdir()
  (pickled / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(ValueError, match="refused: pickled"):
    raw.Directory(pickled)


def test_a_view_renames_casts_and_compares(tmp_path):
  source = raw.Directory(put(tmp_path / "m"))
  other = raw.Directory(put(tmp_path / "n", {**TENSORS, "position_ids": np.arange(4) + 1}))
  view = raw.View({
    "a": raw.Place(source, "model.layers.2.w", np.float32),
    "b": raw.Place(source, "model.layers.10.w"),
    "ids": raw.Place(source, "position_ids", np.float32, ((source, "position_ids"),)),
    "odd": raw.Place(source, "position_ids", None, ((other, "position_ids"),)),
  })  # fmt: skip
  assert isinstance(view, needs.Source)
  for name in ("a", "b", "ids"):
    view.prefetch(name)
    leaf = view.leaf(name)
    assert (leaf.shape, leaf.dtype) == (view.struct(name).shape, view.struct(name).dtype)
  assert view.struct("a").dtype == np.float32 and view.leaf("a").sum() == 6
  assert view.leaf("ids").dtype == np.int64
  with pytest.raises(ValueError, match=r"odd: .* cannot be merged, and .*n holds others than .*m"):
    view.leaf("odd")


def test_a_sink_writes_config_companions_and_lineage(tmp_path):
  source = put(tmp_path / "m")
  (source / "tokenizer.json").write_text("{}")
  (source / "merges.txt").write_text("old")
  out = tmp_path / "out"
  with raw.Sink(out, {"model_type": "mystery"}, tensors=2, companions=source) as sink:
    assert not sink.done("w")
    sink.write("w", np.ones((3, 2), ml_dtypes.bfloat16))
    sink.write("a.b", np.arange(2))
    done = lineage.Record("merge.linear()")
    assert sink.close((done,), inputs={"base": "00"}, texts={"merges.txt": "new"}) == out
  made = raw.Directory(out)
  assert made.config == {"model_type": "mystery", "torch_dtype": "bfloat16"}
  assert sorted(made.addresses()) == ["a.b", "w"] and made.lineage == (done,)
  assert (out / "tokenizer.json").read_text() == "{}"
  assert (out / "merges.txt").read_text() == "new"
  told = json.loads((out / "lineage.json").read_text())
  assert told["inputs"] == {"base": "00"}
  assert set(told["outputs"]) == {p.name for p in out.iterdir()} - {"lineage.json"}
  with pytest.raises(ValueError, match="exists"):
    raw.Sink(out, {})


def test_a_sink_that_was_not_closed_leaves_nothing(tmp_path):
  with pytest.raises(RuntimeError), raw.Sink(tmp_path / "out", {}) as sink:
    sink.write("w", np.ones(1, np.float32))
    raise RuntimeError
  assert not list(tmp_path.iterdir())


def test_a_single_file_is_a_source_and_gives_tensors_without_a_config(tmp_path):
  file = put(tmp_path / "m") / "model.safetensors"
  source = raw.Directory(file)
  assert source.config == {} and source.addresses() == list(TENSORS) and source.lineage == ()
  assert (
    set(source.digests) == {"model.safetensors"} and source.stamp() == raw.Directory(file).stamp()
  )
  with raw.Sink(tmp_path / "out", source.config) as sink:
    for name in source.addresses():
      sink.write(name, source.leaf(name))
    out = sink.close()
  assert not (out / "config.json").exists()
  assert "raw.Directory" in (out / "README.md").read_text()
  assert raw.Directory(out).addresses() == list(TENSORS)
