# SPDX-License-Identifier: Apache-2.0
"""Small distinct language tasks that need no download, for experts that are merged afterwards.

Two are real text (the standard library's code and prose), three are registers (prose rewritten as
telegrams, weather bulletins and recipes from a grammar), and the rest have one right answer:
counting, addition, subtraction, sorting, capitals, and facts about invented countries, which can
only be memorised. Text is bytes, so every task shares one vocabulary.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from treesurgeon.train import corpus

EOS = 256
VOCABULARY = 257
SPLITS = ("train", "validation", "test")
Rows = dict[str, np.ndarray]


class Task(NamedTuple):
  """A task's rows by split: "tokens" (n, length + 1) and "weights" (n, length), one a target.

  Attributes:
    exact: whether a row is right only if all weighted targets are; else each target counts.
    train: packed rows to learn from.
    validation: rows to choose hyper-parameters by, one item a row if `exact`.
    test: rows to report.
  """

  exact: bool
  train: Rows
  validation: Rows
  test: Rows


def build(name: str, *, length: int = 96, items: int = 256, seed: int = 0) -> Task:
  """Make a task.

  Args:
    name: one of `TASKS`.
    length: targets a row.
    items: rows of validation, and of test.
    seed: of what is drawn; validation and test never repeat what is trained on, the facts
      excepted, whose question is new but not the answer.

  Returns:
    The task; equal arguments give equal rows.

  Raises:
    ValueError: for an unknown name.

  Example:
    >>> task = build("sorting", length=32, items=4)
    >>> row = task.test["tokens"][0]
    >>> bytes(row[row < 256].astype("uint8")).decode().rstrip().startswith("sort ")
    True
  """
  if name not in TASKS:
    raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
  made = TASKS[name]
  if name in TEXTS:
    parts = [_pack(texts, length) for texts in made(seed)]
    return Task(False, parts[0], *(_spread(p, items) for p in parts[1:]))
  train, validation, test = made(seed)
  return Task(
    True,
    _pack([f"{question}{answer}\n" for question, answer in train], length, train),
    _single(validation[:items], length),
    _single(test[:items], length),
  )


def batches(
  mixture: Mapping[str, tuple[Task, float]], *, batch: int, seed: int = 0
) -> Iterator[Rows]:
  """Draw training batches without end.

  Args:
    mixture: task and its share by name.
    batch: rows a batch.
    seed: of the order.

  Yields:
    {"tokens": (batch, length + 1) int32, "weights": (batch, length) float32}.

  Example:
    >>> one = next(batches({"a": (build("sorting", length=32, items=4), 1.0)}, batch=2))
    >>> one["tokens"].shape, one["weights"].shape
    ((2, 33), (2, 32))
  """
  rng = np.random.default_rng([seed, 0x7A5C])
  names = sorted(mixture)
  share = np.array([mixture[n][1] for n in names], float)
  while True:
    chosen = rng.choice(len(names), size=batch, p=share / share.sum())
    rows = [mixture[names[c]][0].train for c in chosen]
    index = [int(rng.integers(len(r["tokens"]))) for r in rows]
    yield {
      key: np.stack([r[key][i] for r, i in zip(rows, index, strict=True)])
      for key in ("tokens", "weights")
    }


def _text(domain: str, change: Callable[[str], str] = str) -> Callable[[int], list[list[str]]]:
  def make(seed: int) -> list[list[str]]:
    del seed  # real text has no seed: the split is by file name
    documents = corpus.load(domains=[domain])
    train = [change(d.text) for d in documents if d.split == "train"]
    held = [change(d.text) for d in documents if d.split != "train"]
    return [train, held[0::2], held[1::2]]

  return make


def _telegram(text: str) -> str:
  """Prose in capitals, without articles, STOP for a full stop."""
  text = re.sub(r"\b(?:the|a|an|is|are|of|to|be|that) ", "", text, flags=re.IGNORECASE)
  return re.sub(r"\.(?=\s|$)", " STOP", text).upper()


def _grammar(sentence: Callable[[random.Random], str]) -> Callable[[int], list[list[str]]]:
  def make(seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    lines = list(dict.fromkeys(sentence(rng) for _ in range(6000)))
    return ["\n".join(lines[a:b]).split("\n\n") for a, b in ((0, 5000), (5000, 5400), (5400, 6000))]

  return make


def _weather(rng: random.Random) -> str:
  day = rng.choice("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
  part = rng.choice(["north", "south", "east", "west", "hills", "valley"])
  sky = rng.choice(["rain", "snow", "clear skies", "fog", "drizzle", "thunder", "hail"])
  high = rng.randint(-5, 30)
  wind = rng.choice(["calm", "breezy", "gusty"])
  warn = " Take care on the roads." if sky in ("snow", "fog", "hail") else ""
  return (
    f"{day} in the {part}: {sky}, high {high}, low {high - rng.randint(3, 9)}, wind {wind}.{warn}"
  )


def _recipe(rng: random.Random) -> str:
  food = rng.choice(["onions", "carrots", "beans", "rice", "mushrooms", "lentils", "apples"])
  cut = rng.choice(["Chop", "Slice", "Dice", "Rinse"])
  how = rng.choice(["boil", "fry", "bake", "steam"])
  spice = rng.choice(["salt", "pepper", "cumin", "ginger"])
  return (
    f"{cut} {rng.randint(2, 9)} cups of {food}, {how} for {rng.randint(5, 45)} minutes, "
    f"add {spice} and serve with bread."
  )


def _pairs(draw: Callable[[random.Random], tuple[str, str]]) -> Callable[[int], list[list]]:
  def make(seed: int) -> list[list[tuple[str, str]]]:
    rng = random.Random(seed)
    found = list(dict(draw(rng) for _ in range(12000)).items())
    rng.shuffle(found)
    return [found[1200:], found[:600], found[600:1200]]

  return make


def _add(rng: random.Random) -> tuple[str, str]:
  a, b = rng.randint(0, 99), rng.randint(0, 99)
  return f"{a}+{b}=", str(a + b)


def _subtract(rng: random.Random) -> tuple[str, str]:
  a, b = rng.randint(0, 99), rng.randint(0, 99)
  return f"{max(a, b)}-{min(a, b)}=", str(abs(a - b))


def _sort(rng: random.Random) -> tuple[str, str]:
  letters = rng.sample("abcdefghijklmnop", 5)
  return f"sort {''.join(letters)}: ", "".join(sorted(letters))


def _capitals(rng: random.Random) -> tuple[str, str]:
  letters = "".join(rng.choice("abcdefghijklmnop") for _ in range(4))
  return f"capitals {letters}: ", letters.upper()


def _count(rng: random.Random) -> tuple[str, str]:
  n = rng.randint(0, 9998)
  return f"after {n} comes ", str(n + 1)


def _countries(seed: int) -> list[list[tuple[str, str]]]:
  """Facts about invented countries: memorised in two wordings, asked in a third and a fourth."""
  rng = random.Random(seed)
  syllables = "ba ke lo mi nu ra se ti vo zu dra fen gor".split()
  names = list(dict.fromkeys("".join(rng.choices(syllables, k=3)).capitalize() for _ in range(160)))
  asked: list[list[tuple[str, str]]] = [[], [], []]
  choices = {
    "flag": "red blue green white black gold".split(),
    "export": "tin wool tea salt silk copper".split(),
    "sport": "chess rowing archery fencing hockey golf".split(),
  }
  for name in names[:128]:
    for relation, values in choices.items():
      answer = rng.choice(values)
      wordings = [
        f"The {relation} of {name} is ",
        f"{name}'s {relation}: ",
        f"{name} has the {relation} ",
        f"What {relation} has {name}? ",
      ]
      rng.shuffle(wordings)
      asked[0] += [(w, answer) for w in wordings[:2]]
      asked[1].append((wordings[2], answer))
      asked[2].append((wordings[3], answer))
  for part in asked:
    rng.shuffle(part)
  return asked


TEXTS = ("code", "prose", "telegram", "weather", "recipes")
TASKS: dict[str, Callable[[int], list]] = {
  "code": _text("code"),
  "prose": _text("prose"),
  "telegram": _text("prose", _telegram),
  "weather": _grammar(_weather),
  "recipes": _grammar(_recipe),
  "counting": _pairs(_count),
  "addition": _pairs(_add),
  "subtraction": _pairs(_subtract),
  "sorting": _pairs(_sort),
  "capitals": _pairs(_capitals),
  "facts": _countries,
}


def _pack(texts: list[str], length: int, pairs: list | None = None) -> Rows:
  """Join texts into rows; of question and answer pairs only the answers (and stops) are learnt."""
  ids, weights = [], []
  for i, text in enumerate(texts):
    data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    weight = np.ones(len(data), np.float32)
    if pairs is not None:
      weight[: len(pairs[i][0].encode())] = 0.0
      ids.append(data)
      weights.append(weight)
    else:
      ids.append(np.append(data, np.int32(EOS)))
      weights.append(np.append(weight, np.float32(1.0)))
  stream, weight = np.concatenate(ids), np.concatenate(weights)
  count = (len(stream) - 1) // length
  starts = np.arange(count) * length
  window = starts[:, None] + np.arange(length + 1)[None, :]
  return {"tokens": stream[window].astype(np.int32), "weights": weight[window[:, 1:]]}


def _spread(rows: Rows, count: int) -> Rows:
  """Take rows evenly from everywhere."""
  keep = np.linspace(0, len(rows["tokens"]) - 1, min(count, len(rows["tokens"]))).astype(int)
  return {k: v[keep] for k, v in rows.items()}


def _single(pairs: list[tuple[str, str]], length: int) -> Rows:
  """Lay one question and answer in each row, with the line's end as part of the answer."""
  tokens = np.full((len(pairs), length + 1), EOS, np.int32)
  weights = np.zeros((len(pairs), length), np.float32)
  for i, (question, answer) in enumerate(pairs):
    data = f"{question}{answer}\n".encode()
    if len(data) > length + 1:
      raise ValueError(f"an item of {len(data)} bytes does not fit rows of {length}")
    tokens[i, : len(data)] = np.frombuffer(data, np.uint8)
    weights[i, len(question.encode()) - 1 : len(data) - 1] = 1.0
  return {"tokens": tokens, "weights": weights}
