# SPDX-License-Identifier: Apache-2.0
"""Tables and the figure of the study of minifloats, and what hardware is estimated to cost."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from treesurgeon.compress.quantize import minifloat
from treesurgeon.evaluate import bootstrap
from treesurgeon.experiments import ptq_tables

plt.switch_backend("agg")
FLOOR = 1e-3
Format = tuple[int, str]  # width, name
Pair = tuple[str, str, float, float]  # weights, inputs, cost, loss over the original
# e1 is integers without the lowest code: its one exponent bit starts at the subnormals' step.
COLORS = {"integers": "#1f77b4", "minifloats": "#d95f02", "one of each": "#bbbbbb"}


def write(workdir: pathlib.Path, found: Mapping[str, Any]) -> pathlib.Path:
  """Write `report.md` and `minifloat.png`.

  Args:
    workdir: where to.
    found: what `minifloat_study.measure` returned.

  Returns:
    The report.
  """
  over = _Over(found["original"], found["targets"])
  pairs = [(*k.split(), cost(*map(parse, k.split())), over(v)) for k, v in found["pairs"].items()]
  told = (
    "# Minifloats and integers\n",
    f"Loss of the original: {over.base:.4f} nats a byte. All other losses are over it.\n",
    f"## Weights alone\n\n{_weights(found['weights'], over)}\n",
    f"## Weights and inputs of one width\n\n{_widths(found['pairs'], found['tokens'], over)}\n",
    f"## Pairs that nothing cheaper beats\n\n{_front(pairs)}\n",
    f"How many of each kind, if the shifter cost less:\n\n{_shifters(found['pairs'], over)}\n",
    f"## Recipes\n\n{_recipes(found['recipes'], over)}",
  )
  figure = _figure(pairs)
  figure.savefig(workdir / "minifloat.png", dpi=130, bbox_inches="tight")
  plt.close(figure)
  path = workdir / "report.md"
  path.write_text("\n".join(told) + "\n")
  return path


def cost(weight: Format, act: Format, *, shifter: float = 0.5) -> float:
  """Estimate the six-input look-up tables of a multiply-accumulate unit.

  One for every partial product of the significands, one a bit of the exponents' sum, one for every
  two bits that a level of the shifter moves (a table selects one of four), one a bit of the
  accumulator, which is fixed-point, wide enough for every product, and has 8 bits to spare. Signs,
  those of integers too, and pipelining are left out. The paper's operators were not to be had.

  Args:
    weight: format of one factor; integers and e1 have no exponent.
    act: format of the other.
    shifter: tables for a bit that a level of the shifter moves.

  Returns:
    Tables.

  Example:
    >>> cost((8, "int"), (8, "int")), cost((4, "int"), (4, "int")), cost((4, "e2m1"), (4, "e2m1"))
    (71.0, 23.0, 35.0)
  """
  parts = [_anatomy(f) for f in (weight, act)]
  (first, low, left), (second, high, right) = parts
  shifts = left + right
  width = first + second + shifts
  levels = math.ceil(math.log2(shifts + 1))
  adder = max(low, high) + 1 if left and right else 0
  return first * second + adder + shifter * width * levels + width + 8.0


def same_width(losses: Mapping[str, Sequence[float]], bits: int) -> tuple[str, str]:
  """Name the pair of integers of a width, and the pair of minifloats that loses least.

  Args:
    losses: of pairs.
    bits: width.

  Returns:
    Two keys of `losses`.

  Example:
    >>> same_width({"int3 int3": [1.0], "e2m0 e2m0": [3.0], "int3 e2m0": [0.0]}, 3)
    ('int3 int3', 'e2m0 e2m0')
  """
  tried = [k for k in losses if all(parse(n)[0] == bits and n[0] == "e" for n in k.split())]
  return f"int{bits} int{bits}", min(tried, key=lambda k: float(np.sum(losses[k])))


def parse(name: str) -> Format:
  """Read a format's name.

  Args:
    name: "int4", "e2m1".

  Returns:
    Width and the name that `core.formats` knows.

  Example:
    >>> parse("int4"), parse("e2m1")
    ((4, 'int'), (4, 'e2m1'))
  """
  match = re.fullmatch(r"e(\d)m(\d)", name)
  return (1 + int(match[1]) + int(match[2]), name) if match else (int(name[3:]), "int")


class _Over:
  """Losses over the original's, in nats a prediction."""

  def __init__(self, original: Sequence[float], targets: int):
    self.original, self.targets = original, targets
    self.base = float(np.sum(original)) / targets / len(original)

  def __call__(self, losses: Sequence[float]) -> float:
    return float(np.sum(losses)) / self.targets / len(losses) - self.base

  def difference(self, a: Sequence[float], b: Sequence[float]) -> str:
    """Write a - b with its interval."""
    rows = [[(x, self.targets) for x in some] for some in (a, b)]
    x = bootstrap.paired_difference(*rows)
    return f"{x.value:+.4f} [{x.low:+.4f}, {x.high:+.4f}]"


