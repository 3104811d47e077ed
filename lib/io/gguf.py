# SPDX-License-Identifier: Apache-2.0
"""Write a model as one GGUF file, through the `gguf` package (`pip install 'treesurgeon[gguf]'`).

Symmetric 4- and 8-bit leaves whose groups are multiples of 32 rows are Q4_0 and Q8_0 code for code;
a scale, rounded to float16, is repeated for every 32 rows. Asymmetric 4-bit ones become Q4_K where
256 divides their rows: its scales and minima have 6 bits under two float16 for every 256 rows, so
the leaf's own are rounded and its values rounded to them anew. Other compressed leaves become dense
and are quantized by `gguf` itself to Q8_0; dense ones stay as they are, vectors in float32. A q or
k of the llama family is stored with the two halves of every head interleaved, as ggml's rotary
embedding expects. The vocabulary comes along where ggml can hold it (ggml_vocabulary.py); where it
cannot, the report says why.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from treesurgeon.core import leaves, lineage, needs, packing
from treesurgeon.io import card, checkpoint, export, ggml_vocabulary, sink, staging
from treesurgeon.io.layouts import modules
from treesurgeon.models import hf

FILE = "model.gguf"
BLOCK, SUPER = 32, 256
# Family: ggml's architecture, and whether its q and k are interleaved.
_FAMILIES = {
  "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False),
  "qwen3": ("qwen3", False),
}  # fmt: skip


class _Tensor(NamedTuple):
  name: str
  entry: hf.Entry
  kind: str
  shape: tuple[int, ...]  # as stored, bytes where quantized


def save(
  source: needs.Source,
  directory: str | Path,
  *,
  overwrite: bool = False,
  tokenizer_from: str | Path | None = None,
  records: tuple[lineage.Record, ...] = (),
) -> export.Report:
  """Write `model.gguf` into a directory, one tensor at a time.

  Args:
    source: the model, or a directory of which one leaf is read at a time.
    directory: the output.
    overwrite: replace an existing output when the new one is complete.
    tokenizer_from: directory whose tokenizer, generation config and license come along; the
      vocabulary is put into the file too.
    records: the model's lineage.

  Returns:
    What was written.

  Raises:
    ValueError: if the package is absent, or ggml has no such architecture.
  """
  try:
    gguf = importlib.import_module("gguf")
  except ImportError as error:
    raise ValueError(
      "--format=gguf needs the gguf package: pip install 'treesurgeon[gguf]'"
    ) from error
  spec = source.spec
  export.check_family(spec, directory)
  if spec.family not in _FAMILIES:
    raise ValueError(f"--format=gguf: {spec.family!r} is not supported; {', '.join(_FAMILIES)} are")
  _check_rotary(spec)
  arch = _FAMILIES[spec.family][0]
  words = _words(tokenizer_from, spec.vocab_size)
  places = gguf.get_tensor_name_map(_arch(gguf, arch), spec.num_layers)
  plan = [_plan(source, entry, places) for entry in hf.entries(spec)]
  stage = staging.Staging(directory, overwrite=overwrite)
  done = False
  try:
    stage.clear()
    writer = gguf.GGUFWriter(stage.path / FILE, arch)
    _describe(writer, spec, arch, words)
    kinds, nbytes = gguf.GGMLQuantizationType, {}
    for tensor in plan:
      dtype = np.dtype(np.float32) if tensor.kind == "F32" else np.dtype(np.uint8)
      size = int(np.prod(tensor.shape)) * dtype.itemsize
      nbytes[tensor.name] = size
      writer.add_tensor_info(tensor.name, tensor.shape, dtype, size, raw_dtype=kinds[tensor.kind])
    with stage.disk():
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
      for tensor in plan:
        writer.write_tensor_data(_data(gguf, source, tensor))
      writer.close()
    _finish(stage, tokenizer_from, records)
    done = True
  finally:
    if not done:
      stage.abort(keep=False)
  return _report(source, stage.directory, plan, nbytes, words)


def _check_rotary(spec: Any) -> None:
  """Refuse what these architectures of ggml do not have."""
  odd = ["rope_scaling"] * (spec.rope_scaling != "none") + ["window"] * bool(np.any(spec.window))
  odd += ["rope_dim"] * (spec.rope_dim not in (None, spec.head_dim))
  if odd:
    raise ValueError(
      f"--format=gguf: {odd[0]}={getattr(spec, odd[0])!r} is not written; "
      "--format=compressed-tensors keeps it"
    )


def _words(folder: str | Path | None, rows: int) -> ggml_vocabulary.Vocabulary | str:
  """Read the vocabulary, or why the file has none."""
  if folder is None:
    return "no tokenizer was given"
  try:
    return ggml_vocabulary.read(folder, rows)
  except ValueError as error:
    return str(error)


def _arch(gguf: Any, name: str) -> Any:
  return next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name)


def _plan(source: needs.Source, entry: hf.Entry, places: Any) -> _Tensor:
  """Settle name, kind and shape of one tensor from shapes alone."""
  name = places.get_name(entry.name, try_suffixes=(".weight", ".bias"))
  if name is None:
    raise ValueError(f"--format=gguf: ggml has no tensor for {', '.join(entry.address)}")
  leaf = source.struct(entry.address[0])
  shape = hf.shape(source.spec, entry)
  if not leaves.is_leaf(leaf):
    if len(shape) == 1 or leaf.dtype == np.float32:
      return _Tensor(name, entry, "F32", shape)
    kind = {"float16": "F16", "bfloat16": "BF16"}.get(np.dtype(leaf.dtype).name)
    return _Tensor(name, entry, kind, (*shape[:-1], 2 * shape[-1])) if kind else (
      _Tensor(name, entry, "F32", shape)
    )  # fmt: skip
  if isinstance(leaf, leaves.SparseTensor) or shape[-1] % BLOCK:
    return _Tensor(name, entry, "F32", shape)
  kind = "Q4_0" if _exact(leaf) and leaf.bits == 4 else "Q4_K" if _nearly(leaf) else "Q8_0"
  size, each = {"Q4_0": (BLOCK, 18), "Q8_0": (BLOCK, 34), "Q4_K": (SUPER, 144)}[kind]
  return _Tensor(name, entry, kind, (*shape[:-1], shape[-1] // size * each))


def _exact(leaf: Any) -> bool:
  """Tell whether ggml has a block that holds a leaf code for code."""
  if (
    not isinstance(leaf, leaves.QuantizedTensor) or leaf.format != "int" or leaf.bits not in (4, 8)
  ):
    return False
  grouped = leaf.group_size % BLOCK == 0 or leaf.group_size >= leaf.rows
  return grouped and leaf.zeros is None and leaf.group_index is None and leaf.group_cols == 1


def _nearly(leaf: Any) -> bool:
  """Tell whether a leaf is of the form of Q4_K but for the precision of its scales."""
  form = isinstance(leaf, leaves.QuantizedTensor) and leaf.plain and leaf.group_index is None
  if not form or leaf.bits != 4 or leaf.zeros is None or leaf.rows % SUPER:
    return False
  return leaf.group_size % BLOCK == 0 and leaf.zeros.dtype == jnp.uint8


def _data(gguf: Any, source: needs.Source, tensor: _Tensor) -> np.ndarray:
  """Read one tensor's leaf and make the bytes of it."""
  spec, address = source.spec, tensor.entry.address[0]
  leaf = source.leaf(address)
  order = _order(spec, address)
  if leaves.is_leaf(leaf) and _exact(leaf) and tensor.kind != "F32":
    return _blocks(leaf, address, order)
  if tensor.kind == "Q4_K":
    return _super(leaf, address, order)
  array = modules.dense(leaf) if leaves.is_leaf(leaf) else np.asarray(leaf)
  array = hf.to_tensor(spec, tensor.entry, {address: array})
  array = np.ascontiguousarray(array if order is None else array[order])
  if tensor.kind == "F32":
    return array.astype(np.float32)
  if tensor.kind in ("F16", "BF16"):
    dtype = np.float16 if tensor.kind == "F16" else ml_dtypes.bfloat16
    return array.astype(dtype).view(np.uint8)
  return gguf.quants.quantize(array.astype(np.float32), gguf.GGMLQuantizationType[tensor.kind])


