# SPDX-License-Identifier: Apache-2.0
"""The extract-lora command: what it writes, and how it fails."""

import shutil

import numpy as np
import pytest

from treesurgeon.cli import main
from treesurgeon.io import raw, with_lora


def test_full_rank_gives_the_model_back(directories, tmp_path, capsys):
  out, model = tmp_path / "out", directories / "a"
  argv = ["extract-lora", f"--base={directories / 'base'}", f"--model={model}", f"--out={out}"]
  assert main.run([*argv, "--max_rank=64", "--dtype=float32"]) == 0
  said = capsys.readouterr().out
  assert "adapters of 14 modules" in said and "saved in full: " in said
  tuned, back = raw.Directory(model), with_lora.WithLora(raw.Directory(directories / "base"), out)
  for name in tuned.addresses():
    np.testing.assert_allclose(back.leaf(name), tuned.leaf(name), atol=1e-5)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--max_rank=0"], "max_rank"),
    (["--model=nowhere"], "nowhere does not exist"),
    (["--save_modules=lmhead"], "nearest: lm_head"),
    (["--exclude=zzz"], "exclude='zzz' matches no module"),
    (["here"], "takes no positional argument"),
    (["--base="], "--base is required"),
  ],
)
def test_mistakes_are_one_line_and_write_nothing(directories, tmp_path, fails, flags, message):
  out = tmp_path / "out"
  argv = [f"--base={directories / 'base'}", f"--model={directories / 'a'}", f"--out={out}"]
  assert message in fails("extract-lora", *argv, *flags)
  assert not list(tmp_path.iterdir())


def test_an_existing_output_is_kept(directories, tmp_path, fails):
  shutil.copytree(directories / "a", tmp_path / "out")
  argv = [f"--base={directories / 'base'}", f"--model={directories / 'a'}"]
  assert "exists and holds" in fails("extract-lora", *argv, f"--out={tmp_path / 'out'}")