def _anatomy(form: Format) -> tuple[int, int, int]:
  """Return significand bits, exponent bits, and places that the exponent may shift by."""
  bits, name = form
  if name == "int":
    return bits - 1, 0, 0
  exponent = int(name[1])
  return bits - exponent, exponent, 2**exponent - 2


def _label(bits: int, name: str) -> str:
  return f"int{bits}" if name == "int" else name


def _weights(losses: Mapping[str, Sequence[float]], over: _Over) -> str:
  widths = sorted({parse(n)[0] for n in losses if " " not in n})
  rows = [["bits", "int", *(f"e{e}" for e in range(1, max(widths))),
           *(f"by kernel, of {by}" for by in minifloat.BY)]]  # fmt: skip
  for bits in widths:
    cells = [over(losses[_label(bits, f)]) for f in minifloat.formats(bits)]
    cells += [math.nan] * (max(widths) - bits)
    picked = [losses.get(f"{bits} by {by}") for by in minifloat.BY]
    cells += [math.nan if x is None else over(x) for x in picked]
    rows.append([str(bits), *("" if math.isnan(x) else f"{x:.4f}" for x in cells)])
  return ptq_tables.markdown(rows)


def _widths(
  losses: Mapping[str, Sequence[float]], tokens: Mapping[str, Sequence[float]], over: _Over
) -> str:
  rows = [["bits", "integers", "tables", "best minifloats", "loss", "tables", "difference [95 %]",
           "with a scale a token"]]  # fmt: skip
  for bits in sorted({parse(k.split()[0])[0] for k in losses}):
    whole, best = same_width(losses, bits)
    price = [f"{cost(*map(parse, k.split())):.0f}" for k in (whole, best)]
    rows.append(
      [str(bits), f"{over(losses[whole]):.4f}", price[0], best.replace(" ", " x "),
       f"{over(losses[best]):.4f}", price[1], over.difference(losses[best], losses[whole]),
       over.difference(tokens[best], tokens[whole])]
    )  # fmt: skip
  return ptq_tables.markdown(rows)


def _shifters(losses: Mapping[str, Sequence[float]], over: _Over) -> str:
  rows = [["tables a bit and level of the shifter", *COLORS]]
  for shifter in (0.5, 0.25, 0.0):
    found = [
      (cost(*map(parse, k.split()), shifter=shifter), over(v), _kind(*k.split()))
      for k, v in losses.items()
    ]
    kinds = [kind for _, _, kind in ptq_tables.front(found)]
    rows.append([f"{shifter}", *(str(kinds.count(kind)) for kind in COLORS)])
  return ptq_tables.markdown(rows)


def _front(pairs: Sequence[Pair]) -> str:
  rows = [["weights x inputs", "tables", "loss"]]
  for price, loss, label in ptq_tables.front([(c, x, f"{w} x {a}") for w, a, c, x in pairs]):
    rows.append([label, f"{price:.0f}", f"{loss:.4f}"])
  return ptq_tables.markdown(rows)


def _recipes(found: Mapping[str, Mapping[str, Sequence[float]]], over: _Over) -> str:
  points = list(next(iter(found.values())))
  rows = [["", *(p.replace(" ", " x ") for p in points)]]
  for label, losses in found.items():
    rows.append([label, *(f"{over(losses[p]):.4f}" for p in points)])
  return ptq_tables.markdown(rows)


def _kind(weights: str, inputs: str) -> str:
  whole = [x.startswith(("int", "e1")) for x in (weights, inputs)]
  return "integers" if all(whole) else "one of each" if any(whole) else "minifloats"


def _figure(pairs: Sequence[Pair]) -> Any:
  figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
  bits = [parse(w)[0] * parse(a)[0] for w, a, _, _ in pairs]
  for ax, prices, name in (
    (axes[0], [float(b) for b in bits], "bits of weights x bits of inputs"),
    (axes[1], [c for _, _, c, _ in pairs], "estimated look-up tables of a multiply-accumulate"),
  ):
    for kind in ("one of each", "minifloats", "integers"):
      points = [
        (p, max(FLOOR, x), f"{w} x {a}")
        for p, (w, a, _, x) in zip(prices, pairs, strict=True)
        if _kind(w, a) == kind
      ]
      xs, ys, _ = zip(*points, strict=True)
      ax.plot(xs, ys, "o", ms=3, color=COLORS[kind], label=kind, alpha=0.7)
      if kind != "one of each":
        line = ptq_tables.front(points)
        ax.step([p[0] for p in line], [p[1] for p in line], where="post", color=COLORS[kind])
    ax.set(xscale="log", yscale="log", xlabel=name)
    ax.set_xticks([x for x in (10, 20, 50, 100, 200) if min(prices) / 2 < x < 1.2 * max(prices)])
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.xaxis.set_minor_formatter("")
    ax.spines[["top", "right"]].set_visible(False)
  axes[0].set_ylabel(f"loss over the original, nats a byte; at {FLOOR} also what is less")
  axes[0].legend(frameon=False)
  return figure
