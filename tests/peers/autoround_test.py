# SPDX-License-Identifier: Apache-2.0
"""AutoRound arrives where auto-round's own functions and optimizer do.

`LLMCOMPRESSOR_PYTHON`, set by `make test-peers`, names an interpreter that has auto-round. Without
it the committed weights are compared with, see `autoround_steps.py`.
"""

import os
import pathlib
import runpy
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import autoround, learnable, reconstruct, rtn
from treesurgeon.compress.quantize import grid as grids

HERE = pathlib.Path(__file__).parent
SCRIPT = HERE / "autoround_steps.py"
PEER = runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """Runs auto-round, or reads what it once found."""
  python, path = os.environ.get("LLMCOMPRESSOR_PYTHON"), HERE / "autoround_steps.npz"
  if python:
    path = tmp_path_factory.mktemp("peer") / "steps.npz"
    subprocess.run([python, str(SCRIPT), str(path)], check=True)
  with np.load(path) as file:
    return dict(file)


@pytest.mark.parametrize("case", PEER["CASES"], ids=PEER["name"])
def test_errors_agree(case, theirs):
  w, x = (jnp.asarray(a) for a in PEER["problem"]())
  bits, symmetric = case
  form = learnable.Form(bits, PEER["GROUP"], symmetric, "float32")

  def loss(made):
    return jnp.square(x @ (made["w"] - w)).mean()

  def tune(w):
    _, signs, _ = autoround.plan(steps=PEER["STEPS"], rate=None)
    best = reconstruct.learn(
      autoround.SHIFT, {"w": w}, {"w": form}, loss=lambda made, key: loss(made), whole=loss,
      optimizer=signs, steps=PEER["STEPS"], looks=PEER["STEPS"], key=jax.random.key(0),
    )  # fmt: skip
    return learnable.tensor(autoround.SHIFT, w, best["w"], form).dense()

  codes, grid = rtn.quantize(w, bits=bits, group_size=PEER["GROUP"], symmetric=symmetric)
  nearest = grids.tensor(codes, grid, bits=bits, group_size=PEER["GROUP"], store="float32").dense()
  ours, peers = jax.jit(tune)(w), theirs[PEER["name"](case)]
  errors = [float(loss({"w": made})) for made in (ours, peers, nearest)]
  # Signs of gradients near zero, and ties, fall otherwise now and then, and the paths part.
  np.testing.assert_allclose(errors[0], errors[1], rtol=0.1)
  assert max(errors[:2]) < errors[2]
