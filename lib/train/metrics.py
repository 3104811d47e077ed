# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: `metrics.jsonl` and TensorBoard, consistent across a kill and a rerun."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorboardX

from treesurgeon.io import cache

FILE = "metrics.jsonl"


class Writer:
  """Append records to a work directory, from the first process only.

  Args:
    workdir: where to write; None writes nothing.
    step: step the run starts from; what an earlier run wrote about later steps is dropped.
  """

  def __init__(self, workdir: str | Path | None, *, step: int = 0):
    self._file = self._board = None
    if workdir is None or jax.process_index() != 0:
      return
    path = Path(workdir) / FILE
    kept = [r for r in read(workdir) if r["step"] <= step] if path.exists() and step else []
    cache.write(path, "".join(json.dumps(r) + "\n" for r in kept))
    self._file = path.open("a", encoding="utf-8")
    self._board = tensorboardX.SummaryWriter(
      str(Path(workdir) / "tensorboard"), purge_step=step + 1
    )

  def write(self, record: Mapping[str, Any]) -> None:
    """Append one record, which must hold "step"."""
    if self._file is None or self._board is None:
      return
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    for name, value in record.items():
      if name != "step" and isinstance(value, int | float):
        self._board.add_scalar(name, value, record["step"])

  def close(self) -> None:
    """Flush and close; further records are dropped."""
    if self._file is not None and self._board is not None:
      self._file.close()
      self._board.close()
    self._file = self._board = None


class Log:
  """Figures that wait on the device, and the clocks that records carry.

  Args:
    writer: where records go.
    show: called with the step and a line for the progress bar.
    per_step: floating-point operations of a step.
    tokens: tokens of a step.
    flops_before: operations spent before the run.
  """

  def __init__(
    self,
    writer: Writer,
    show: Callable[[int, str], None],
    *,
    per_step: float,
    tokens: int,
    flops_before: float,
  ):
    self._writer, self._show = writer, show
    self._per_step, self._tokens, self._before = per_step, tokens, flops_before
    self._waiting: list[dict[str, Any]] = []
    self._last: dict[str, float] = {}

  def start(self, step: int) -> None:
    """Set the clock of rates going, at `step` steps done."""
    self._since, self._from = time.perf_counter(), step

  def add(self, figures: dict[str, Any]) -> None:
    """Take a step's figures without waiting for them."""
    self._waiting.append(figures)

  def check(self, step: int) -> None:
    """Fetch what waits and stop at the first step that is not finite."""
    fetched = jax.device_get(self._waiting)
    self._waiting = []
    for i, figures in enumerate(fetched, step - len(fetched) + 1):
      for name in ("loss", "gradient_norm"):
        if not math.isfinite(figures[name]):
          raise ValueError(
            f"step {i}: {name} is {figures[name]}, with lr={figures['lr']:.3g}; training stopped "
            "and later checkpoints were not written. A smaller lr, more warmup, or clip may help"
          )
      self._last = {name: float(x) for name, x in figures.items()}

  def record(self, step: int) -> None:
    """Write what was last checked, with the clocks."""
    seconds = max(time.perf_counter() - self._since, 1e-9)
    rate = (step - self._from) / seconds
    self._writer.write(
      {
        "step": step,
        **self._last,
        "tokens": step * self._tokens,
        "flops": self._before + step * self._per_step,
        "tokens_per_second": rate * self._tokens,
        "flops_per_second": rate * self._per_step,
      }
    )
    text = f"loss {self._last['loss']:.4f}  {rate * self._tokens:,.0f} tokens/s"
    self._show(step, f"{text}  {rate * self._per_step / 1e9:,.1f} GFLOP/s")
    self.start(step)

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Keep what happens inside (evaluation, saving) out of the rates."""
    began = time.perf_counter()
    try:
      yield
    finally:
      self._since += time.perf_counter() - began


def read(workdir: str | Path) -> list[dict[str, Any]]:
  r"""Read a run's records; a line that a kill cut short is ignored.

  Args:
    workdir: the run's directory.

  Returns:
    Records in order.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...   Path(d, FILE).write_text('{"step": 1, "loss": 2.0}\n{"step"') and read(d)
    [{'step': 1, 'loss': 2.0}]
  """
  records = []
  for line in (Path(workdir) / FILE).read_text("utf-8").splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records
