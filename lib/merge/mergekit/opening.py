# SPDX-License-Identifier: Apache-2.0
"""The models that a configuration names: directories, with or without an adapter."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from treesurgeon.io import checkpoint, raw, safetensors, with_lora


def open_model(name: str) -> Any:
  """Open a model of a configuration: a directory, or `directory+adapter`.

  A hub name is looked up among the snapshots that Hugging Face's tools keep; nothing is downloaded.

  Args:
    name: as the configuration spells it.

  Returns:
    A source of tensors under their own names.

  Raises:
    ValueError: if there is no such directory.
  """
  if "+" in name and not pathlib.Path(name).is_dir():
    model, adapter = name.split("+", 1)
    return with_lora.WithLora(raw.Directory(_directory(model)), _directory(adapter))
  return raw.Directory(_directory(name))


def home(source: Any) -> pathlib.Path | None:
  """Find the directory whose tokenizer belongs to a model, an adapter's base's.

  Args:
    source: what `open_model` returned.

  Returns:
    The directory; None for a single file or a model in memory.
  """
  if hasattr(source, "source"):
    return home(source.source)
  directory = getattr(source, "directory", None)
  return directory if directory is not None and directory.is_dir() else None


def settings(source: Any) -> Mapping[str, Any]:
  """Find what a model's config.json says, an adapter's base's.

  Args:
    source: what `open_model` returned.

  Returns:
    The content; empty if there is none.
  """
  return settings(source.source) if hasattr(source, "source") else getattr(source, "config", {})


def digest(source: Any) -> str:
  """Hash a model as a configuration names it, an adapter included.

  Args:
    source: what `open_model` returned.

  Returns:
    Hexadecimal sha256.
  """
  if not hasattr(source, "source"):
    return source.digest()
  adapter = sorted(f for f in source.directory.iterdir() if f.name.startswith("adapter_"))
  return checkpoint.digest({"": digest(source.source), **checkpoint.hash_files(adapter)})


def stamp(source: Any) -> str:
  """Name the state of a model's files, without reading them.

  Args:
    source: what `open_model` returned.

  Returns:
    Text that changes when they do.
  """
  if not hasattr(source, "source"):
    return source.stamp()
  stats = [(f.name, (s := f.stat()).st_size, s.st_mtime_ns) for f in source.directory.iterdir()]
  return f"{stamp(source.source)} {source.directory} {sorted(stats)}"


def _directory(name: str) -> pathlib.Path:
  path = pathlib.Path(name).expanduser()
  if path.exists():
    single = path.is_file() and path.suffix == ".safetensors"
    return path if single else safetensors.check_folder(path)
  repository, _, revision = name.partition("@")
  home = os.environ.get("HF_HOME", "~/.cache/huggingface")
  hub = pathlib.Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
  held = hub / f"models--{repository.replace('/', '--')}"
  pointer = held / "refs" / (revision or "main")
  commit = pointer.read_text().strip() if pointer.is_file() else revision
  if commit and (held / "snapshots" / commit).is_dir():
    return held / "snapshots" / commit
  raise ValueError(
    f"{name} is no directory, and no snapshot of a hub repository of that name is in {hub}; "
    "download it first, or give a path"
  )
