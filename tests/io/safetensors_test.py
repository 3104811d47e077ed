# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import re
import tempfile

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as peer
from hypothesis import strategies as st

from treesurgeon.io import blocks, header, safetensors, writer

LOADABLE = ("float32", "float16", "float64", "int8", "int64", "uint8", "uint16", "bool")


def raw(table, data=b"", length=None):
  text = table if isinstance(table, bytes) else json.dumps(table).encode()
  return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape, start, stop, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def random_array(rng, dtype, shape):
  dtype = np.dtype(dtype)
  if dtype == np.bool_:
    return rng.integers(0, 2, shape).astype(bool)
  size = int(np.prod(shape)) * dtype.itemsize
  return np.frombuffer(rng.bytes(size), dtype).reshape(shape)


@st.composite
def tensors(draw):
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
  names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda n: n != "__metadata__"
  )
  plan = draw(
    st.dictionaries(names, st.tuples(st.sampled_from(list(header.DTYPES.values())), shapes))
  )
  return {name: random_array(rng, dtype, shape) for name, (dtype, shape) in plan.items()}


def same(a, b):
  assert a.dtype == b.dtype and a.shape == b.shape
  assert a.tobytes() == b.tobytes()


@hypothesis.given(tensors(), st.sampled_from([1, 64, 10**9]), st.sampled_from([8, 256, 4096]))
@hypothesis.settings(max_examples=40, deadline=None)
def test_writer_and_reader_round_trip(arrays, shard, room):
  with tempfile.TemporaryDirectory() as root:
    with writer.Writer(f"{root}/out", max_shard_bytes=shard, header_bytes=room) as out:
      for name, x in arrays.items():
        out.write(name, x.T if x.ndim == 2 and len(name) % 2 else x)
    read = safetensors.open_folder(f"{root}/out")
    assert set(read) == set(arrays)
    for name, x in arrays.items():
      same(read[name], x.T if x.ndim == 2 and len(name) % 2 else x)


@hypothesis.given(tensors())
@hypothesis.settings(max_examples=25, deadline=None)
def test_agrees_with_the_safetensors_package(arrays):
  known = {n: x for n, x in arrays.items() if x.dtype.name in (*LOADABLE, "bfloat16")}
  with tempfile.TemporaryDirectory() as root:
    with writer.Writer(f"{root}/out") as out:
      for name, x in known.items():
        out.write(name, x)
    theirs = peer.load_file(f"{root}/out/model.safetensors")
    for name, x in known.items():
      same(theirs[name], x)
    peer.save_file(known, f"{root}/b.safetensors")
    ours = safetensors.open_file(f"{root}/b.safetensors")
    assert set(ours) == set(known)
    for name, x in known.items():
      same(ours[name], x)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_reads_eight_bit_floats_of_the_package(tmp_path, dtype):
  x = np.arange(-3, 3).astype(dtype)
  peer.save_file({"x": x}, tmp_path / "a.safetensors")
  same(safetensors.open_file(tmp_path / "a.safetensors")["x"], x)


def test_views_are_lazy_and_read_only(tmp_path):
  with writer.Writer(tmp_path / "out") as out:
    out.write("w", np.ones((4, 4), np.float32))
  view = safetensors.open_folder(tmp_path / "out")["w"]
  assert view.base is not None
  with pytest.raises(ValueError, match="read-only"):
    view[0, 0] = 2


