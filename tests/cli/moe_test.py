# SPDX-License-Identifier: Apache-2.0
"""The moe command: what it writes, and how it fails."""

import pytest
import yaml

from treesurgeon.cli import main
from treesurgeon.io import raw


@pytest.fixture
def document(directories):
  """A mixture of two models with random routers."""
  experts = [{"source_model": str(directories / n)} for n in "ab"]
  return {"base_model": str(directories / "base"), "gate_mode": "random", "experts": experts}


def test_a_mixture_is_built(tmp_path, document, capsys):
  (tmp_path / "moe.yml").write_text(yaml.safe_dump(document))
  assert main.run(["moe", str(tmp_path / "moe.yml"), f"--out={tmp_path / 'out'}"]) == 0
  assert "wrote" in capsys.readouterr().out
  assert raw.Directory(tmp_path / "out").config["model_type"] == "mixtral"
  kept = yaml.safe_load((tmp_path / "out" / "mergekit_moe_config.yml").read_text())
  assert kept == document


def test_mistakes_are_one_line_and_write_nothing(tmp_path, document, fails):
  file = tmp_path / "moe.yml"
  for change, message in (
    ({"experts_per_tokn": 1}, "did you mean 'experts_per_token'"),
    ({"gate_mode": "hidden"}, "has no positive_prompts"),
    ({"base_model": "nowhere"}, "nowhere is no directory"),
    ({"experts": [document["experts"][0]] * 2}, "--allow_same_experts"),
  ):
    file.write_text(yaml.safe_dump({**document, **change}))
    assert message in fails("moe", file, f"--out={tmp_path / 'out'}")
  file.write_text("base_model: [")
  assert "is not YAML" in fails("moe", file, f"--out={tmp_path / 'out'}")
  assert "is not a file" in fails("moe", tmp_path / "no.yml", f"--out={tmp_path / 'out'}")
  assert "takes one mergekit-moe configuration" in fails("moe", f"--out={tmp_path / 'out'}")
  assert "--out is required" in fails("moe", file)
  assert [p.name for p in tmp_path.iterdir()] == ["moe.yml"]
