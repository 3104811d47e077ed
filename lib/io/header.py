# SPDX-License-Identifier: Apache-2.0
"""The safetensors header: read from untrusted bytes, and written.

A file is eight bytes of little-endian header length, a JSON object {name: {dtype, shape,
data_offsets}}, and the data. Everything a header claims is checked against the file before any
tensor is touched: known dtype, byte range equal to shape times item size, ranges inside the file
and covering it without holes or overlaps, no name twice. Unlike the reference implementation every
byte-sized dtype is read as numpy through `ml_dtypes`, 8-bit floats included.

Reference: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_HEADER = 100_000_000  # bytes; the reference implementation's limit
_MAX_DIMS = 32
_DTYPES = {
  "BOOL": np.bool_,
  "U8": np.uint8,
  "I8": np.int8,
  "U16": np.uint16,
  "I16": np.int16,
  "U32": np.uint32,
  "I32": np.int32,
  "U64": np.uint64,
  "I64": np.int64,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F32": np.float32,
  "F64": np.float64,
  "C64": np.complex64,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "F8_E8M0": ml_dtypes.float8_e8m0fnu,
  "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
  "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
DTYPES: Mapping[str, np.dtype] = {name: np.dtype(kind) for name, kind in _DTYPES.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Info(NamedTuple):
  """What a header says of one tensor; offsets count from the start of the data."""

  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  stop: int


def parse(raw: bytes, *, data_bytes: int, file: str) -> dict[str, Info]:
  """Read and check a header.

  Args:
    raw: the JSON part, without the length before it.
    data_bytes: bytes in the file after the header.
    file: name used in messages.

  Returns:
    Name to `Info`, in file order.

  Raises:
    ValueError: naming the file, the tensor, the value and what would be valid.

  Example:
    >>> raw = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    >>> parse(raw, data_bytes=8, file="model.safetensors")["w"].shape
    (2,)
  """
  try:
    table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file}: the header is not valid JSON: {error}") from error
  if not isinstance(table, dict):
    raise ValueError(f"{file}: the header must be a JSON object; got {type(table).__name__}")
  metadata = table.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise ValueError(f"{file}: __metadata__ must map strings to strings")
  infos = {name: _info(name, entry, file) for name, entry in table.items()}
  infos = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)))
  at = 0
  for name, info in infos.items():
    if info.stop > data_bytes:
      raise ValueError(
        f"{file}: truncated: tensor {name!r} ends at data byte {info.stop}, but the file holds "
        f"{data_bytes}; copy or download it again"
      )
    if info.start != at:
      word = "overlaps the tensor before it" if info.start < at else "leaves a hole before it"
      raise ValueError(
        f"{file}: corrupt header: tensor {name!r} {word}: it starts at data byte {info.start}, "
        f"expected {at}"
      )
    at = info.stop
  if at != data_bytes:
    raise ValueError(
      f"{file}: corrupt: the tensors end at data byte {at}, but the file holds {data_bytes}"
    )
  return infos


def build(infos: Mapping[str, Info], *, reserve: int = 0) -> bytes:
  """Write a header, its length included, padded with spaces.

  Args:
    infos: name to `Info`, in file order.
    reserve: total bytes to fill; 0 pads to a multiple of eight.

  Returns:
    The bytes that come before the data.

  Raises:
    ValueError: if the header does not fit into `reserve`.

  Example:
    >>> len(build({"w": Info(np.dtype("float32"), (2,), 0, 8)}, reserve=256))
    256
  """
  table: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for the format
  for name, info in infos.items():
    table[name] = entry(info)
  text = json.dumps(table, separators=(",", ":")).encode()
  size = reserve or 8 + -(-len(text) // 8) * 8
  if len(text) + 8 > size or size - 8 > MAX_HEADER:
    raise ValueError(
      f"the header takes {len(text) + 8} bytes; at most {min(size, MAX_HEADER)} are there for it"
    )
  return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def entry(info: Info) -> dict[str, Any]:
  """Describe one tensor as the header's JSON does.

  Args:
    info: dtype, shape and offsets.

  Returns:
    A JSON object.

  Example:
    >>> entry(Info(np.dtype("int8"), (3,), 0, 3))
    {'dtype': 'I8', 'shape': [3], 'data_offsets': [0, 3]}
  """
  return {
    "dtype": _NAMES[info.dtype],
    "shape": list(info.shape),
    "data_offsets": [info.start, info.stop],
  }


def check_dtype(name: str, dtype: Any) -> np.dtype:
  """Refuse a dtype that the format cannot hold.

  Args:
    name: the tensor, for the message.
    dtype: numpy or ml_dtypes dtype.

  Returns:
    The dtype.

  Raises:
    ValueError: for sub-byte integers and anything else the format lacks.

  Example:
    >>> check_dtype("w", np.float32)
    dtype('float32')
  """
  dtype = np.dtype(dtype)
  if dtype not in _NAMES:
    valid = ", ".join(str(d) for d in _NAMES)
    raise ValueError(
      f"tensor {name!r}: safetensors cannot hold dtype {dtype}; pack it into uint8, or use {valid}"
    )
  return dtype


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  out = {}
  for key, value in pairs:
    if key in out:
      raise ValueError(f"{key!r} is listed twice")
    out[key] = value
  return out


def _info(name: str, item: Any, file: str) -> Info:
  """Check one tensor's entry by itself."""
  where = f"{file}: tensor {name!r}"
  fields = {"dtype", "shape", "data_offsets"}
  if not isinstance(item, dict) or set(item) != fields:
    raise ValueError(f"{where}: its entry must hold exactly {', '.join(sorted(fields))}")
  kind, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
  if not isinstance(kind, str) or kind not in DTYPES:
    raise ValueError(f"{where}: unknown dtype {kind!r}; known: {', '.join(DTYPES)}")
  if not _naturals(shape) or len(shape) > _MAX_DIMS:
    raise ValueError(
      f"{where}: shape {shape!r} must be a list of at most {_MAX_DIMS} sizes of 0 or more"
    )
  if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise ValueError(f"{where}: data_offsets {offsets!r} must be [start, stop], start <= stop")
  if math.prod(max(1, n) for n in shape) >= 2**60:
    raise ValueError(f"{where}: shape {shape} is larger than any file")
  dtype = DTYPES[kind]
  size, held = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
  if size != held:
    raise ValueError(
      f"{where}: shape {shape} of {kind} takes {size} bytes, but data_offsets span {held}"
    )
  return Info(dtype, tuple(shape), *offsets)


def _naturals(values: Any) -> bool:
  return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)