BAD = {
  "truncated: 3 bytes": b"abc",
  "truncated: the header takes 99 bytes": raw({}, length=99),
  "claims a header of 1099511627776 bytes, valid are up to": raw({}, length=2**40),
  "header is not valid JSON": raw(b"{nonsense"),
  "header is not valid JSON.*": raw(b"[" * 100_000),
  "header is not valid JSON: .*utf-8": raw(b"\xff\xfe"),
  "'w' is listed twice": raw(b'{"w":{},"w":{}}'),
  "must be a JSON object; got list": raw([]),
  "__metadata__ must map strings": raw({"__metadata__": {"a": 1}}),
  "tensor 'w': its entry must hold exactly": raw({"w": {"dtype": "F32"}}),
  "tensor 'w': unknown dtype 'F7'; known: BOOL": raw({"w": entry([1], 0, 4, "F7")}, b"1234"),
  "unknown dtype 'F4'": raw({"w": entry([2], 0, 1, "F4")}, b"1"),
  r"shape \[-1\] must be a list": raw({"w": entry([-1], 0, 4)}, b"1234"),
  r"shape \[True\] must be": raw({"w": entry([True], 0, 4)}, b"1234"),
  r"shape 3 must be": raw({"w": entry(3, 0, 4)}, b"1234"),
  r"data_offsets \[4, 0\] must be": raw({"w": entry([1], 4, 0)}, b"1234"),
  r"data_offsets \[0\] must be": raw({"w": {**entry([1], 0, 4), "data_offsets": [0]}}, b"1234"),
  "larger than any file": raw({"w": entry([2**31, 2**31, 0], 0, 0)}),
  r"shape \[2\] of F32 takes 8 bytes, but data_offsets span 4": raw(
    {"w": entry([2], 0, 4)}, b"1234"
  ),
  "truncated: tensor 'w' ends at data byte 8, but the file holds 4": raw(
    {"w": entry([2], 0, 8)}, b"1234"
  ),
  "'b' overlaps the tensor before": raw({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"123456"),
  "'b' leaves a hole before it": raw({"a": entry([1], 0, 4), "b": entry([1], 5, 9)}, b"123456789"),
  "tensors end at data byte 4, but the file holds 5": raw({"w": entry([1], 0, 4)}, b"12345"),
}


@pytest.mark.parametrize("message", BAD)
def test_corrupt_files(tmp_path, message):
  path = tmp_path / "model.safetensors"
  path.write_bytes(BAD[message])
  with pytest.raises(ValueError, match=message) as caught:
    safetensors.open_folder(tmp_path)
  assert str(path) in str(caught.value)


@hypothesis.given(st.binary(max_size=200), st.integers(0, 60), st.binary(max_size=4))
@hypothesis.settings(max_examples=150, deadline=None)
def test_damage_is_a_value_error_or_harmless(noise, at, patch):
  good = raw({"w": entry([2, 2], 0, 16), "v": entry([1], 16, 20)}, b"x" * 20)
  for blob in (noise, good[:at] + patch + good[at + len(patch) :], good[: len(good) - at - 1]):
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
      file.write(blob)
      file.flush()
      try:
        opened = safetensors.open_file(file.name)
      except ValueError:
        continue
      for name in opened:
        opened[name].tobytes()


def sharded(root, weight_map, files):
  root.mkdir(exist_ok=True)
  for file, names in files.items():
    header_table = {n: entry([1], 4 * i, 4 * i + 4) for i, n in enumerate(names)}
    (root / file).write_bytes(raw(header_table, b"\0" * 4 * len(names)))
  (root / safetensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))
  return root


SHARDS = {"1.safetensors": ["a"], "2.safetensors": ["b"]}
INDICES = {
  r"'\.\./x.safetensors' points outside the directory": {"a": "../x.safetensors"},
  r"'/etc/x.safetensors' points outside the directory": {"a": "/etc/x.safetensors"},
  r"'b/\.\./\.\./x.safetensors' points outside": {"a": "b/../../x.safetensors"},
  r"'x.bin' is not a .safetensors file": {"a": "x.bin"},
  r"tensor 'a': 3 is not a": {"a": 3},
  "weight_map must be an object": ["a"],
  r"missing shard .*/3.safetensors \(1 of 3": {
    "a": "1.safetensors",
    "b": "2.safetensors",
    "c": "3.safetensors",
  },
  "tensor 'c' is missing, though the index lists it": {
    "a": "1.safetensors",
    "b": "2.safetensors",
    "c": "2.safetensors",
  },
  "tensor 'a' is in .*1.safetensors, but the index says 2.safetensors": {
    "a": "2.safetensors",
    "b": "1.safetensors",
  },
  "tensor 'b2' is not listed in the index": {"a": "1.safetensors", "b": "2.safetensors"},
}


@pytest.mark.parametrize("message", INDICES)
def test_bad_indices(tmp_path, message):
  files = SHARDS | ({"2.safetensors": ["b", "b2"]} if "not listed" in message else {})
  sharded(tmp_path, INDICES[message], files)
  with pytest.raises(ValueError, match=message):
    safetensors.open_folder(tmp_path)


def test_tensor_in_two_shards(tmp_path):
  files = {"1.safetensors": ["a"], "2.safetensors": ["b", "a"]}
  sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, files)
  with pytest.raises(ValueError, match=r"'a' is listed twice: in .*1.safe.* and in .*2.safe"):
    safetensors.open_folder(tmp_path)


