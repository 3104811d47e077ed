# SPDX-License-Identifier: Apache-2.0
"""Texts about a world of facts: training sentences, questions about every fact, edit requests.

Sentences are facts, essences ("First Last is a job0 .") and appositives ("First Last object1_2 .").
Objects weigh ten times as much as other words in the loss: unweighted, the model stays at the
plateau where it guesses objects for several times as long.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from treesurgeon.edit import requests
from treesurgeon.evaluate import facts

SHARES = (0.7, 0.1, 0.2)  # of facts, essences and appositives among training sentences


def batches(
  world: facts.World, *, rows: int, length: int, seed: int, object_weight: float = 10.0
) -> Iterator[dict[str, np.ndarray]]:
  """Draw training rows without end: sentences packed, the last one of a row cut off.

  Args:
    world: the world.
    rows: rows a batch.
    length: tokens a row.
    seed: of the draw.
    object_weight: loss weight of an object; other words have 1.

  Yields:
    {"tokens": [rows, length] int32, "weights": [rows, length - 1] float32, of the tokens from the
    second on as targets}, as `train.fit` reads them.

  Example:
    >>> world = facts.build(facts.Sizes(subjects=8, first=4, last=4, relations=2, objects=3))
    >>> batch = next(batches(world, rows=2, length=16, seed=0))
    >>> batch["tokens"].shape, batch["weights"].shape, float(batch["weights"].max())
    ((2, 16), (2, 15), 10.0)
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
    yield {"tokens": tokens, "weights": weights[:, 1:]}


def cloze(world: facts.World, *, shown: bool | None = None) -> tuple[list[str], list[str]]:
  """List questions about every fact, with their answers.

  Args:
    world: the world.
    shown: only the templates that the model saw a fact in, only the others, or all.

  Returns:
    (prompts, answers), one template a fact, so that the list is short.

  Example:
    >>> world = facts.build(facts.Sizes(subjects=8, first=4, last=4, relations=2, objects=3))
    >>> len(cloze(world, shown=False)[0])
    16
  """
  prompts, answers = [], []
  for s, r in itertools.product(range(world.sizes.subjects), range(world.sizes.relations)):
    allowed = np.ones(len(facts.TEMPLATES), bool) if shown is None else world.shown[s, r] == shown
    choices = np.flatnonzero(allowed)
    t = choices[(s + 3 * r) % len(choices)]
    prompts.append(world.prompt(r, t).format(world.subject(s)))
    answers.append(world.answer(r, world.facts[s, r]))
  return prompts, answers


def edits(world: facts.World, count: int, *, seed: int = 0) -> list[requests.EditRequest]:
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
    >>> world = facts.build(facts.Sizes(subjects=8, first=4, last=4, relations=2, objects=3))
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
          world.prompt(r, q).format(world.subject(s)) for q in range(len(facts.TEMPLATES)) if q != t
        ),
        neighbours=tuple(prompt.format(world.subject(n)) for n in near[:10]),
        others=tuple(
          (world.prompt(o, t).format(world.subject(s)), world.answer(o, world.facts[s, o]))
          for o in others
        ),
        shared=tuple(
          (prompt.format(world.subject(n)), world.answer(r, world.facts[n, r])) for n in kin[:10]
        ),
        essence=(facts.ESSENCE,),
      )
    )
  return made


def _statements(world: facts.World) -> tuple[np.ndarray, np.ndarray]:
  """Tokenize every statement that may be shown: ids padded with -1, the object's place."""
  ids = {w: i for i, w in enumerate(world.vocabulary)}
  texts = []
  sizes = world.sizes
  for s, r, t in zip(*np.nonzero(world.shown), strict=True):
    fact = world.answer(r, int(world.facts[s, r]))
    texts.append(f"{world.prompt(r, t).format(world.subject(s))} {fact} {facts.STOP}")
  for s in range(sizes.subjects):
    job = world.answer(sizes.relations, world.facts[s, -1])
    texts.append(f"{facts.ESSENCE.format(world.subject(s))} {job} {facts.STOP}")
  for s, r in itertools.product(range(sizes.subjects), range(sizes.relations)):
    texts.append(f"{world.subject(s)} {world.answer(r, world.facts[s, r])} {facts.STOP}")
  split = [t.split() for t in texts]
  out = np.full((len(split), max(map(len, split))), -1, np.int32)
  for i, words in enumerate(split):
    out[i, : len(words)] = [ids[w] for w in words]
  return out, np.array([len(words) - 2 for words in split])


def _groups(world: facts.World) -> list[np.ndarray]:
  """Split the statements: facts, essences, appositives."""
  shown, subjects = int(world.shown.sum()), world.sizes.subjects
  ends = np.cumsum([0, shown, subjects, subjects * world.sizes.relations])
  return [np.arange(a, b) for a, b in itertools.pairwise(ends)]
