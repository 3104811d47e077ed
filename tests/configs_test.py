# SPDX-License-Identifier: Apache-2.0
"""Every config builds in every variant, and runs at toy size."""

import importlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCHERS = {
  "cache": "cache_directions",
  "connectivity": "connectivity",
  "directions": "directions",
  "facts": "train_facts",
  "merge_bench": "merge_bench",
  "minifloat": "minifloat_study",
  "prune": "prune_directions",
  "ptq_study": "ptq_study",
  "quantize": "quantize_directions",
  "quickstart": "run",
  "structure": "structure_directions",
  "vq": "vq_directions",
}


def test_every_config_has_a_launcher():
  assert set(LAUNCHERS) == {p.stem for p in (ROOT / "configs").glob("[!_]*.py")}


@pytest.mark.parametrize("variant", [None, "smoke"])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_builds(name, variant):
  assert importlib.import_module(f"treesurgeon.configs.{name}").get_config(variant).to_dict()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_an_unknown_variant_is_named(name):
  with pytest.raises(ValueError, match="no variant 'huge'"):
    importlib.import_module(f"treesurgeon.configs.{name}").get_config("huge")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_runs_at_toy_size(name, tmp_path):
  command = [sys.executable, "-P", "-m", f"treesurgeon.experiments.{LAUNCHERS[name]}"]
  config = f"--config={ROOT / 'configs' / name}.py:smoke"
  subprocess.run([*command, config, f"--workdir={tmp_path}"], check=True)
  assert list(tmp_path.iterdir())