def _order(spec: Any, address: str) -> np.ndarray | None:
  """Return which of a q's or k's outputs come first, for families whose heads are interleaved."""
  part = address.split("/")
  if not _FAMILIES[spec.family][1] or part[-2] not in ("q", "k"):
    return None
  width = hf.address_shape(spec, address)[-1]
  return np.arange(width).reshape(-1, 2, spec.head_dim // 2).swapaxes(1, 2).reshape(-1)


def _blocks(leaf: leaves.QuantizedTensor, address: str, order: np.ndarray | None) -> np.ndarray:
  """Lay codes and scales out in ggml's blocks of 32, uint8 (outputs, bytes)."""
  codes = packing.unpack(jnp.asarray(leaf.codes), bits=leaf.bits, rows=leaf.rows)
  codes = np.asarray(codes).T.reshape(leaf.cols, -1, BLOCK)
  scales = modules.dense(leaf.scales).astype(np.float32)
  with np.errstate(over="ignore"):
    half = np.repeat(scales, -(-leaf.group_size // BLOCK), 0)[: leaf.rows // BLOCK].T
    half = half.astype(np.float16)
  if not np.isfinite(half).all() or (half == 0).any():
    raise modules.refuse(address, leaf, "its scales are beyond float16, which ggml stores")
  if leaf.bits == 4:  # element j in the low half of byte j, j + 16 in the high one
    body = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
  else:
    body = codes ^ np.uint8(0x80)
  blocks = np.concatenate([half[..., None].view(np.uint8), body], axis=-1)
  blocks = blocks.reshape(leaf.cols, -1)
  return np.ascontiguousarray(blocks if order is None else blocks[order])


def _super(leaf: leaves.QuantizedTensor, address: str, order: np.ndarray | None) -> np.ndarray:
  """Round a leaf to ggml's superblocks of 8 blocks of 32, uint8 (outputs, bytes)."""
  w = modules.dense(leaf).astype(np.float32).T
  w = w.reshape(leaf.cols, -1, SUPER // BLOCK, BLOCK)
  scales = np.asarray(leaf.scales).astype(np.float32)
  own = (scales, scales * np.asarray(leaf.zeros).astype(np.float32))  # w = scale * code - minimum
  wide, units, six = [], [], []
  for group in own:
    each = np.repeat(group, -(-leaf.group_size // BLOCK), 0)[: leaf.rows // BLOCK]
    each = each.T.reshape(leaf.cols, -1, SUPER // BLOCK)
    with np.errstate(over="ignore"):
      unit = (each.max(-1, keepdims=True) / 63).astype(np.float16)
    if not np.isfinite(unit).all():
      raise modules.refuse(address, leaf, "its scales are beyond float16, which ggml stores")
    step = np.where(unit == 0, 1, unit).astype(np.float32)
    code = np.clip(np.round(each / step), 0, 63).astype(np.uint8)
    units.append(unit.view(np.uint8))
    six.append(code)
    wide.append((code * unit.astype(np.float32))[..., None])
  steps = (w + wide[1]) / np.where(wide[0] == 0, 1, wide[0])
  codes = np.clip(np.round(steps), 0, 15).astype(np.uint8)
  pairs = codes.reshape(*codes.shape[:2], SUPER // BLOCK // 2, 2, BLOCK)
  body = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*codes.shape[:2], -1)
  # Six-bit numbers: the first four whole, with the upper bits of the last four above them.
  (s, t), (m, n) = (np.split(x, 2, axis=-1) for x in six)
  packed = [s | t >> 4 << 6, m | n >> 4 << 6, (t & 15) | (n & 15) << 4]
  blocks = np.concatenate([*units, *packed, body], axis=-1).reshape(leaf.cols, -1)
  return np.ascontiguousarray(blocks if order is None else blocks[order])


def _describe(writer: Any, spec: Any, arch: str, words: ggml_vocabulary.Vocabulary | str) -> None:
  """Write the architecture and the vocabulary."""
  writer.add_name(arch)
  writer.add_context_length(spec.max_positions or 2048)
  writer.add_embedding_length(spec.d_model)
  writer.add_block_count(spec.num_layers)
  writer.add_feed_forward_length(spec.d_ff)
  writer.add_head_count(spec.num_heads)
  writer.add_head_count_kv(spec.num_kv_heads or spec.num_heads)
  writer.add_key_length(spec.head_dim)
  writer.add_value_length(spec.head_dim)
  writer.add_layer_norm_rms_eps(spec.norm_eps)
  writer.add_rope_freq_base(float(spec.rope_theta))
  writer.add_rope_dimension_count(spec.head_dim)
  writer.add_vocab_size(spec.vocab_size)
  if isinstance(words, str):
    writer.add_tokenizer_model("no_vocab")
  else:
    words.write(writer)


def _finish(
  stage: staging.Staging, companions: str | Path | None, records: tuple[lineage.Record, ...]
) -> None:
  if companions is not None:
    folder = Path(companions)
    found = {p for pattern in sink.COMPANIONS for p in folder.glob(pattern) if p.is_file()}
    for path in sorted(found):
      stage.copy(path)
  digests = checkpoint.hash_files([stage.path / FILE])
  text = card.lineage_json(records, inputs={}, outputs=digests, evaluation={})
  stage.text(checkpoint.LINEAGE, json.dumps(json.loads(text), indent=2) + "\n")
  stage.commit()


def _report(
  source: needs.Source, path: Path, plan: list[_Tensor], nbytes: dict[str, int],
  words: ggml_vocabulary.Vocabulary | str,
) -> export.Report:  # fmt: skip
  chosen = [t for t in plan if t.kind.startswith("Q")]
  structs = {t.name: source.struct(t.entry.address[0]) for t in plan}
  packed = {t: leaf for t in plan if leaves.is_leaf(leaf := structs[t.name])}
  near = [t.entry.address[0] for t in packed if t.kind == "Q4_K"]
  again = [
    t.entry.address[0] for t, leaf in packed.items() if t.kind != "Q4_K" and not _exact(leaf)
  ]
  if isinstance(words, str):
    notes = [
      f"no vocabulary is in the file: {words}; transformers reads the weights with "
      "gguf_file='model.gguf', llama.cpp runs them on token ids only"
    ]
  else:
    notes = [
      f"the vocabulary is in the file ({words.model}, split as {words.pre!r}): llama.cpp, and "
      "transformers with gguf_file='model.gguf', need no other", *words.notes,
    ]  # fmt: skip
  notes.append("scales are stored in float16")
  if near:
    notes.append(
      f"{len(near)} asymmetric 4-bit leaves, {near[0]} the first, became Q4_K: their scales and "
      "minima were rounded to 6 bits, their values to these"
    )
  if again:
    notes.append(
      f"{len(again)} leaves that no block of ggml holds, {again[0]} the first, were made dense and "
      "quantized to Q8_0 by gguf (F32 where 32 does not divide their rows)"
    )
  sizes = {name: leaf.size for name, leaf in structs.items()}
  return export.Report(
    path, sum(nbytes.values()), sum(sizes.values()), len(chosen),
    sum(nbytes[t.name] for t in chosen), sum(sizes[t.name] for t in chosen), tuple(notes),
  )  # fmt: skip
