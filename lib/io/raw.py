# SPDX-License-Identifier: Apache-2.0
"""Directories as bare tensors under their own names, whatever the architecture.

A `Directory` is a `core.needs.Source` whose addresses are the names of the tensors in the files; it
has no spec. A `View` is one whose tensors come from others, renamed and cast on the way. `Sink`
writes tensors under any names, next to a given config.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import lineage, model, needs, paths
from treesurgeon.io import blocks, checkpoint, packed, safetensors, writer
from treesurgeon.io import sink as sink_lib

# Keys of a config.json that tell of tensors which do not hold plain weights.
ENCODED = (packed.KEY, "quantization_config", "compression_config", "quantization")


class Directory:
  """Read a directory's tensors, or a single file's, lazily, under their own names.

  Args:
    directory: safetensors, and a config.json unless only tensors are of interest; or one
      .safetensors file.

  Attributes:
    directory: the path.
    config: content of config.json; empty if there is none.
    tensors: name to tensor.
    spec: None; nothing is known of the architecture.

  Raises:
    ValueError: for no or only pickled weights, corrupt files, or quantized weights.
  """

  spec = None

  def __init__(self, directory: str | Path):
    path = Path(directory)
    single = path.is_file() and path.suffix == ".safetensors"
    self.directory = path if single else safetensors.check_folder(path)
    file = self.directory / checkpoint.CONFIG
    self.config = checkpoint.read_json(file) if file.is_file() else {}
    encoded = [key for key in ENCODED if key in self.config]
    if encoded:
      raise ValueError(
        f"{file}: {encoded[0]!r} tells of quantized or compressed weights, whose numbers cannot be "
        "worked on as they are stored; give the dense model"
      )
    self.tensors = safetensors.open_file(path) if single else safetensors.open_folder(path)

  def addresses(self) -> list[str]:
    """List the names of all tensors, in the order of the files."""
    return list(self.tensors)

  def struct(self, address: str) -> jax.ShapeDtypeStruct:
    """Return a tensor's shape and dtype without touching its data."""
    info = self.tensors.info(self._known(address))
    return jax.ShapeDtypeStruct(info.shape, info.dtype)

  def leaf(self, address: str) -> np.ndarray:
    """Read one tensor as a view into its file; refuses NaN and Inf.

    Args:
      address: a tensor's name.

    Returns:
      A numpy array.

    Raises:
      ValueError: for an unknown name or weights that are not finite.
    """
    array = self.tensors[self._known(address)]
    blocks.check_finite(address, array, self.tensors.file(address))
    return array

  def prefetch(self, address: str) -> None:
    """Ask the operating system to read a tensor ahead of its use."""
    self.tensors.prefetch(self._known(address))

  @functools.cached_property
  def lineage(self) -> tuple[lineage.Record, ...]:
    """Read what was done to the model before, if the directory tells."""
    return checkpoint.read_lineage(self.directory)

  @functools.cached_property
  def digests(self) -> dict[str, str]:
    """Hash the files that make up the model: name to sha256."""
    config = self.directory / checkpoint.CONFIG
    return checkpoint.hash_files([*([config] if config.is_file() else []), *self.tensors.files])

  def digest(self) -> str:
    """Hash the model: one sha256 over its files' names and hashes."""
    return checkpoint.digest(self.digests)

  def stamp(self) -> str:
    """Name the state of the files, without reading them: sizes, times of change, and places."""
    stats = [(str(f), (s := f.stat()).st_size, s.st_mtime_ns) for f in self.tensors.files]
    return hashlib.sha256(repr((stats, self.config)).encode()).hexdigest()

  def _known(self, name: str) -> str:
    if name not in self.tensors:
      near = paths.nearest(name, list(self.tensors))
      raise ValueError(f"{self.directory} has no tensor {name!r}; nearest: {near}")
    return name


class Place(NamedTuple):
  """Where a view's tensor comes from.

  Attributes:
    source: a model.
    name: the tensor's address there.
    dtype: what a floating-point tensor is cast to; None for as it is.
    same: further (source, name) pairs that must hold the same values.
  """

  source: needs.Source
  name: str
  dtype: Any = None
  same: tuple[tuple[needs.Source, str], ...] = ()


