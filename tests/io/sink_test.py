# SPDX-License-Identifier: Apache-2.0
import hashlib
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import io, models
from treesurgeon.core import leaves, model
from treesurgeon.models import hf

GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 16, "n_layer": 3, "n_head": 2}
SHARD = 6000

# Streams a model with one compressed leaf, and dies after the given number of leaves.
STREAM = """
import os, signal, sys
import jax.numpy as jnp
import numpy as np
from treesurgeon import io
from treesurgeon.core import leaves
from treesurgeon.models import hf

def leaf(source, address):
  w = np.asarray(source.leaf(address))
  if address.endswith("/attn/q/kernel") or address.endswith("1/mlp/up/kernel"):
    return leaves.LowRank(w[:, :2], w[:2], 0.5)
  return w

source = io.Checkpoint(sys.argv[1])
with io.Sink(sys.argv[2], source.spec, max_shard_bytes=6000, job="j") as sink:
  computed = 0
  for i, address in enumerate(source.addresses()):
    if i == int(sys.argv[3]):
      os.kill(os.getpid(), signal.SIGKILL)
    if not sink.done(address):
      computed += 1
      sink.write(address, leaf(source, address))
  sink.close()
print(computed)
"""


def make():
  spec = hf.from_config(GPT2)
  return model.Model(spec, models.init(spec, jax.random.key(0)))


def stream(source, out, stop):
  command = [sys.executable, "-P", "-c", STREAM, str(source), str(out), str(stop)]
  return subprocess.run(command, check=False, capture_output=True, text=True)


def digests(directory):
  return {
    p.name: hashlib.sha256(p.read_bytes()).hexdigest()
    for p in directory.iterdir()
    if p.name not in ("README.md", "lineage.json")  # hold the directory's own name
  }


def test_killed_stream_resumes(tmp_path):
  source = io.save(make(), tmp_path / "source")
  count = len(make().addresses())
  whole = stream(source, tmp_path / "whole", -1)
  assert whole.returncode == 0, whole.stderr
  assert int(whole.stdout) == count
  for stop in (20, 33):
    assert stream(source, tmp_path / "out", stop).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
  done = stream(source, tmp_path / "out", -1)
  assert done.returncode == 0, done.stderr
  assert 0 < int(done.stdout) < count - 10
  assert digests(tmp_path / "out") == digests(tmp_path / "whole")
  assert isinstance(io.load(tmp_path / "out").leaf("layers/0/attn/q/kernel"), leaves.LowRank)


def test_any_order(tmp_path):
  m = make()
  with io.Sink(tmp_path / "out", m.spec) as sink:
    for address in reversed(m.addresses()):
      sink.write(address, m.leaf(address))
    sink.close()
  jax.tree.map(np.testing.assert_array_equal, io.load(tmp_path / "out").params, m.params)


def test_mistakes(tmp_path):
  m = make()
  with io.Sink(tmp_path / "out", m.spec) as sink:
    with pytest.raises(ValueError, match="'layers/7/x' is not a leaf of this gpt2 model"):
      sink.write("layers/7/x", jnp.zeros(2))
    with pytest.raises(
      ValueError, match=r"final_norm/scale has shape \(2,\); the spec says \(16,\)"
    ):
      sink.write("final_norm/scale", jnp.zeros(2))
    sink.write("final_norm/scale", m.leaf("final_norm/scale"))
    with pytest.raises(ValueError, match=r"\d+ leaves were never written: embed/tokens/embedding"):
      sink.close()
  assert os.listdir(tmp_path) == []


def test_save_refuses_an_existing_output(tmp_path):
  m = make()
  io.save(m, tmp_path / "out")
  before = digests(tmp_path / "out")
  with pytest.raises(ValueError, match="out exists and holds"):
    io.save(m, tmp_path / "out")
  assert digests(tmp_path / "out") == before
  io.save(m, tmp_path / "out", overwrite=True)
  assert digests(tmp_path / "out") == before


def test_save_over_its_own_source(tmp_path):
  m = make()
  io.save(m, tmp_path / "out")
  io.save(
    io.load(tmp_path / "out"), tmp_path / "out", overwrite=True, tokenizer_from=tmp_path / "out"
  )
  jax.tree.map(np.testing.assert_array_equal, io.load(tmp_path / "out").params, m.params)
