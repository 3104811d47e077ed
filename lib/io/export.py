# SPDX-License-Identifier: Apache-2.0
"""Write a model so that other tools load it: dense, or quantized the way they do it."""

from pathlib import Path
from typing import Any, NamedTuple

from treesurgeon.core import leaves, lineage, model, needs
from treesurgeon.io import layouts, safetensors, sink
from treesurgeon.models import hf


class Report(NamedTuple):
  """What an export wrote.

  Attributes:
    directory: where.
    nbytes: bytes of all weights.
    size: number of weights that these stand for.
    layers: compressed layers.
    layer_nbytes: their bytes: codes, scales, zero points and indices, no biases.
    layer_size: weights that these stand for.
    notes: what a user must know to load it.
  """

  directory: Path
  nbytes: int
  size: int
  layers: int
  layer_nbytes: int
  layer_size: int
  notes: tuple[str, ...]

  @property
  def bits(self) -> float:
    """Bits a weight, over the whole model."""
    return 8 * self.nbytes / max(1, self.size)

  @property
  def layer_bits(self) -> float:
    """Bits a weight, over the compressed layers."""
    return 8 * self.layer_nbytes / max(1, self.layer_size)

  def __str__(self) -> str:
    told = (
      f"wrote {self.directory}: {self.nbytes:,} bytes of weights, {self.bits:.2f} bits a weight; "
      f"{self.layers} quantized layers, {self.layer_bits:.3f} bits a weight with their scales"
    )
    return "\n".join([told, *(f"note: {note}" for note in self.notes)])


def to_hf(m: model.Model, directory: str | Path, **saving: Any) -> Path:
  """Write a Hugging Face directory that `transformers` loads.

  Args:
    m: the model; compressed leaves are written dense.
    directory: the output.
    **saving: passed on to `sink.save`: overwrite, max_shard_bytes, tokenizer_from, dtype, inputs,
      evaluation.

  Returns:
    The directory.

  Raises:
    ValueError: if no family of `transformers` can express the architecture; what stands in the
      way is named. `sink.save` writes such a model for this library.
  """
  check_family(m.spec, directory)
  dense = m.replace(params=leaves.map_leaves(leaves.dense, m.params))
  return sink.save(dense, directory, **saving)


def to_layout(
  source: needs.Source,
  directory: str | Path,
  *,
  layout: str,
  overwrite: bool = False,
  max_shard_bytes: int | float = sink.writer.MAX_SHARD_BYTES,
  tokenizer_from: str | Path | None = None,
  records: tuple[lineage.Record, ...] = (),
) -> Report:
  """Write a quantized model the way another tool does, leaf by leaf.

  Codes are written bit for bit. Leaves that are dense stay dense, N:M sparse ones are written with
  their zeros, and whatever else the layout cannot hold is refused before a byte is written.

  Args:
    source: the model, or a directory of which one leaf is read at a time.
    directory: the output.
    layout: one of `layouts.NAMES`.
    overwrite: replace an existing output when the new one is complete.
    max_shard_bytes: data bytes after which a new file begins.
    tokenizer_from: directory whose tokenizer, generation config and license come along.
    records: the model's lineage.

  Returns:
    What was written.

  Raises:
    ValueError: if a leaf does not fit: its address, what it is and what would fit are named.
  """
  check_family(source.spec, directory)
  structs = {a: source.struct(a) for a in source.addresses()}
  plan = layouts.plan(layout, source.spec, structs)
  with sink.Sink(
    directory, source.spec, overwrite=overwrite, max_shard_bytes=max_shard_bytes,
    companions=tokenizer_from, layout=plan,
  ) as out:  # fmt: skip
    for entry in hf.entries(source.spec):
      for address in entry.address:
        leaf = source.leaf(address)
        out.write(address, leaves.dense(leaf) if _sparse(leaf) else leaf)
    path = out.close(records)
  return _report(path, plan, structs, source.spec)


def check_family(spec: Any, directory: str | Path) -> None:
  """Require an architecture that a family of `transformers` has.

  Args:
    spec: the architecture.
    directory: the output, for messages.

  Raises:
    ValueError: naming what stands in the way.

  Example:
    >>> from treesurgeon import models
    >>> check_family(models.Spec(family="llama", vocab_size=5, d_model=4, num_layers=1, num_heads=1,
    ...                          d_ff=8), "out")
  """
  ours, odd = spec.family == "treesurgeon", hf.unsupported(spec)
  if ours or odd:
    why = "it belongs to no family; build its Spec with family='llama' or another"
    if not ours:
      why = f"the config of {spec.family!r} cannot express {', '.join(odd)}"
    raise ValueError(f"{directory}: transformers cannot load this architecture: {why}")


def _sparse(leaf: Any) -> bool:
  return isinstance(leaf, leaves.SparseTensor)


def _report(path: Path, plan: layouts.Layout, structs: dict[str, Any], spec: Any) -> Report:
  """Count what is on disk."""
  tensors = safetensors.open_folder(path)
  held = {name: tensors.info(name) for name in tensors}
  nbytes = {name: info.stop - info.start for name, info in held.items()}
  chosen = set(plan.modules)
  inside = [n for n in held if n.rpartition(".")[0] in chosen and not n.endswith(".bias")]
  owners = {e.name.removesuffix(".weight"): e for e in hf.entries(spec)}
  sizes = {a: leaf.size for a, leaf in structs.items()}
  return Report(
    path, sum(nbytes.values()), sum(sizes.values()), len(chosen), sum(nbytes[n] for n in inside),
    sum(sizes[a] for name in chosen for a in owners[name].address), plan.notes,
  )  # fmt: skip
