# SPDX-License-Identifier: Apache-2.0
"""The evolve command, and calibration texts of donors."""

import json

from treesurgeon import io
from treesurgeon.cli import main


def test_the_best_of_a_search_is_written(directories, tmp_path, text, capsys):
  out, history = tmp_path / "out", tmp_path / "trials.jsonl"
  donors = [str(directories / n) for n in ("a", "b")]
  argv = [
    "evolve", f"--model={directories / 'base'}", f"--out={out}", f"--text={text}",
    f"--transform=merge.task_arithmetic(models={donors}, weights=[0.5, 0.5])",
    '--bounds={"weights": [[0, 1], [0, 1]]}', "--budget=5", f"--history={history}",
  ]  # fmt: skip
  assert main.run(argv) == 0
  said = capsys.readouterr().out
  trials = [json.loads(line) for line in history.read_text().splitlines()]
  assert trials[0]["x"] == [0.5, 0.5] and len(trials) == 5
  best = min(trials, key=lambda t: t["value"])
  m = io.load(out)
  assert m.lineage[0].arguments["weights"] == best["x"]
  assert f"-> {best['value']:.6g}: merge.task_arithmetic(" in said


def test_bad_searches_are_told(directories, tmp_path, text, fails):
  argv = ["evolve", f"--model={directories / 'base'}", f"--out={tmp_path / 'o'}", f"--text={text}"]
  merge = f"--transform=merge.linear(models=['{directories / 'a'}'])"
  assert "--bounds is required" in fails(*argv, merge)
  assert "is not a JSON object" in fails(*argv, merge, "--bounds=lam")
  assert "of one method, not of" in fails(*argv, merge, merge, '--bounds={"lam": [0, 1]}')
  assert "has no argument 'lam'" in fails(*argv, merge, '--bounds={"lam": [0, 1]}')


def test_each_donor_may_have_its_text(directories, tmp_path, text, fails):
  other = tmp_path / "other.txt"
  other.write_text("Pack my box with five dozen liquor jugs. " * 20)
  donors = [str(directories / n) for n in ("a", "b")]
  argv = [
    "apply", f"--model={directories / 'base'}", "--samples=2", "--length=16",
    f"--transform=merge.regmean_pp(models={donors})", f"--calibration={text}",
  ]  # fmt: skip
  for name, more in (("one", []), ("two", [f"--calibration={other}"])):
    assert main.run([*argv, f"--out={tmp_path / name}", *more]) == 0
  one, two = (io.load(tmp_path / n) for n in ("one", "two"))
  assert one.lineage[0].driver == "run_blockwise"
  assert {"calibration of donor 0", "batches of donor 1"} <= set(two.lineage[0].inputs)
  address = "layers/1/mlp/up/kernel"
  assert (one.leaf(address) != two.leaf(address)).any()
  said = fails(*argv, f"--out={tmp_path / 'x'}", f"--calibration={other}", f"--calibration={text}")
  assert "--calibration is given 3 times; the transform names 2 donors" in said
