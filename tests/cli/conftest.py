# SPDX-License-Identifier: Apache-2.0
"""Tiny model directories, written by our own code."""

import jax
import pytest

from treesurgeon import io, models
from treesurgeon.cli import main
from treesurgeon.core import model

SPEC = models.Spec(
  family="llama", vocab_size=257, d_model=8, num_layers=2, num_heads=2, d_ff=16, max_positions=32
)


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
  """Three models of one architecture: base, a, b."""
  root = tmp_path_factory.mktemp("models")
  for seed, name in enumerate(("base", "a", "b")):
    io.save(model.Model(SPEC, models.init(SPEC, jax.random.key(seed))), root / name)
  return root


@pytest.fixture
def text(tmp_path):
  """A calibration text."""
  path = tmp_path / "text.txt"
  path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
  return path


@pytest.fixture
def fails(capsys):
  """Runs a command that must fail with status 2 and one line, which is returned."""

  def go(*argv):
    capsys.readouterr()
    assert main.run([str(a) for a in argv]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("treesurgeon: ") and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    return said.err

  return go
