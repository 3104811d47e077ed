# SPDX-License-Identifier: Apache-2.0
"""Real text on every machine: the standard library of the running Python.

Experiments need text that nobody has to download. The library's sources hold about two megabytes of
code and, in docstrings, comments and the language reference that `help()` prints, about one and a
half of English. The two become the domains "code" and "prose": different enough that a model of
one is visibly wrong about the other, which merging and domain adaptation need.

A document is one file's share in a domain. A file's split depends on the crc32 of its path alone,
so it is the same in both domains and does not move when other files come or go.
"""

import ast
import contextlib
import functools
import hashlib
import json
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from treesurgeon.io import cache
from treesurgeon.train import source

DOMAINS = ("code", "prose")
SPLITS = ("train", "validation")
# Installed packages, tests (odd encodings on purpose), tables of data, and files that differ
# between two builds of one version.
EXCLUDED = re.compile(
  r"(?:.*/)?(?:site-packages|dist-packages|test|tests|idle_test|__pycache__|lib-dynload|encodings"
  r"|_bundled|config-[^/]*|pydoc_data|__phello__)/.*|(?:.*/)?(?:_sysconfigdata[^/]*|sitecustomize"
  r"|usercustomize)\.py"
)
RECIPE = 1  # raise it when extraction changes, or cached texts outlive the change
MIN_CHARACTERS = 200


class Document(NamedTuple):
  """One file's text in one domain.

  Attributes:
    path: where it comes from, relative to the library, '/'-separated.
    domain: "code" or "prose".
    split: "train" or "validation".
    text: the text.
  """

  path: str
  domain: str
  split: str
  text: str


def load(
  *,
  domains: Sequence[str] = DOMAINS,
  split: str | None = None,
  validation: float = 0.1,
  root: str | Path | None = None,
) -> list[Document]:
  """Read the corpus.

  Args:
    domains: which domains, a subset of "code" and "prose".
    split: "train", "validation", or None for both.
    validation: share of the files that are held out.
    root: folder to read instead of the running Python's standard library.

  Returns:
    Documents in order of domain (as given), then path.

  Raises:
    ValueError: for an unknown domain or split, or if nothing is found.

  Example:
    >>> import json
    >>> documents = load(domains=["code"], root=Path(json.__file__).parent)
    >>> [d.path for d in documents]
    ['__init__.py', 'decoder.py', 'encoder.py', 'scanner.py', 'tool.py']
  """
  for domain in domains:
    if domain not in DOMAINS:
      raise ValueError(f"corpus has no domain {domain!r}; it has {', '.join(DOMAINS)}")
  if split is not None and split not in SPLITS:
    raise ValueError(f"corpus has no split {split!r}; it has {', '.join(SPLITS)}, or None for both")
  folder = Path(sysconfig.get_path("stdlib") if root is None else root)
  everything = _read(folder)
  found = []
  for domain in domains:
    for path, text in everything[domain]:
      part = split_of(path, validation=validation)
      if split in (None, part):
        found.append(Document(path, domain, part, text))
  if not found:
    raise ValueError(
      f"{folder} holds no {split or 'train or validation'} text of domain {', '.join(domains)}; "
      "it must be a folder of .py files of at least a few hundred characters each"
    )
  return found


def split_of(path: str, *, validation: float = 0.1) -> str:
  """Tell a file's split from its path alone.

  Args:
    path: relative, '/'-separated.
    validation: share of the files that are held out.

  Returns:
    "train" or "validation".

  Example:
    >>> split_of("json/decoder.py", validation=0.0)
    'train'
  """
  return "validation" if zlib.crc32(path.encode()) < validation * 2**32 else "train"


def digest(documents: Iterable[Document]) -> str:
  """Hash documents, for lineage and as a key of caches.

  Args:
    documents: what `load` returned.

  Returns:
    Hexadecimal sha256 over paths, domains, splits and texts.

  Example:
    >>> len(digest([]))
    64
  """
  sha = hashlib.sha256()
  for document in documents:
    for part in document:
      data = part.encode()
      sha.update(len(data).to_bytes(8, "little"))
      sha.update(data)
  return sha.hexdigest()


@functools.lru_cache(maxsize=4)
def _read(folder: Path) -> dict[str, list]:
  """Read every file once; the tokenizer module is slow enough to keep the outcome on disk."""
  names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py"))
  stamp = hashlib.sha256(f"{RECIPE} {platform.python_version()}".encode())
  sources = []
  for name in names:
    if not EXCLUDED.fullmatch(name):
      with contextlib.suppress(OSError):
        data = (folder / name).read_bytes()
        sources.append((name, data))
        stamp.update(f"{name} {len(data)} ".encode() + data)
  topics = folder / "pydoc_data" / "topics.py"
  if topics.is_file():
    stamp.update(topics.read_bytes())
  text = cache.remember(
    f"corpus-{stamp.hexdigest()[:32]}.json", lambda: json.dumps(_extract(sources, topics))
  )
  return json.loads(text)


def _extract(sources: Sequence[tuple[str, bytes]], topics: Path) -> dict[str, list]:
  out: dict[str, list] = {d: [] for d in DOMAINS}
  for name, data in sources:
    try:
      texts = source.separate(data.decode("utf-8"))
    except (SyntaxError, ValueError):  # not UTF-8, or not Python
      continue
    for domain, text in zip(DOMAINS, texts, strict=True):
      if len(text) >= MIN_CHARACTERS:
        out[domain].append((name, text))
  out["prose"] += _topics(topics)
  return out


def _topics(path: Path) -> list[tuple[str, str]]:
  """Read the chapters of the language reference that `help()` prints, without importing them."""
  if not path.is_file():
    return []
  for node in ast.parse(path.read_text("utf-8")).body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      topics = ast.literal_eval(node.value)
      return [
        (f"pydoc_data/topics/{name}", text.strip("\n") + "\n")
        for name, text in sorted(topics.items())
        if len(text) >= MIN_CHARACTERS
      ]
  return []
