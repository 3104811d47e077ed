# SPDX-License-Identifier: Apache-2.0
"""Write a model as a Hugging Face directory, leaf by leaf or whole."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from treesurgeon.core import leaves, lineage, model
from treesurgeon.io import (
  card,
  checkpoint,
  layouts,
  packed,
  safetensors,
  tokenizer,
  tokenizer_files,
  writer,
)
from treesurgeon.models import hf

# Files that belong to a model and that surgery does not change.
COMPANIONS = (
  "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json",
  "added_tokens.json", "chat_template*", "spiece.model", "*processor_config.json", "LICENSE*",
  "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_README = "README.md"


class Sink:
  """Take leaves in any order and write each as soon as its tensor is complete.

  Leaves that a file fuses (GPT-2's q, k and v) wait for each other. A sink is a context manager
  that gives up unless `close` was called.

  Args:
    directory: the output, which must not exist unless `overwrite`.
    spec: architecture of the model written.
    overwrite: replace an existing output when the new one is complete.
    max_shard_bytes: data bytes after which a new file begins.
    companions: directory from which tokenizer, generation config and license are copied.
    job: fingerprint of everything the leaves depend on; a run with the fingerprint of a killed one
      resumes it.
    layout: how another tool stores compressed leaves; None stores them our way.

  Raises:
    ValueError: if the output exists, is being written by another process, or the family has
      no tensor names.
  """

  def __init__(
    self,
    directory: str | Path,
    spec: Any,
    *,
    overwrite: bool = False,
    max_shard_bytes: int | float = writer.MAX_SHARD_BYTES,
    companions: str | Path | None = None,
    job: str | None = None,
    layout: layouts.Layout | None = None,
  ):
    self.spec, self._layout = spec, layout
    self._companions = None if companions is None else safetensors.check_folder(companions)
    self._entries = hf.entries(spec)
    self._owner = {a: e for e in self._entries for a in e.address}
    self._pending: dict[str, dict[str, Any]] = {}
    self._written: set[str] = set()
    # Room for a header in which every kernel is compressed into three parts, or the layout's four.
    room = 4096 + (600 if layout is None else 800) * len(self._entries)
    self._writer = open_writer(
      directory, room, overwrite=overwrite, max_shard_bytes=max_shard_bytes, job=job
    )

  def __enter__(self) -> "Sink":
    return self

  def __exit__(self, kind: Any, *rest: Any) -> None:
    del rest
    if not self._closed:
      self._writer.abort()

  _closed = False

  def done(self, address: str) -> bool:
    """Tell whether a killed run of the same job has finished this leaf."""
    entry = self._entry(address)
    note = self._writer.notes.get(self._base(entry, address))
    names = [entry.name] if note is None else note["tensors"]
    return all(map(self._writer.done, names))

  def write(self, address: str, leaf: Any) -> None:
    """Write one leaf, or keep it until the rest of its fused tensor comes.

    Args:
      address: where it belongs.
      leaf: array or compressed leaf.

    Raises:
      ValueError: for an unknown address, a wrong shape, or a dtype no file can hold.
      OSError: if the disk is full.
    """
    entry = self._entry(address)
    want = tuple(hf.address_shape(self.spec, address))
    if tuple(leaf.shape) != want:
      raise ValueError(f"leaf {address} has shape {tuple(leaf.shape)}; the spec says {want}")
    self._written.add(address)
    if self.done(address):
      return
    waiting = self._pending.setdefault(entry.name, {})
    waiting[address] = leaf
    absent = [a for a in entry.address if a not in waiting and not self.done(a)]
    if absent:
      return
    del self._pending[entry.name]
    if len(waiting) == len(entry.address) and not any(map(leaves.is_leaf, waiting.values())):
      host = {a: np.asarray(x) for a, x in waiting.items()}
      self._writer.write(entry.name, hf.to_tensor(self.spec, entry, host))
      return
    if self._layout is not None:
      self._write_all(entry.name, None, layouts.encode(self._layout, self.spec, entry, waiting))
      return
    for a, x in waiting.items():
      base = self._base(entry, a)
      meta, parts = leaves.to_parts(x)
      self._write_all(base, meta, {packed.join(base, p): np.asarray(v) for p, v in parts.items()})

  def leaf(self, address: str) -> Any:
    """Read back a leaf that a killed run of the same job has finished.

    Args:
      address: one for which `done` holds.

    Returns:
      A host array, or a compressed leaf of host arrays.
    """
    entry = self._entry(address)
    base = self._base(entry, address)
    note = self._writer.notes.get(base)
    if note is None:
      return hf.to_leaves(self.spec, entry, self._writer.read(entry.name))[address]
    arrays = {name.partition("::")[2]: self._writer.read(name) for name in note["tensors"]}
    shape = tuple(hf.address_shape(self.spec, address))
    return packed.build(note["meta"], arrays, shape=shape, where=f"{address} in the journal")

  @property
  def state(self) -> Mapping[str, Any]:
    """What `flush` was last given, by a killed run of the same job too."""
    return self._writer.state

  def flush(self, state: Mapping[str, Any]) -> None:
    """Make what was written, and JSON beside it, outlive the process.

    Args:
      state: what a run needs to go on.
    """
    self._writer.flush(state)

  def close(
    self,
    records: Sequence[lineage.Record] = (),
    *,
    inputs: Mapping[str, str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
  ) -> Path:
    """Write config, companions, model card and lineage, and put the directory in its place.

    Args:
      records: the model's whole lineage, oldest first.
      inputs: input file to sha256.
      evaluation: measure to value, or to {"before", "after"}.

    Returns:
      The output directory.

    Raises:
      ValueError: if a leaf was never written.
    """
    absent = [a for a in self._owner if a not in self._written and not self.done(a)]
    if absent:
      raise ValueError(
        f"{self._writer.stage.directory}: {len(absent)} leaves were never written: "
        f"{', '.join(absent[:5])}"
      )
    metas = {base: note["meta"] for base, note in self._writer.notes.items()}
    if self._layout is None:
      config, reasons = hf.to_config(self.spec) | packed.describe(metas), _reasons(self.spec, metas)
    else:
      config = hf.to_config(self.spec) | dict.fromkeys(self._layout.keys, dict(self._layout.config))
      reasons = ()
    finish(
      self._writer, config, self._companions, records, inputs=inputs or {},
      evaluation=evaluation or {}, reasons=reasons,
    )  # fmt: skip
    self._closed = True
    return self._writer.stage.directory

  def _entry(self, address: str) -> hf.Entry:
    if address not in self._owner:
      hf.address_shape(self.spec, address)  # raises for an address that the spec lacks
      raise ValueError(f"no tensor of a {self.spec.family} file holds the leaf {address!r}")
    return self._owner[address]

  def _base(self, entry: hf.Entry, address: str) -> str:
    """Name what the parts of a compressed leaf are named after."""
    alone = len(entry.address) == 1 or self._layout is not None
    return entry.name if alone else address

  def _write_all(self, base: str, meta: Any, tensors: Mapping[str, np.ndarray]) -> None:
    # Wide items first, which keeps them aligned in the file.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    self._writer.notes[base] = {"meta": meta, "tensors": order}
    for name in order:
      self._writer.write(name, tensors[name])


def save(
  m: model.Model,
  directory: str | Path,
  *,
  overwrite: bool = False,
  max_shard_bytes: int | float = writer.MAX_SHARD_BYTES,
  tokenizer_from: str | Path | None = None,
  dtype: Any = None,
  inputs: Mapping[str, str] | None = None,
  evaluation: Mapping[str, Any] | None = None,
) -> Path:
  """Write a model as a Hugging Face directory, atomically.

  Args:
    m: the model.
    directory: the output, which must not exist unless `overwrite`.
    overwrite: replace an existing output when the new one is complete.
    max_shard_bytes: data bytes after which a new file begins.
    tokenizer_from: directory whose tokenizer, generation config and license come along.
    dtype: what floating arrays become; None keeps theirs. Compressed leaves stay.
    inputs: input file to sha256, for the lineage.
    evaluation: measures, for the lineage and the card.

  Returns:
    The output directory.

  Raises:
    ValueError: if the output exists, or a leaf does not fit the spec.
    OSError: if the disk is full.

  Example:
    >>> import jax, tempfile
    >>> from treesurgeon import io, models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> m = model.Model(spec, models.init(spec, jax.random.key(0)))
    >>> with tempfile.TemporaryDirectory() as root:
    ...   out = io.save(m, f"{root}/out")
    ...   io.load(out).addresses() == m.addresses()
    True
  """
  with Sink(
    directory, m.spec, overwrite=overwrite, max_shard_bytes=max_shard_bytes,
    companions=tokenizer_from,
  ) as sink:  # fmt: skip
    for entry in hf.entries(m.spec):
      for address in entry.address:
        leaf = m.leaf(address)
        plain = not leaves.is_leaf(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        sink.write(address, leaf.astype(dtype) if dtype is not None and plain else leaf)
    return sink.close(m.lineage, inputs=inputs, evaluation=evaluation)


def header_bytes(spec: Any, data: int, max_shard_bytes: int = writer.MAX_SHARD_BYTES) -> int:
  """Bound what the headers of a model's files take.

  Args:
    spec: architecture of the model.
    data: bytes of all tensors.
    max_shard_bytes: data bytes after which a new file begins.

  Returns:
    Bytes. Two files in a row hold more than the limit, unless a tensor exceeds it alone.

  Example:
    >>> from treesurgeon import models
    >>> header_bytes(models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8), 10**6)
    12288
  """
  return _pages(4096 + 600 * len(hf.entries(spec))) * (1 + 2 * (data // max_shard_bytes))


def open_writer(
  directory: str | Path, room: int, *, job: str | None, **limits: Any
) -> writer.Writer:
  """Open a writer whose job is bound to the versions that its bits depend on.

  Args:
    directory: the output.
    room: bytes to keep for each file's header, rounded up and bounded.
    job: fingerprint of everything the tensors depend on, or None.
    **limits: `overwrite` and `max_shard_bytes` of `writer.Writer`.

  Returns:
    The writer.
  """
  if job is not None:  # other versions may compute other bits
    job = f"{job} {json.dumps(lineage.versions(), sort_keys=True)}"
  return writer.Writer(directory, job=job, header_bytes=_pages(room), **limits)


def finish(
  out: writer.Writer,
  config: Mapping[str, Any],
  companions: Path | None,
  records: Sequence[lineage.Record],
  *,
  inputs: Mapping[str, str],
  evaluation: Mapping[str, Any],
  reasons: Sequence[str] = (),
  texts: Mapping[str, str] | None = None,
  recipe: str = "",
) -> None:
  """Write what belongs to a model besides its weights, and put the directory in its place.

  Args:
    out: a writer that has all the weights.
    config: content of config.json; its dtype is set to what most bytes are. Nothing but tensors is
      known of an output without one.
    companions: directory whose tokenizer, generation config and license come along, or None.
    records: the model's whole lineage, oldest first.
    inputs: input file to sha256.
    evaluation: measure to value, or to {"before", "after"}.
    reasons: why other libraries cannot load it, a phrase a reason.
    texts: further files, name to content; one that is also a companion replaces it.
    recipe: YAML that the last record carried out, for the card.
  """
  stage, texts = out.stage, texts or {}
  files = out.seal()
  config, settings = dict(config), {}
  if config:
    _set_dtype(config, safetensors.Tensors(list(files.values())))
    settings[checkpoint.CONFIG] = json.dumps(config, indent=2) + "\n"
  # A tokenizer that is given replaces all of the old one's files, in whatever format.
  old = tokenizer_files.PATTERNS if tokenizer.FILE in texts else ()
  copied = [
    path
    for path in _companions(companions)
    if path.name not in texts and not any(path.match(pattern) for pattern in old)
  ]
  for path in copied:
    stage.copy(path)
  text = card.model_card(
    stage.directory.name, records, config=config, evaluation=evaluation, ours_only=reasons,
    recipe=recipe,
  )  # fmt: skip
  written = {**settings, _README: text, **texts}
  for name, content in written.items():
    stage.text(name, content)
  names = [*written, *(p.name for p in copied)]
  digests = checkpoint.hash_files([stage.path / n for n in names])
  weights = checkpoint.hash_files(list(files.values()))
  digests |= {name: weights[path.name] for name, path in files.items()}
  content = card.lineage_json(records, inputs=inputs, outputs=digests, evaluation=evaluation)
  stage.text(checkpoint.LINEAGE, content)
  out.commit()


def _pages(room: int) -> int:
  return min(1 << 22, -(-room // 4096) * 4096)


def _companions(directory: Path | None) -> list[Path]:
  if directory is None:
    return []
  found = {p for pattern in COMPANIONS for p in directory.glob(pattern) if p.is_file()}
  return sorted(found)


def _reasons(spec: Any, metas: Mapping[str, Any]) -> list[str]:
  """Say why only we can load the output; nothing if others can."""
  fields = hf.unsupported(spec)
  reasons = ["it holds compressed leaves"] if metas else []
  if spec.family == "treesurgeon":
    reasons.append("its architecture is described in our own terms")
  elif fields:
    reasons.append(f"a {spec.family} config cannot express its {', '.join(fields)}")
  return reasons


def _set_dtype(config: dict[str, Any], tensors: safetensors.Tensors) -> None:
  """Name the dtype of most bytes, under the key the config uses."""
  held: Counter[str] = Counter()
  for name in tensors:
    info = tensors.info(name)
    if info.dtype.name in ("float16", "bfloat16", "float32", "float64"):
      held[info.dtype.name] += info.stop - info.start
  if held:
    config["dtype" if "dtype" in config else "torch_dtype"] = held.most_common(1)[0][0]
