# SPDX-License-Identifier: Apache-2.0
"""Calibration over eight virtual devices gives what one gives, in a process of its own."""

import json
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__)


@pytest.fixture(scope="module")
def report(tmp_path_factory, eight_devices):
  """Runs the cases in a process with eight devices."""
  out = tmp_path_factory.mktemp("data_parallel") / "report.json"
  command = [sys.executable, "-P", "-W", "error", str(HERE), str(out)]
  done = subprocess.run(command, env=eight_devices, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(out.read_text())


def test_batches_are_dealt_out_and_the_outcome_stays(report):
  assert report["shards"] == [8, 1]  # of eight examples, and of three, which eight do not divide
  for case, errors in report["errors"].items():
    assert max(errors.values()) < 1e-5, (case, errors)


def test_statistics_lie_on_every_device(report):
  assert report["replicated"]


def main(out):
  """Calibrates with and without a mesh, and compares the leaves."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from treesurgeon import models
  from treesurgeon.core import lifting, model, needs
  from treesurgeon.run import activations, collect, drivers, statistics

  spec = models.Spec(vocab_size=19, d_model=8, num_layers=2, num_heads=2, d_ff=16, max_positions=16)
  base = model.Model(spec, models.init(spec, jax.random.key(0)))
  rng = np.random.default_rng(0)
  batches = [rng.integers(0, 19, (n, 6)) for n in (8, 3)]
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  replicated = []

  def told(w, inputs, targets, forward, moment):
    told = (inputs * targets).mean() + forward({}, inputs).std()
    return {a: x * (told + moment[a].mean().mean()) for a, x in w.items()}

  def scaled(w, moment, top):
    return w * (moment.mean().mean() + top.value.max())

  moment = needs.Statistic("second_moment")
  wants = {"moment": moment, "top": needs.Statistic("absmax")}
  steps = {
    "leaves": lifting.over_leaves(scaled, hyper={}, wants=wants, scope="block"),
    "blocks": lifting.over_blocks(told, hyper={}, wants={"moment": moment}),
  }

  def watched(one):
    def apply(m, evidence, key):
      for state in evidence["moment"].values():
        at = state.moment.sharding
        replicated.append(len(at.device_set) == 1 or at.is_fully_replicated)
      return one.apply(m, evidence, key)

    return one._replace(apply=apply, info={"name": "demo", "given": {}, "arguments": {}})

  errors = {}
  for name, one in steps.items():
    for go, nbytes in ((drivers.run, None), (drivers.run_blockwise, 64)):
      made = [
        go(
          (watched(one),),
          base,
          collect.Materials(batches=batches, room=activations.Room(nbytes=nbytes, mesh=m)),
        )
        for m in (None, mesh)
      ]
      errors[f"{name} {go.__name__}"] = {
        a: float(jnp.abs(made[0].leaf(a) - np.asarray(made[1].leaf(a))).max())
        for a in base.addresses()
      }
  hidden = activations.Hidden(
    lambda b: statistics.embed(base, b), batches, activations.Room(mesh=mesh)
  )
  shards = [len({str(s.index) for s in h.addressable_shards}) for h, _, _ in hidden]
  report = {"errors": errors, "replicated": all(replicated), "shards": shards}
  pathlib.Path(out).write_text(json.dumps(report))


if __name__ == "__main__":
  main(*sys.argv[1:])
