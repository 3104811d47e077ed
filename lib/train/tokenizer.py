# SPDX-License-Identifier: Apache-2.0
"""Small byte-level BPE tokenizers, trained where they are needed.

Byte-level BPE [1] can spell any text, so nothing is ever out of vocabulary. Training on the same
texts gives the same tokenizer, which is kept in the user's cache. The saved folder is what
`transformers` reads as a `PreTrainedTokenizerFast`.

[1] Radford et al., Language models are unsupervised multitask learners, 2019, section 2.2.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from treesurgeon.io import cache
from treesurgeon.train import corpus

EOS = "<|endoftext|>"
MASK = "<|mask|>"
RECIPE = 1  # raise it when training changes, or cached tokenizers outlive the change


def train(
  texts: Iterable[str], *, vocab_size: int = 2048, special: Sequence[str] = (EOS,)
) -> tokenizers.Tokenizer:
  """Train a byte-level BPE.

  Args:
    texts: what to learn merges from.
    vocab_size: upper bound on the vocabulary, bytes and special tokens included.
    special: special tokens, which get the first ids.

  Returns:
    The tokenizer; it adds no special tokens by itself.

  Raises:
    ValueError: if the vocabulary is too small for all bytes.

  Example:
    >>> small = train(["to be or not to be"] * 3, vocab_size=260)
    >>> small.decode(small.encode("bé").ids)
    'bé'
  """
  least = 256 + len(special)
  if vocab_size < least:
    raise ValueError(
      f"vocab_size={vocab_size} cannot hold 256 bytes and {len(special)} special tokens; "
      f"it must be at least {least}"
    )
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(special),
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def cached(
  documents: Sequence[corpus.Document],
  *,
  vocab_size: int = 2048,
  special: Sequence[str] = (EOS,),
  where: str | Path | None = None,
) -> tokenizers.Tokenizer:
  """Train on the training documents alone, or read what an earlier call kept.

  Args:
    documents: of any split; held-out ones are ignored.
    vocab_size: see `train`.
    special: see `train`.
    where: cache folder, by default the user's.

  Returns:
    The tokenizer.

  Raises:
    ValueError: if no document is of the training split.

  Example:
    >>> import tempfile
    >>> documents = [corpus.Document("a.py", "code", "train", "x = 1")]
    >>> with tempfile.TemporaryDirectory() as d:
    ...   cached(documents, vocab_size=257, where=d).get_vocab_size()
    257
  """
  chosen = [d for d in documents if d.split == "train"]
  if not chosen:
    raise ValueError(f"none of {len(documents)} documents is of the split 'train'")
  version = importlib.metadata.version("tokenizers")
  recipe = f"{RECIPE} {version} {vocab_size} {list(special)} {corpus.digest(chosen)}"
  name = f"tokenizer-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.json"
  text = cache.remember(
    name,
    lambda: train((d.text for d in chosen), vocab_size=vocab_size, special=special).to_str(),
    where=where,
  )
  return tokenizers.Tokenizer.from_str(text)


def save(tokenizer: tokenizers.Tokenizer, directory: str | Path, *, context: int = 2048) -> None:
  """Write `tokenizer.json` and the `tokenizer_config.json` that `transformers` wants beside it.

  Args:
    tokenizer: what to write.
    directory: model folder; made if it does not exist.
    context: longest input the model takes.

  Example:
    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...   save(train(["x"], vocab_size=257), d)
    ...   sorted(os.listdir(d))
    ['tokenizer.json', 'tokenizer_config.json']
  """
  config: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": context,
    "clean_up_tokenization_spaces": False,
  }
  for role, token in (("eos_token", EOS), ("mask_token", MASK)):
    if tokenizer.token_to_id(token) is not None:
      config[role] = token
  cache.write(Path(directory) / "tokenizer.json", tokenizer.to_str(pretty=True))
  cache.write(Path(directory) / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
