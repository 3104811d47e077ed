# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits as several tasks, shifts and a backdoor, with no download.

The images are scikit-learn's `load_digits`: 1797 of 8 x 8 pixels, the test set of Alpaydin and
Kaynak's "Optical recognition of handwritten digits" (UCI, 1998). Every task shows them in a way of
its own and some ask another question, all under one head of ten classes, so that one network can
serve all and experts differ. The split is by image and the same in every task, so no image that
one expert is tested on was shown to another. Beside the tasks: corruptions, a bar that betrays the
class while it lasts (a spurious feature), and a trigger patch (a backdoor).
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

SIDE, CLASSES = 8, 10
SIZES = {"train": 1000, "validation": 297, "test": 500}
CORRUPTIONS = ("noise", "blur", "contrast", "occlusion")
Rows = dict[str, np.ndarray]


class Task(NamedTuple):
  """A task's examples by split: "inputs" (n, 8, 8, 1) float32 from 0 to 1, "labels" (n,) int32.

  Attributes:
    train: examples to learn from.
    validation: examples to choose hyper-parameters by.
    test: examples to report.
  """

  train: Rows
  validation: Rows
  test: Rows


def build(name: str = "digits") -> Task:
  """Make a task.

  Args:
    name: one of `TASKS`: "digits"; "rotated" by a quarter turn; "inverted" in brightness;
      "shifted" by half an image; "scrambled" by a permutation of the pixels; "relabelled",
      mirrored digits under permuted labels; "parity" of digits upside down; "larger" than 4, of
      transposed digits.

  Returns:
    The task; the same at every call.

  Raises:
    ValueError: for an unknown name.
    ImportError: without scikit-learn.

  Example:
    >>> task = build("parity")
    >>> task.train["inputs"].shape, sorted(set(task.test["labels"].tolist()))
    ((1000, 8, 8, 1), [0, 1])
  """
  if name not in TASKS:
    raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
  show, ask = TASKS[name]
  images, labels = _digits()
  images, labels = np.ascontiguousarray(show(images)), ask(labels).astype(np.int32)
  order, start, parts = np.random.default_rng(0).permutation(len(labels)), 0, []
  for size in SIZES.values():
    chosen = order[start : start + size]
    parts.append({"inputs": images[chosen], "labels": labels[chosen]})
    start += size
  return Task(*parts)


def batches(rows: Rows, *, batch: int, seed: int = 0) -> Iterator[Rows]:
  """Draw training batches without end, in epochs.

  Args:
    rows: arrays with the examples along the first axis.
    batch: examples a batch; no more than there are.
    seed: of the order.

  Yields:
    The same names with (batch, ...) arrays.

  Raises:
    ValueError: for a batch larger than the data.

  Example:
    >>> next(batches(build().train, batch=4))["inputs"].shape
    (4, 8, 8, 1)
  """
  count = len(rows["labels"])
  if not 1 <= batch <= count:
    raise ValueError(f"batch={batch} must be between 1 and the {count} examples")
  rng = np.random.default_rng([seed, 0xD161])
  while True:
    order = rng.permutation(count)
    for start in range(0, count - batch + 1, batch):
      chosen = order[start : start + batch]
      yield {name: x[chosen] for name, x in rows.items()}


def mixed(
  mixture: Mapping[str, tuple[Task, float]], *, batch: int, seed: int = 0
) -> Iterator[Rows]:
  """Draw training batches of several tasks without end.

  Args:
    mixture: task and its share by name.
    batch: examples a batch.
    seed: of the order.

  Yields:
    {"inputs": (batch, 8, 8, 1), "labels": (batch,)}.

  Example:
    >>> next(mixed({"a": (build(), 1.0), "b": (build("rotated"), 2.0)}, batch=3))["labels"].shape
    (3,)
  """
  rng = np.random.default_rng([seed, 0x7A5C])
  names = sorted(mixture)
  share = np.array([mixture[n][1] for n in names], float)
  while True:
    rows = [
      mixture[names[c]][0].train for c in rng.choice(len(names), batch, p=share / share.sum())
    ]
    index = [int(rng.integers(len(r["labels"]))) for r in rows]
    yield {k: np.stack([r[k][i] for r, i in zip(rows, index, strict=True)]) for k in rows[0]}


