# SPDX-License-Identifier: Apache-2.0
r"""A tokenizer.json as ggml holds one: byte-level BPE ("gpt2") and BPE on characters ("llama").

ggml knows by name how a byte-level tokenizer splits text before it merges. The name is found from
the pattern in the file, not from the model's family, since fine-tuned models change tokenizers;
llama.cpp's own converter compares a hash of the ids of one text. BPE with byte fallback becomes
sentencepiece's: each token has a score, its place among the merges, and any two neighbours whose
union is a token may merge; a file that lacks such a pair among its merges is refused.
transformers reads both, but knows fewer splits, and always merges.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from treesurgeon.io import checkpoint, tokenizer, tokenizer_files

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # ggml's token types
_FALLBACK = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_ROLES = ("bos", "eos", "unk", "pad")
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


def _words(digits: str) -> str:
  return rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"


def _cases(digits: str, ending: str) -> str:
  pair = rf"{_LEAD}{_UPPER}*{_LOWER}+{ending}|{_LEAD}{_UPPER}+{_LOWER}*{ending}"
  return rf"{pair}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"


_BYTES, _DIGIT = "ByteLevel", r"\p{N}"  # the first stands for the pattern of the step itself
_SPLITS = {
  (_BYTES,): "gpt-2",
  (_DIGIT, _BYTES): "smollm",
  (_words(r"\p{N}{1,3}"),): "llama-bpe",
  (_words(r"\p{N}"),): "qwen2",
  (_cases(r"\p{N}", ""),): "tekken",
  (_cases(r"\p{N}{1,3}", _CONTRACTION + "?"),): "gpt-4o",
}
_WHOLE = ("llama-bpe", "tekken")  # where ggml takes a word that is a token as it is, unmerged


class Vocabulary(NamedTuple):
  """What a GGUF file says of a tokenizer, for the writer's `add_...` of the same names.

  Attributes:
    model: "gpt2" or "llama".
    pre: ggml's name of the split.
    tokens: a text for every row of the embedding.
    types: ggml's kind of each.
    merges: pairs joined by a blank, first merged first.
    scores: by which "llama" merges, highest first; none for "gpt2".
    special: role (bos, eos, unk, pad) to id.
    add_bos: whether a text begins with bos.
    add_eos: whether it ends with eos.
    space_prefix: whether a text is given a blank in front; None leaves it out.
    template: the chat template.
    notes: where a reader's ids differ.
  """

  model: str
  pre: str
  tokens: tuple[str, ...]
  types: tuple[int, ...]
  merges: tuple[str, ...]
  scores: tuple[float, ...]
  special: Mapping[str, int]
  add_bos: bool
  add_eos: bool
  space_prefix: bool | None
  template: str | None
  notes: tuple[str, ...]

  def write(self, writer: Any) -> None:
    """Put it into a GGUF file.

    Args:
      writer: a `gguf.GGUFWriter`.
    """
    writer.add_tokenizer_model(self.model)
    writer.add_tokenizer_pre(self.pre)
    writer.add_token_list(self.tokens)
    writer.add_token_types(self.types)
    writer.add_token_merges(self.merges)
    if self.scores:
      writer.add_token_scores(self.scores)
    for role, i in self.special.items():
      getattr(writer, f"add_{role}_token_id")(i)
    writer.add_add_bos_token(self.add_bos)
    writer.add_add_eos_token(self.add_eos)
    if self.space_prefix is not None:
      writer.add_add_space_prefix(self.space_prefix)
    if self.template is not None:
      writer.add_chat_template(self.template)


def read(directory: str | Path, rows: int) -> Vocabulary:
  """Read a directory's tokenizer.

  Args:
    directory: holds tokenizer.json, and what else a model's directory holds.
    rows: of the model's embedding; those beyond the tokenizer are named and marked unused.

  Returns:
    The vocabulary.

  Raises:
    ValueError: saying why ggml cannot hold it.
  """
  folder = Path(directory)
  loaded = tokenizer.load(folder)
  if not isinstance(loaded, tokenizer.JsonTokenizer):
    raise ValueError(f"there is no {tokenizer.FILE}")
  if loaded.vocab_size > rows:
    raise ValueError(f"it has {loaded.vocab_size} tokens and the model {rows} rows")
  inner = loaded.inner
  table = json.loads(inner.to_str())
  model = table["model"]
  if model["type"] != "BPE":
    raise ValueError(f"its model is {model['type']!r}; ggml's are byte-level and byte-fallback BPE")
  odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
  if found := [f"{name}={model[name]!r}" for name in odd if model.get(name)]:
    raise ValueError(f"ggml's BPE has no {found[0]}")
  added = inner.get_added_tokens_decoder()
  ids = inner.get_vocab(with_added_tokens=True)
  steps = _flat(table["pre_tokenizer"], "pretokenizers")
  if steps and steps[-1]["type"] == "ByteLevel":
    kind, notes = "gpt2", []
    pre = _split(steps)
    if pre == "smollm" and any(len(t) > 1 and re.search("[0-9]", t) for t in model["vocab"]):
      notes.append("transformers 5.23 does not split 'smollm', and merges digits")
    _normalized(_flat(table["normalizer"], "normalizers"), notes)
    _merged(model, pre, {t.content for t in added.values()}, notes)
    scores, space = {}, None
  else:
    kind, pre, notes = "llama", "default", []
    space = _spaces(_flat(table["normalizer"], "normalizers"), steps, notes)
    scores = _scores(model, {t.content for t in added.values()})
  stripping = [t.content for t in added.values() if t.lstrip or t.rstrip or t.single_word]
  if stripping:
    notes.append(f"ggml leaves the blanks beside {stripping[0]!r}, which the tokenizer strips")
  special = _special(folder, ids, added, loaded.eos_id)
  add_bos, add_eos = _surrounded(inner, special)
  if "eos" not in special:
    notes.append("no token is known to end a text; llama.cpp takes one by its default id")
  tokens = [f"[PAD{i}]" for i in range(rows)]
  types = [_UNUSED] * rows
  for token, i in ids.items():
    tokens[i] = token
    types[i] = _CONTROL if i in added and added[i].special else _USER if i in added else _NORMAL
    if kind == "llama" and i == special.get("unk"):
      types[i] = _UNKNOWN
    elif kind == "llama" and token in _FALLBACK:
      types[i] = _BYTE
  return Vocabulary(
    model=kind, pre=pre, tokens=tuple(tokens), types=tuple(types),
    merges=tuple(" ".join(pair) for pair in model["merges"]),
    scores=tuple(scores.get(t, -1e6) for t in tokens) if scores else (),
    special=special, add_bos=add_bos, add_eos=add_eos, space_prefix=space,
    template=tokenizer_files.template(folder), notes=tuple(notes),
  )  # fmt: skip


def _flat(node: Mapping[str, Any] | None, within: str) -> list[Mapping[str, Any]]:
  """List the steps of a normalizer or pre-tokenizer."""
  if node is None:
    return []
  if node["type"] != "Sequence":
    return [node]
  return [step for inner in node[within] for step in _flat(inner, within)]


def _split(steps: list[Mapping[str, Any]]) -> str:
  """Find ggml's name of a split."""
  patterns = []
  for step in steps:
    pattern = step.get("pattern", {}).get("Regex")
    if pattern and step.get("behavior") == "Isolated" and not step["invert"]:
      patterns.append(pattern)
    elif step["type"] == "Digits" and step["individual_digits"]:
      patterns.append(_DIGIT)
    elif step is steps[-1] and not step["add_prefix_space"]:
      patterns += [_BYTES] * bool(step["use_regex"])
    else:
      patterns.append(json.dumps(step))
  name = _SPLITS.get(tuple(patterns))
  if name is None:
    known = ", ".join(_SPLITS.values())
    raise ValueError(f"its way to split text, {' then '.join(patterns)}, is none of {known}")
  return name


