# SPDX-License-Identifier: Apache-2.0
"""A closed world of facts, small enough to learn on a CPU, on which edits can be judged exactly.

Subjects have two-token names whose tokens they share with others; every subject has one object for
every relation; a fact is stated in several templates, of which each fact shows the model only some,
so that the others test storage and not strings. The world yields what CounterFact has (paraphrases,
neighbours that share the object and the prompt, essence prompts) and what it lacks: the edited
subject's other relations, subjects that share a name, and the rest of the world.

Attention limited to two tokens in the first two layers is what makes the facts editable: with
plain attention the last token gathers both names and recalls the object itself, every fact is
known, and nothing is stored at the subject (`editing.tracing` shows it, and ROME fails). Appositives
("First Last object .") alone do not help, but with the windows they speed up enrichment.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers

from treesurgeon import models
from treesurgeon.edit import requests

PAD, UNKNOWN, STOP = "[PAD]", "[UNK]", "."
TEMPLATES = (
  "{} 's NOUN is",
  "the NOUN of {} is",
  "{} has the NOUN",
  "NOUN of {} ?",
  "tell me , what is the NOUN of {} ?",
  "as for {} , the NOUN :",
  "{} , they say , has NOUN",
  "we know that {} VERB",
)
ESSENCE = "{} is a"
SHARES = (0.7, 0.1, 0.2)  # of facts, essences and appositives among training sentences
_FRAMES = sorted({w for t in (*TEMPLATES, ESSENCE) for w in t.split()} - {"{}", "NOUN", "VERB"})


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How large a world is.

  Attributes:
    subjects: how many there are.
    first, last: how many first and last names they share.
    relations: relations a subject has, the essence ("is a") not counted.
    objects: objects of each relation.
    shown: templates, of eight, in which the model sees a fact.
    seed: of the names, facts and templates.
  """

  subjects: int = 256
  first: int = 24
  last: int = 24
  relations: int = 5
  objects: int = 16
  shown: int = 5
  seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class World:
  """Hold the facts of a world.

  Attributes:
    sizes: what it was made from.
    names: [subjects, 2] indices of first and last names.
    facts: [subjects, relations + 1] objects; the last column is the essence.
    shown: [subjects, relations, templates], True where the model sees the statement.
    vocabulary: words by token id.
  """

  sizes: Sizes
  names: np.ndarray
  facts: np.ndarray
  shown: np.ndarray
  vocabulary: tuple[str, ...]

  def subject(self, index: int) -> str:
    """Return a subject's name."""
    first, last = self.names[index]
    return f"first{first} last{last}"

  def prompt(self, relation: int, template: int) -> str:
    """Return a template with a place for the subject; the last relation is the essence."""
    if relation == self.sizes.relations:
      return ESSENCE
    text = TEMPLATES[template]
    return text.replace("NOUN", f"noun{relation}").replace("VERB", f"verb{relation}")

  def answer(self, relation: int, value: int) -> str:
    """Return the word of an object."""
    return f"job{value}" if relation == self.sizes.relations else f"object{relation}_{value}"


