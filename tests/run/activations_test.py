# SPDX-License-Identifier: Apache-2.0
import errno
import os

import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.run import activations

BATCHES = [np.arange(12.0).reshape(2, 3, 2), np.arange(6.0).reshape(1, 3, 2)]


def hidden(nbytes, batches=BATCHES, **room):
  return activations.Hidden(jnp.asarray, batches, activations.Room(nbytes=nbytes, **room))


def grow(h, mask):
  del mask
  return jnp.concatenate([h, h + 1], axis=-1).astype(jnp.bfloat16)


@pytest.mark.parametrize("nbytes", [None, 72, 71, 0])
def test_a_file_holds_what_memory_would(nbytes, tmp_path):
  states = hidden(nbytes, folder=str(tmp_path))
  assert states.spilled == (nbytes in (71, 0))
  assert list(tmp_path.iterdir()) == []
  states.advance(lambda h, mask: h * 2)
  states.advance(grow)  # the width and the dtype change
  states.advance(lambda h, mask: h - 1)
  want = np.concatenate(BATCHES) * 2
  want = np.concatenate([want, want + 1], axis=-1) - 1
  assert [(h.shape, h.dtype.name, first) for h, first, _ in states] == [
    ((2, 3, 4), "bfloat16", 0), ((1, 3, 4), "bfloat16", 2),
  ]  # fmt: skip
  np.testing.assert_array_equal(np.asarray(states.whole(), np.float32), want)


def test_a_full_disk_is_told(monkeypatch, tmp_path):
  def full(*args):
    raise OSError(errno.ENOSPC, "no")

  monkeypatch.setattr(os, "pwrite", full)
  with pytest.raises(
    OSError, match="hidden states of calibration do not fit: No space left"
  ) as told:
    hidden(0, folder=str(tmp_path))
  assert told.value.filename == str(tmp_path)


def test_streams_share_the_room():
  assert activations.Room(nbytes=90).share(3).nbytes == 30
  assert activations.HERE.share(3) is activations.HERE