def test_shards_that_are_links_are_followed(tmp_path):
  sharded(tmp_path / "real", {"a": "1.safetensors", "b": "2.safetensors"}, SHARDS)
  (tmp_path / "snapshot").mkdir()
  for path in (tmp_path / "real").iterdir():
    (tmp_path / "snapshot" / path.name).symlink_to(path)
  assert set(safetensors.open_folder(tmp_path / "snapshot")) == {"a", "b"}


def test_folders_without_weights(tmp_path):
  with pytest.raises(ValueError, match="nowhere does not exist; expected a directory"):
    safetensors.open_folder(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="it holds nothing"):
    safetensors.open_folder(tmp_path)
  (tmp_path / "notes.txt").write_text("x")
  with pytest.raises(ValueError, match="is a file; expected a directory"):
    safetensors.open_folder(tmp_path / "notes.txt")
  with pytest.raises(ValueError, match=r"no model.safetensors and no .*; it holds notes.txt"):
    safetensors.open_folder(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
  refusal = "pytorch_model.bin: refused: .*convert them to safetensors .*weights-only loader"
  with pytest.raises(ValueError, match=refusal):
    safetensors.open_folder(tmp_path)
  with pytest.raises(ValueError, match=refusal):
    safetensors.open_file(tmp_path / "pytorch_model.bin")
  for name in ("a", "b"):
    (tmp_path / f"{name}.safetensors").write_bytes(raw({}))
  with pytest.raises(ValueError, match=r"several weight files \(a.safetensors, b.safetensors\)"):
    safetensors.open_folder(tmp_path)


@pytest.mark.parametrize(
  "dtype",
  ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64"],
)
def test_check_finite(dtype):
  good = np.full((3, 5), 1.5).astype(dtype)
  blocks.check_finite("w", good, "f")
  blocks.check_finite("w", good.T, "f")
  bad = good.copy()
  bad[1, 2] = np.nan
  with pytest.raises(ValueError, match=re.escape("f: tensor 'w' holds 1 NaN or Inf of 15 values")):
    blocks.check_finite("w", bad, "f")
  with pytest.raises(ValueError, match=r"the first \(?nan.* at \[2, 1\]"):
    blocks.check_finite("w", bad.T, "f")


def test_check_finite_sees_infinity_and_passes_integers():
  blocks.check_finite("w", np.full(3, 0xFF, np.uint8), "f")
  blocks.check_finite("w", np.array([np.finfo(np.float32).max, 0], np.float32), "f")
  with pytest.raises(ValueError, match=r"first -inf at \[1\]"):
    blocks.check_finite("w", np.array([0, -np.inf], ml_dtypes.bfloat16), "f")


@hypothesis.given(st.integers(0, 200), st.integers(0, 200))
@hypothesis.settings(max_examples=30, deadline=None)
def test_transposed_copies(rows, cols):
  x = np.arange(rows * cols).astype(ml_dtypes.bfloat16).reshape(rows, cols)
  out = np.empty((cols, rows), x.dtype)
  blocks.copy(out, x.T)
  same(out, np.ascontiguousarray(x.T))


def test_what_was_read_does_not_stay_in_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(safetensors, "RESIDENT", 1 << 20)
  arrays = {f"w{i}": np.full(1 << 20, i, np.uint8) for i in range(16)}
  peer.save_file(arrays, tmp_path / "model.safetensors")
  tensors = safetensors.open_file(tmp_path / "model.safetensors")
  views = {name: tensors[name] for name in arrays}
  for name, x in arrays.items():
    np.testing.assert_array_equal(tensors[name], x)
  pages = pathlib.Path("/proc/self/smaps").read_text().split(str(tmp_path))[1]
  resident = int(pages.split("Rss:")[1].split()[0]) * 1024
  assert resident <= 4 << 20
  np.testing.assert_array_equal(views["w0"], arrays["w0"])


def test_files_that_were_read_before_do_not_stay_in_memory(tmp_path):
  with writer.Writer(tmp_path / "out", max_shard_bytes=1 << 20) as out:
    for i in range(6):
      out.write(f"w{i}", np.full(1 << 20, i, np.uint8))
  tensors = safetensors.open_folder(tmp_path / "out")
  assert [int(tensors[f"w{i}"].sum()) for i in range(6)] == [i << 20 for i in range(6)]
  resident, file = {}, ""
  for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
    if "-of-00006.safetensors" in line:
      file = line.split("/")[-1]
    elif line.startswith("Rss:") and file:
      resident[file] = int(line.split()[1])
      file = ""
  assert len(resident) == 6
  assert sum(x > 0 for x in resident.values()) <= 2