def build(sizes: Sizes) -> World:
  """Draw a world.

  Args:
    sizes: how large it is.

  Returns:
    The world; equal sizes give equal worlds.

  Raises:
    ValueError: if there are fewer pairs of names than subjects, or no template is left unseen.

  Example:
    >>> world = build(Sizes(subjects=8, first=4, last=4, relations=2, objects=3))
    >>> world.prompt(1, 1).format(world.subject(0)).split()[:3]
    ['the', 'noun1', 'of']
  """
  if sizes.subjects > sizes.first * sizes.last:
    raise ValueError(
      f"{sizes.subjects} subjects need as many pairs of names; "
      f"{sizes.first} first and {sizes.last} last names give {sizes.first * sizes.last}"
    )
  if not 1 <= sizes.shown < len(TEMPLATES):
    raise ValueError(f"shown={sizes.shown} must be in [1, {len(TEMPLATES) - 1}]")
  rng = np.random.default_rng([sizes.seed, 0xFAC7])
  # Every name is used about equally often: last names in turn, first names without repetition.
  last = np.arange(sizes.subjects) % sizes.last
  start = rng.integers(sizes.first, size=sizes.last)
  first = (start[last] + np.arange(sizes.subjects) // sizes.last) % sizes.first
  objects = np.arange(sizes.subjects)[:, None] + np.zeros((1, sizes.relations + 1), int)
  facts = rng.permuted(objects % sizes.objects, axis=0)
  order = rng.permuted(
    np.broadcast_to(np.arange(len(TEMPLATES)), (sizes.subjects, sizes.relations, len(TEMPLATES))),
    axis=-1,
  )
  words = [PAD, UNKNOWN, STOP, *_FRAMES]
  for kind in ("noun", "verb"):
    words += [f"{kind}{r}" for r in range(sizes.relations)]
  words += [f"first{i}" for i in range(sizes.first)] + [f"last{i}" for i in range(sizes.last)]
  for r in range(sizes.relations):
    words += [f"object{r}_{i}" for i in range(sizes.objects)]
  words += [f"job{i}" for i in range(sizes.objects)]
  words += [f"filler{i}" for i in range(-len(words) % 8)]  # a vocabulary that tiles well
  return World(sizes, np.stack([first, last], 1), facts, order < sizes.shown, tuple(words))


def tokenizer(world: World) -> tokenizers.Tokenizer:
  """Make the world's word-level tokenizer, which can be saved as `tokenizer.json`.

  Args:
    world: the world.

  Returns:
    One token a word; unknown words become `[UNK]`.

  Example:
    >>> world = build(Sizes(subjects=8, first=4, last=4, relations=2, objects=3))
    >>> tokenizer(world).encode("first0 last0 is a").tokens
    ['first0', 'last0', 'is', 'a']
  """
  vocabulary = {w: i for i, w in enumerate(world.vocabulary)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore
  return made


def spec(
  world: World, *, d_model: int = 192, num_layers: int = 6, num_heads: int = 6, length: int = 24
) -> models.Spec:
  """Describe the network that learns a world: GPT-2's block, tied, with local early layers.

  Args:
    world: the world, for its vocabulary.
    d_model: width.
    num_layers: depth, at least 3.
    num_heads: heads.
    length: context length.

  Returns:
    The spec: learned positions, plain MLP of width 4 d, window 2 in layers 0 and 1.

  Example:
    >>> world = build(Sizes(subjects=8, first=4, last=4, relations=2, objects=3))
    >>> spec(world, d_model=8, num_layers=3, num_heads=1).window
    (2, 2, 0)
  """
  return models.Spec(
    vocab_size=len(world.vocabulary),
    d_model=d_model,
    num_layers=num_layers,
    num_heads=num_heads,
    d_ff=4 * d_model,
    max_positions=length,
    positions="learned",
    norm="layer",
    norm_eps=1e-5,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    gated=False,
    activation="gelu_tanh",
    window=(2, 2, *[0] * (num_layers - 2)),
    tied=True,
  )


def batches(
  world: World, *, rows: int, length: int, seed: int, object_weight: float = 10.0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Draw training rows without end: sentences packed, the last one of a row cut off.

  Args:
    world: the world.
    rows: rows a batch.
    length: tokens a row.
    seed: of the draw.
    object_weight: loss weight of an object; other words have 1.

  Yields:
    (tokens [rows, length] int32, weights [rows, length] float32): the weight belongs to the
    token as a target.

  Example:
    >>> world = build(Sizes(subjects=8, first=4, last=4, relations=2, objects=3))
    >>> tokens, weights = next(batches(world, rows=2, length=16, seed=0))
    >>> tokens.shape, float(weights.max())
    ((2, 16), 10.0)
  """
  statements, objects = _statements(world)
  lengths = (statements >= 0).sum(axis=1)
  groups = _groups(world)
  rng = np.random.default_rng([world.sizes.seed, seed, 0xBA7C4])
  share = np.cumsum(SHARES)[:-1]
  while True:
    tokens = np.zeros((rows, length), np.int32)
    weights = np.ones((rows, length), np.float32)
    for row in range(rows):
      at = 0
      while at < length:
        kind = groups[np.searchsorted(share, rng.random())]
        i = kind[rng.integers(len(kind))]
        n = min(lengths[i], length - at)
        tokens[row, at : at + n] = statements[i, :n]
        if objects[i] < n:
          weights[row, at + objects[i]] = object_weight
        at += n
    yield tokens, weights


def cloze(world: World, *, shown: bool | None = None) -> tuple[list[str], list[str]]:
  """List questions about every fact, with their answers.

  Args:
    world: the world.
    shown: only the templates that the model saw a fact in, only the others, or all.

  Returns:
    (prompts, answers), one template a fact, so that the list is short.

  Example:
    >>> world = build(Sizes(subjects=8, first=4, last=4, relations=2, objects=3))
    >>> len(cloze(world, shown=False)[0])
    16
  """
  prompts, answers = [], []
  for s, r in itertools.product(range(world.sizes.subjects), range(world.sizes.relations)):
    allowed = np.ones(len(TEMPLATES), bool) if shown is None else world.shown[s, r] == shown
    choices = np.flatnonzero(allowed)
    t = choices[(s + 3 * r) % len(choices)]
    prompts.append(world.prompt(r, t).format(world.subject(s)))
    answers.append(world.answer(r, world.facts[s, r]))
  return prompts, answers


def edits(world: World, count: int, *, seed: int = 0) -> list[requests.EditRequest]:
  """Draw edit requests, each with everything it is judged by.

  Args:
    world: the world.
    count: how many, of distinct subjects.
    seed: of the draw.

  Returns:
    Requests whose new object is another one of the same relation.

  Raises:
    ValueError: for more requests than subjects.

  Example:
    >>> world = build(Sizes(subjects=8, first=4, last=4, relations=2, objects=3))
    >>> request = edits(world, 1)[0]
    >>> request.target_new != request.target_true, len(request.paraphrases)
    (True, 7)
  """
  sizes = world.sizes
  if count > sizes.subjects:
    raise ValueError(f"count={count} edits of distinct subjects; the world has {sizes.subjects}")
  rng = np.random.default_rng([sizes.seed, seed, 0xED17])
  made = []
  for s in rng.permutation(sizes.subjects)[:count]:
    r = int(rng.integers(sizes.relations))
    true = int(world.facts[s, r])
    new = int((true + 1 + rng.integers(sizes.objects - 1)) % sizes.objects)
    shown = np.flatnonzero(world.shown[s, r])
    t = int(rng.choice(shown))
    prompt = world.prompt(r, t)
    near = np.flatnonzero((world.facts[:, r] == true) & (np.arange(sizes.subjects) != s))
    kin = np.flatnonzero((world.names == world.names[s]).sum(axis=1) == 1)
    others = [o for o in range(sizes.relations + 1) if o != r]
    made.append(
      requests.EditRequest(
        prompt=prompt,
        subject=world.subject(s),
        target_new=world.answer(r, new),
        target_true=world.answer(r, true),
        paraphrases=tuple(
          world.prompt(r, q).format(world.subject(s)) for q in range(len(TEMPLATES)) if q != t
        ),
        neighbours=tuple(prompt.format(world.subject(n)) for n in near[:10]),
        others=tuple(
          (world.prompt(o, t).format(world.subject(s)), world.answer(o, world.facts[s, o]))
          for o in others
        ),
        shared=tuple(
          (prompt.format(world.subject(n)), world.answer(r, world.facts[n, r])) for n in kin[:10]
        ),
        essence=(ESSENCE,),
      )
    )
  return made


def _statements(world: World) -> tuple[np.ndarray, np.ndarray]:
  """Tokenize every statement that may be shown: ids padded with -1, the object's place."""
  ids = {w: i for i, w in enumerate(world.vocabulary)}
  texts = []
  sizes = world.sizes
  for s, r, t in zip(*np.nonzero(world.shown), strict=True):
    fact = world.answer(r, world.facts[s, r])
    texts.append(f"{world.prompt(r, t).format(world.subject(s))} {fact} {STOP}")
  for s in range(sizes.subjects):
    job = world.answer(sizes.relations, world.facts[s, -1])
    texts.append(f"{ESSENCE.format(world.subject(s))} {job} {STOP}")
  for s, r in itertools.product(range(sizes.subjects), range(sizes.relations)):
    texts.append(f"{world.subject(s)} {world.answer(r, world.facts[s, r])} {STOP}")
  split = [t.split() for t in texts]
  out = np.full((len(split), max(map(len, split))), -1, np.int32)
  for i, words in enumerate(split):
    out[i, : len(words)] = [ids[w] for w in words]
  return out, np.array([len(words) - 2 for words in split])


def _groups(world: World) -> list[np.ndarray]:
  """Split the statements: facts, essences, appositives."""
  facts, subjects = int(world.shown.sum()), world.sizes.subjects
  ends = np.cumsum([0, facts, subjects, subjects * world.sizes.relations])
  return [np.arange(a, b) for a, b in itertools.pairwise(ends)]
