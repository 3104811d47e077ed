# SPDX-License-Identifier: Apache-2.0
"""Reading ahead and writing behind: order, bounds, and errors from other threads."""

import threading

import pytest

from treesurgeon.run import pipeline


def test_order_is_kept_and_little_is_held():
  out, held, most = [], 0, 0
  lock = threading.Lock()

  def read(i):
    nonlocal held, most
    with lock:
      held += 1
      most = max(most, held)
    return i

  def write(i, x):
    nonlocal held
    out.append((i, x))
    with lock:
      held -= 1

  with pipeline.Pipeline(read, write, list(range(50))) as line:
    for item, found in line:
      line.put(item, found * 2)
  assert out == [(i, 2 * i) for i in range(50)]
  assert most <= 4


def test_nothing_to_do():
  with pipeline.Pipeline(int, print, []) as line:
    assert list(line) == []


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_a_write_that_fails_is_told(bad):
  done = []

  def write(i):
    if i == bad:
      raise OSError(f"no space for {i}")
    done.append(i)

  def go():
    with pipeline.Pipeline(lambda i: i, write, list(range(10))) as line:
      for item, _ in line:
        line.put(item)

  with pytest.raises(OSError, match=f"no space for {bad}"):
    go()
  assert done == list(range(bad))


def test_a_read_that_fails_is_told():
  def read(i):
    if i == 2:
      raise ValueError("bad tensor")
    return i

  done = []

  def go():
    with pipeline.Pipeline(read, done.append, [0, 1, 2, 3]) as line:
      for item, _ in line:
        line.put(item)

  with pytest.raises(ValueError, match="bad tensor"):
    go()
  assert done in ([0], [0, 1])


def test_an_error_of_the_work_stops_the_threads():
  before = threading.active_count()

  def go():
    with pipeline.Pipeline(lambda i: i, lambda i: None, [1, 2, 3]) as line:
      for item, _ in line:
        line.put(item)
        raise KeyError(item)

  with pytest.raises(KeyError):
    go()
  assert threading.active_count() == before
