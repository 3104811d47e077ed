# SPDX-License-Identifier: Apache-2.0
"""A model with a peft adapter folded in as it is read: what `model+lora` names.

Works on the tensors of a Hugging Face directory under their own names, which are the names that
peft knows its modules by, so it needs no table of architectures. A weight comes as
`W + scale * B A`, computed in float32 and rounded once to the dtype it is stored in; DoRA scales
its rows to their trained magnitudes (Liu et al., 2024, arXiv:2402.09353); modules that were trained
in full replace the model's. Every tensor of the adapter must find its place: an adapter for another
base is an error, not a model that ignores half of it. mergekit merges through `transformers`, which
needs the whole model in memory and rounds `B A` to the adapter's dtype before it adds.

References: Hu et al., 2021, arXiv:2106.09685; https://github.com/huggingface/peft.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from treesurgeon.core import needs
from treesurgeon.io import blocks, checkpoint, peft_config, safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(
  r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.(?:weight|bias)|lora_embedding_[AB]|"
  r"lora_magnitude_vector(?:\.weight)?|base_layer\.(?:weight|bias))"
)
_ROLES = {
  "lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
  "lora_magnitude_vector": "magnitude", "base_layer": "base_layer",
}  # fmt: skip
# Paths that a backbone without a head, or an earlier version of transformers, leaves out or adds.
_STEMS = ("", "model.", "transformer.", "gpt_neox.", "base_model.")
_RENAMED = {"lm_head": "embed_out"}  # what the file of a network keeps from earlier versions


class _Change(NamedTuple):
  """What an adapter does to one tensor: role in the change to the adapter's tensor."""

  module: str
  parts: dict[str, str]