def _normalized(steps: list[Mapping[str, Any]], notes: list[str]) -> None:
  kinds = [step["type"] for step in steps]
  if kinds not in ([], ["NFC"]):
    raise ValueError(f"ggml has no normalizer such as {kinds[0]} before byte-level BPE")
  if kinds:
    notes.append("text has to be in NFC: neither llama.cpp nor transformers brings it there")


def _merged(model: Mapping[str, Any], pre: str, added: set[str], notes: list[str]) -> None:
  """See to it that words which are tokens come out alike whether merged or not."""
  whole = bool(model.get("ignore_merges"))
  if not whole and pre not in _WHOLE:
    return
  merges = [tuple(pair) for pair in model["merges"]]
  merger = tokenizers.models.BPE(vocab=model["vocab"], merges=merges)
  never = [
    t for t in model["vocab"] if t not in added and [m.value for m in merger.tokenize(t)] != [t]
  ]
  if never and whole != (pre in _WHOLE):
    does = "as it is" if pre in _WHOLE else "by merges alone"
    raise ValueError(f"under {pre!r} ggml takes a word such as {never[0]!r} {does}")
  if never:
    notes.append(f"transformers takes {len(never)} tokens, {never[0]!r} the first, in parts")


def _spaces(
  normalizers: list[Mapping[str, Any]], steps: list[Mapping[str, Any]], notes: list[str]
) -> bool:
  """Tell whether a blank is put before a text, of a tokenizer that replaces blanks."""
  blank = {"Prepend": {"prepend": "▁"}, "Replace": {"pattern": {"String": " "}, "content": "▁"}}
  plain = all(n == {"type": n["type"], **blank.get(n["type"], {"": ""})} for n in normalizers)
  kinds = [n["type"] for n in normalizers] + [s["type"] for s in steps]
  if plain and kinds in (["Prepend", "Replace"], ["Replace"]):
    return kinds[0] == "Prepend"
  if kinds == ["Metaspace"] and steps[0]["replacement"] == "▁" and not steps[0].get("split", True):
    scheme = steps[0]["prepend_scheme"]
    if scheme == "first":
      notes.append("llama.cpp puts a blank after special tokens too")
    return scheme != "never"
  told = ", ".join(kinds) or "nothing"
  raise ValueError(f"before its merges comes {told}; ggml's BPE on characters replaces blanks by ▁")