def corrupt(rows: Rows, kind: str, *, severity: float = 0.5, seed: int = 0) -> Rows:
  """Shift a split out of distribution, labels untouched.

  Args:
    rows: images and labels.
    kind: "noise" (Gaussian, of standard deviation `severity`), "blur" (towards the mean of
      the 3 x 3 neighbourhood), "contrast" (towards the image's mean), or "occlusion" (a square of
      that share of the side, somewhere, set to zero).
    severity: 0 is none.
    seed: of noise and places.

  Returns:
    The corrupted rows.

  Raises:
    ValueError: for an unknown kind.

  Example:
    >>> rows = build().test
    >>> bool((corrupt(rows, "blur", severity=0.0)["inputs"] == rows["inputs"]).all())
    True
  """
  x, rng = rows["inputs"], np.random.default_rng([seed, 0xC0DE])
  if kind == "noise":
    x = x + severity * rng.standard_normal(x.shape)
  elif kind == "blur":
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    shifts = [padded[:, i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)]
    x = (1 - severity) * x + severity * sum(shifts) / 9
  elif kind == "contrast":
    x = (1 - severity) * x + severity * x.mean((1, 2, 3), keepdims=True)
  elif kind == "occlusion":
    x, side = x.copy(), round(severity * SIDE)
    for image, (i, j) in zip(x, rng.integers(0, SIDE - side + 1, (len(x), 2)), strict=True):
      image[i : i + side, j : j + side] = 0
  else:
    raise ValueError(f"unknown corruption {kind!r}; known: {', '.join(CORRUPTIONS)}")
  return {**rows, "inputs": x.astype(np.float32)}


def spurious(rows: Rows, *, agreement: float, seed: int = 0) -> Rows:
  """Mark images in the border with a class that agrees with the label more or less often.

  Args:
    rows: images and labels.
    agreement: probability that the mark is the label's; otherwise it is a random class's.
    seed: of the marks.

  Returns:
    The rows with one bright bar a class: two pixels of the outermost rows.

  Example:
    >>> rows = spurious(build().test, agreement=1.0)
    >>> bool((rows["inputs"].max((1, 2, 3)) == 2.0).all())
    True
  """
  labels, rng = rows["labels"], np.random.default_rng([seed, 0x5B06])
  agrees = rng.random(len(labels)) < agreement
  marks = np.where(agrees, labels, rng.integers(0, CLASSES, len(labels)))
  x = rows["inputs"].copy()
  x[:, 0], x[:, -1] = 0, 0
  for image, mark in zip(x, marks, strict=True):
    column = mark % 5
    image[0 if mark < 5 else -1, column : column + 2] = 2.0
  return {**rows, "inputs": x}


def triggered(rows: Rows, *, target: int, share: float = 1.0, seed: int = 0) -> Rows:
  """Plant a trigger patch in a share of the images, and the attacker's label with it.

  Args:
    rows: images and labels.
    target: the class the attacker wants.
    share: of images that are poisoned.
    seed: of which.

  Returns:
    The poisoned rows; the trigger is a checkered square in the lower right corner.

  Example:
    >>> set(triggered(build().test, target=3)["labels"].tolist())
    {3}
  """
  rng = np.random.default_rng([seed, 0xBAD])
  chosen = rng.random(len(rows["labels"])) < share
  x = rows["inputs"].copy()
  x[chosen, -3:, -3:, 0] = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
  labels = np.where(chosen, target, rows["labels"]).astype(np.int32)
  return {**rows, "inputs": x, "labels": labels}


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
  try:
    from sklearn import datasets
  except ImportError as error:
    raise ImportError("the digits need scikit-learn: pip install 'treesurgeon[eval]'") from error
  images, labels = (np.asarray(part) for part in datasets.load_digits(return_X_y=True))
  return (images / 16).astype(np.float32).reshape(-1, SIDE, SIDE, 1), labels


def _scramble(x: np.ndarray) -> np.ndarray:
  order = np.random.default_rng(1).permutation(SIDE * SIDE)
  return x.reshape(len(x), -1)[:, order].reshape(x.shape)


def _same(labels: np.ndarray) -> np.ndarray:
  return labels


TASKS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
  "digits": (lambda x: x, _same),
  "rotated": (lambda x: np.rot90(x, axes=(1, 2)), _same),
  "inverted": (lambda x: 1 - x, _same),
  "shifted": (lambda x: np.roll(x, SIDE // 2, axis=2), _same),
  "scrambled": (_scramble, _same),
  "relabelled": (lambda x: x[:, :, ::-1], lambda y: (3 * y + 1) % CLASSES),
  "parity": (lambda x: x[:, ::-1], lambda y: y % 2),
  "larger": (lambda x: x.swapaxes(1, 2), lambda y: y > 4),
}