class WithLora:
  """A source with an adapter folded into the tensors it touches.

  Args:
    source: the base model, by the tensor names of its files; arrays must be plain.
    directory: peft adapter: `adapter_config.json` and `adapter_model.safetensors`.

  Attributes:
    source: the base model.
    directory: the adapter.

  Raises:
    ValueError: for another peft method, a tensor that fits nothing in the model or fits it in
      another shape, or a missing factor.
  """

  def __init__(self, source: needs.Source, directory: str | Path):
    self.source, self.directory = source, Path(directory)
    self._config = peft_config.read(self.directory / CONFIG, extras=peft_config.EXTRAS)
    self._tensors = safetensors.open_file(self.directory / WEIGHTS)
    self._names = dict.fromkeys(source.addresses())
    self._changes: dict[str, _Change] = {}
    self._flipped: dict[str, bool] = {}
    for name in self._tensors:
      self._place(name)
    if not self._changes:
      raise ValueError(f"{self.directory / WEIGHTS}: the file holds no tensors")
    for name, change in self._changes.items():
      self._check(name, change)

  @property
  def spec(self) -> Any:
    """Architecture description of the base."""
    return self.source.spec

  def addresses(self) -> Sequence[str]:
    """List the names of every tensor."""
    return list(self._names)

  def struct(self, address: str) -> Any:
    """Describe one tensor's shape and dtype."""
    return self.source.struct(address)

  def leaf(self, address: str) -> Any:
    """Read one tensor, the adapter folded in.

    Args:
      address: one of `addresses()`.

    Returns:
      An array of the base's shape and dtype.

    Raises:
      ValueError: for an unknown name, or values that are not finite.
    """
    base = self.source.leaf(address)
    change = self._changes.get(address)
    if change is None:
      return base
    parts = {role: self._read(name) for role, name in change.parts.items()}
    base = np.asarray(base)
    if "full" in parts:
      return parts["full"].astype(base.dtype, copy=False)
    if "base_layer" in parts and not np.array_equal(parts["base_layer"], base):
      raise ValueError(
        f"{self.directory}: module {change.module!r} brings a base weight of its own, which is not "
        f"the model's {address}; give the model that it was trained on"
      )
    if "bias" in parts:
      rank = self._tensors.info(f"{_PREFIX}{change.module}.lora_A.weight").shape[0]
      scale = np.float32(self._config.scale(change.module, rank))
      return (_wide(base) + scale * _wide(parts["bias"])).astype(base.dtype)
    if "a" not in parts:
      return base
    a, b = _wide(parts["a"]), _wide(parts["b"])
    flip = self._flipped[address]
    w = folded(
      base.T if flip else base, a, b, scale=self._config.scale(change.module, a.shape[0]),
      magnitude=_wide(parts["magnitude"]) if "magnitude" in parts else None,
    )  # fmt: skip
    return np.ascontiguousarray(w.T if flip else w).astype(base.dtype, copy=False)

  def prefetch(self, address: str) -> None:
    """Ask the operating system to read a tensor ahead of its use."""
    ahead = getattr(self.source, "prefetch", None)
    if ahead is not None:
      ahead(address)

  def digest(self) -> str:
    """Hash the model and the adapter: one sha256."""
    files = checkpoint.hash_files([self.directory / CONFIG, self.directory / WEIGHTS])
    return checkpoint.digest({"": self._base("digest")(), **files})

  def stamp(self) -> str:
    """Name the state of all files, without reading them."""
    stats = [(self.directory / n).stat() for n in (CONFIG, WEIGHTS)]
    state = [(s.st_size, s.st_mtime_ns) for s in stats]
    return f"{self._base('stamp')()} {self.directory} {state}"

  def _base(self, name: str) -> Any:
    return getattr(self.source, name)

  def _read(self, name: str) -> np.ndarray:
    array = self._tensors[name]
    blocks.check_finite(name, array, self.directory / WEIGHTS)
    return array

  def _place(self, name: str) -> None:
    """Find the tensor of the base that a tensor of the adapter changes, and how."""
    inner = name.removeprefix(_PREFIX)
    found = _PART.fullmatch(inner)
    module, part = (found["module"], found["part"]) if found else (inner.rpartition(".")[0], "")
    leaf = "bias" if part.endswith(".bias") else "weight"
    wanted = f"{module}.{leaf}" if found else inner
    base = self._find(wanted)
    if base is None and not found and self._repeats(name):
      return
    if base is None:
      raise ValueError(self._unmatched(name, wanted))
    role = _ROLES[part.partition(".")[0]] if found else "full"
    if leaf == "bias":  # a trained bias of the base, or one that the adapter adds
      role = "full" if role == "base_layer" else "bias"
    self._changes.setdefault(base, _Change(module, {})).parts[role] = name

  def _find(self, name: str) -> str | None:
    """Find a name as the base spells it."""
    module, _, leaf = name.rpartition(".")
    spellings = [name, f"{_RENAMED.get(module, module)}.{leaf}"]
    spellings += [stem + name for stem in _STEMS]
    spellings += [name.removeprefix(stem) for stem in _STEMS]
    return next((s for s in spellings if s in self._names), None)

  def _repeats(self, name: str) -> bool:
    """Tell a tied head that repeats the embedding which the adapter brings along."""
    twins = [n for n in self._tensors if n.endswith(("embed_tokens.weight", "wte.weight"))]
    return name.endswith("lm_head.weight") and any(
      np.array_equal(self._tensors[n], self._tensors[name]) for n in twins
    )

  def _unmatched(self, name: str, inner: str) -> str:
    hint = ", ".join(difflib.get_close_matches(inner, self._names, n=3, cutoff=0.0))
    hint = f"the model's nearest are {hint}; is the adapter for another base?"
    if inner.endswith(("lm_head.weight", "embed_out.weight")):
      hint = "this model's head is its embedding (tied), which an adapter would change with it"
    return f"{self.directory}: tensor {name!r} fits no tensor of the model; {hint}"

  def _check(self, name: str, change: _Change) -> None:
    """Compare ranks and shapes with the config and the base; note how the base lies."""
    shape = tuple(self.source.struct(name).shape)
    infos = {role: self._tensors.info(n).shape for role, n in change.parts.items()}
    where = f"{self.directory}: module {change.module!r}"
    for role in ("full", "bias", "base_layer"):
      if role in infos and infos[role] != shape:
        raise ValueError(
          f"{where} brings a {name} of {infos[role]}; the model's is {shape}; an adapter for a "
          "resized vocabulary needs the model resized first"
        )
    if not infos.keys() & {"a", "b", "magnitude"}:
      return
    for role in ("a", "b"):
      if role not in infos:
        raise ValueError(f"{where} has no lora_{role.upper()}; the file must hold both factors")
      if len(infos[role]) != 2:
        raise ValueError(f"{where}: lora_{role.upper()} {infos[role]} is not a matrix")
    (rank, width), (out, inner) = a, b = infos["a"], infos["b"]
    ranks = self._config.ranks(change.module)
    if rank != inner or rank not in ranks:
      raise ValueError(f"{where}: lora_A is {a} and lora_B {b}; the config's rank is {ranks[0]}")
    embedding = "embedding" in change.parts["a"]
    # A square weight fits both ways: then the config tells.
    flip = embedding or shape == (width, out) and (out != width or self._config.fan_in_fan_out)
    if shape != ((width, out) if flip else (out, width)):
      raise ValueError(
        f"{where} is for a weight of {(out, width)}; the model's {name} is {shape}: is the adapter "
        "for another base?"
      )
    if "magnitude" in infos and (embedding or infos["magnitude"] != (out,)):
      raise ValueError(
        f"{where}: DoRA magnitudes of shape {infos['magnitude']}; supported is {(out,)}, one a row "
        "of a linear weight"
      )
    self._flipped[name] = flip


def folded(
  w: np.ndarray,
  a: np.ndarray,
  b: np.ndarray,
  *,
  scale: float,
  magnitude: np.ndarray | None = None,
) -> np.ndarray:
  """Add a low-rank term to a weight in float32.

  Args:
    w: [out, in], any floating dtype.
    a: [r, in], float32.
    b: [out, r], float32.
    scale: multiplier of the product.
    magnitude: [out], the norms that DoRA gives the rows.

  Returns:
    [out, in], float32.

  Example:
    >>> one = np.ones((2, 1), np.float32)
    >>> folded(np.zeros((2, 2), np.float32), one.T, one, scale=0.5).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
  """
  out = b @ a
  out *= np.float32(scale)
  out += w.astype(np.float32, copy=False)
  if magnitude is not None:
    norms = np.sqrt(np.sum(out * out, axis=1))
    out *= (magnitude / norms)[:, None]
  return out


def _wide(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float32, copy=False)