def _scores(model: Mapping[str, Any], added: set[str]) -> dict[str, float]:
  """Give each token that merges make its place; refuse merges that scores cannot express."""
  vocab, merges = model["vocab"], {tuple(pair) for pair in model["merges"]}
  if not model["byte_fallback"] or not _FALLBACK <= set(vocab):
    raise ValueError("ggml's BPE on characters needs byte_fallback and a token for every byte")
  order, last = {}, None
  for made in (left + right for left, right in model["merges"]):
    if made != last and made in order:
      raise ValueError(f"the merges that make {made!r} are apart; ggml ranks tokens, not merges")
    order.setdefault(made, -float(len(order)))
    last = made
  for token in set(vocab) - added:
    for cut in range(1, len(token)):
      pair = (token[:cut], token[cut:])
      if pair[0] in vocab and pair[1] in vocab and pair not in merges:
        raise ValueError(f"{pair[0]!r} and {pair[1]!r} do not merge, and in ggml they would")
  return order


def _special(
  folder: Path, ids: Mapping[str, int], added: Mapping[int, Any], eos: int | None
) -> dict[str, int]:
  """Find the tokens of the roles, by name or, if they are special at all, by the config's id."""
  config = checkpoint.read_json(path) if (path := folder / checkpoint.CONFIG).is_file() else {}
  found: dict[str, int] = {} if eos is None else {"eos": eos}
  for role in _ROLES:
    i: Any = ids.get(tokenizer_files.special(folder, f"{role}_token"))
    if i is None:
      held: Any = config.get(f"{role}_token_id")
      i = held[0] if isinstance(held, list) and held else held
      i = i if i in added and added[i].special else None
    if i is not None:
      found.setdefault(role, i)
  return found


def _surrounded(inner: tokenizers.Tokenizer, special: dict[str, int]) -> tuple[bool, bool]:
  """Tell whether a text is put between bos and eos; what is put before it is bos."""
  inner.no_truncation()
  inner.no_padding()
  full, text = inner.encode("a").ids, inner.encode("a", add_special_tokens=False).ids
  extra = len(full) - len(text)
  at = next((i for i in range(extra + 1) if full[i : i + len(text)] == text), 0)
  before, after = full[:at], full[at + len(text) :]
  if before:
    special.setdefault("bos", before[0])
  if before not in ([], [special.get("bos")]) or after not in ([], [special.get("eos")]):
    raise ValueError(
      f"it puts {before} before a text and {after} after it; ggml has only bos, "
      f"{special.get('bos')}, and eos, {special.get('eos')}"
    )
  return bool(before), bool(after)