class View:
  """Show tensors of other models as one model, each under a name of its own.

  Args:
    places: name to where it comes from.

  Example:
    >>> m = model.Model(None, {"h.0.w": np.ones(2, np.float32)})
    >>> view = View({"h.1.w": Place(m, "h.0.w"), "h.0.w": Place(m, "h.0.w", np.float16)})
    >>> view.addresses(), view.leaf("h.0.w").dtype.name
    (['h.1.w', 'h.0.w'], 'float16')
  """

  spec = None

  def __init__(self, places: Mapping[str, Place]):
    self._places = dict(places)

  def addresses(self) -> list[str]:
    """List the names, in the order given."""
    return list(self._places)

  def struct(self, address: str) -> jax.ShapeDtypeStruct:
    """Return a tensor's shape and dtype as `leaf` will."""
    place = self._places[address]
    struct = place.source.struct(place.name)
    if place.dtype is None or not jnp.issubdtype(struct.dtype, jnp.floating):
      return struct
    return jax.ShapeDtypeStruct(struct.shape, place.dtype)

  def leaf(self, address: str) -> Any:
    """Read one tensor.

    Args:
      address: one of `addresses()`.

    Returns:
      An array.

    Raises:
      ValueError: if a tensor that must be the same elsewhere is not.
    """
    place = self._places[address]
    array = place.source.leaf(place.name)
    for source, name in place.same:
      other = source.leaf(name)
      if other.dtype != array.dtype or not np.array_equal(np.asarray(other), np.asarray(array)):
        raise ValueError(
          f"{address}: its values are no floating-point numbers, which cannot be merged, and "
          f"{_label(source)} holds others than {_label(place.source)}; make them equal first"
        )
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    if place.dtype is None or not floating or array.dtype == np.dtype(place.dtype):
      return array
    return jnp.asarray(array).astype(place.dtype)

  def prefetch(self, address: str) -> None:
    """Ask the operating system to read a tensor ahead of its use."""
    place = self._places[address]
    ahead = getattr(place.source, "prefetch", None)
    if ahead is not None:
      ahead(place.name)


def load(source: needs.Source) -> model.Model:
  """Read all tensors of a source into memory.

  Args:
    source: tensors under any names.

  Returns:
    A model without a spec.

  Example:
    >>> load(View({"w": Place(model.Model(None, {"v": np.ones(2)}), "v")})).leaf("w").tolist()
    [1.0, 1.0]
  """
  return model.Model(None, {name: source.leaf(name) for name in source.addresses()})


class Sink:
  """Write tensors under any names, each as it comes, next to a config.

  A sink is a context manager that gives up unless `close` was called.

  Args:
    directory: the output, which must not exist unless `overwrite`.
    config: content of config.json; its dtype is set to what most bytes are.
    tensors: how many tensors are expected, which makes room in the files' headers.
    overwrite: replace an existing output when the new one is complete.
    max_shard_bytes: data bytes after which a new file begins.
    companions: directory from which tokenizer, generation config and license are copied.
    job: fingerprint of everything the tensors depend on; a run with the fingerprint of a killed
      one resumes it.

  Raises:
    ValueError: if the output exists, or is being written by another process.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...   with Sink(f"{root}/out", {"model_type": "llama"}) as sink:
    ...     sink.write("w", np.ones(2, np.float32))
    ...     out = sink.close()
    ...   Directory(out).leaf("w").tolist()
    [1.0, 1.0]
  """

  def __init__(
    self,
    directory: str | Path,
    config: Mapping[str, Any],
    *,
    tensors: int = 0,
    overwrite: bool = False,
    max_shard_bytes: int | float = writer.MAX_SHARD_BYTES,
    companions: str | Path | None = None,
    job: str | None = None,
  ):
    self._config = dict(config)
    self._companions = None if companions is None else safetensors.check_folder(companions)
    self._writer = sink_lib.open_writer(
      directory, 4096 + 200 * tensors, overwrite=overwrite, max_shard_bytes=max_shard_bytes, job=job
    )

  def __enter__(self) -> "Sink":
    return self

  def __exit__(self, kind: Any, *rest: Any) -> None:
    del rest
    if not self._closed:
      self._writer.abort()

  _closed = False
  pieces = True  # are written as they are computed

  def done(self, address: str) -> bool:
    """Tell whether a killed run of the same job has finished this tensor."""
    return self._writer.done(address)

  def write(self, address: str, leaf: Any) -> None:
    """Write one tensor.

    Args:
      address: its name in the file.
      leaf: array.

    Raises:
      ValueError: for a dtype no file can hold.
      OSError: if the disk is full; finished shards are kept for a rerun of the same job.
    """
    self._writer.write(address, leaf)

  def close(
    self,
    records: Sequence[lineage.Record] = (),
    *,
    inputs: Mapping[str, str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    recipe: str = "",
  ) -> Path:
    """Write config, companions, model card and lineage, and put the directory in its place.

    Args:
      records: the model's whole lineage, oldest first.
      inputs: input file to sha256.
      evaluation: measure to value, or to {"before", "after"}.
      texts: further files, name to content; one that is also a companion replaces it.
      recipe: YAML that the last record carried out, for the model card.

    Returns:
      The output directory.
    """
    sink_lib.finish(
      self._writer, self._config, self._companions, records, inputs=inputs or {},
      evaluation=evaluation or {}, texts=texts or {}, recipe=recipe,
    )  # fmt: skip
    self._closed = True
    return self._writer.stage.directory


def _label(source: Any) -> str:
  return str(getattr(source, "directory", "a model"))
