# SPDX-License-Identifier: Apache-2.0
"""A closed world of facts, small enough to learn on a CPU, on which edits can be judged exactly.

Subjects have two-token names whose tokens they share with others; every subject has one object for
every relation; a fact is stated in several templates, of which each fact shows the model only some,
so that the others test storage and not strings. The world yields what CounterFact has (paraphrases,
neighbours that share the object and the prompt, essence prompts) and what it lacks: the edited
subject's other relations, subjects that share a name, and the rest of the world.

Attention limited to two tokens in the first two layers is what makes the facts editable: with
plain attention the last token gathers both names and recalls the object itself, every fact is
known, and nothing is stored at the subject (`edit.tracing` shows it, and ROME fails there).
"""

import dataclasses

import numpy as np
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers

from treesurgeon import models

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

  def subject(self, index: int | np.integer) -> str:
    """Return a subject's name."""
    first, last = self.names[index]
    return f"first{first} last{last}"

  def prompt(self, relation: int | np.integer, template: int | np.integer) -> str:
    """Return a template with a place for the subject; the last relation is the essence."""
    if relation == self.sizes.relations:
      return ESSENCE
    text = TEMPLATES[template]
    return text.replace("NOUN", f"noun{relation}").replace("VERB", f"verb{relation}")

  def answer(self, relation: int | np.integer, value: int | np.integer) -> str:
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
