# SPDX-License-Identifier: Apache-2.0
import json
import sys

import pytest

from treesurgeon import io, registry
from treesurgeon.cli import main


def test_list_shows_every_transform(capsys):
  assert main.run(["list", "--names"]) == 0
  assert capsys.readouterr().out.split() == sorted(registry.TABLE)
  assert main.run(["list"]) == 0
  assert "GPTQ" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_usage_lists_the_commands(argv, capsys):
  assert main.run(argv) == 0
  said = capsys.readouterr().out
  assert all(command in said for command in main.COMMANDS)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_help(command, capsys):
  assert main.run([command, "--help"]) == 0
  assert "Flags:" in capsys.readouterr().out


def test_an_unknown_command_or_flag_is_told(fails):
  assert "unknown command 'aply'; did you mean 'apply'?" in fails("aply")
  assert "unknown command 'zzz'; commands: apply" in fails("zzz")
  for command in main.COMMANDS:
    assert "Unknown command line flag 'nonsense'" in fails(command, "--nonsense=1")


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch, capsys):
  from treesurgeon.cli import list_

  def broken(values, args):
    raise KeyError("x")

  monkeypatch.setattr(list_, "run", broken)
  with pytest.raises(KeyError):
    main.run(["list"])

  def interrupted(values, args):
    raise KeyboardInterrupt

  monkeypatch.setattr(list_, "run", interrupted)
  assert main.run(["list"]) == 130
  assert capsys.readouterr().err == "treesurgeon: list was interrupted\n"


def test_debug_shows_the_traceback_of_a_mistake():
  with pytest.raises(ValueError, match="list takes no argument, not 'x'"):
    main.run(["list", "x", "--debug"])


def test_main_exits_with_the_status():
  with pytest.raises(SystemExit) as exit:
    main.main(["nonsense"])
  assert exit.value.code == 2


def test_eval_prints_and_writes_its_numbers(directories, text, tmp_path, capsys, fails):
  out, model = tmp_path / "n.json", f"--model={directories / 'base'}"
  assert main.run(["eval", model, f"--text={text}", f"--json={out}", "--window=16"]) == 0
  numbers = json.loads(out.read_text())
  assert set(numbers) == {"nll", "perplexity", "bits_per_byte", "tokens"}
  assert numbers["tokens"] > 500 and 4 < numbers["nll"] < 7
  assert "perplexity" in capsys.readouterr().out
  assert "--text is required" in fails("eval", model)
  assert "is not a file" in fails("eval", model, f"--text={tmp_path}")
  assert "no directory to put it in" in fails(
    "eval", model, f"--text={text}", f"--json={tmp_path / 'no' / 'n.json'}"
  )
  binary = tmp_path / "b"
  binary.write_bytes(b"\xff")
  assert f"--text={binary} is not UTF-8" in fails("eval", model, f"--text={binary}")
  assert "takes no positional argument" in fails("eval", "x")


def test_inspect_shows_the_tree_and_reads_no_weight(directories, tmp_path, capsys, fails):
  model = f"--model={directories / 'base'}"
  assert main.run(["inspect", model]) == 0
  said = capsys.readouterr().out
  assert "layers/0:2/mlp/up/kernel" in said and "8 x 16" in said and "float32" in said
  out = tmp_path / "out"
  spelled = "compress.quantize.rtn(bits=4, group_size=8, select='layers/1/.*')"
  assert main.run(["apply", model, f"--out={out}", f"--transform={spelled}"]) == 0
  assert main.run(["inspect", f"--model={out}"]) == 0
  said = capsys.readouterr().out
  assert "layers/1:2/mlp/up/kernel" in said and "int4" in said and "lineage: " in said
  assert main.run(["inspect", model, f"--diff={out}"]) == 0
  said = capsys.readouterr().out
  assert "layers/1/mlp/up/kernel" in said and "layers/0/mlp/up/kernel" not in said
  assert "different" in said and "-> int4" in said
  assert "--model is required" in fails("inspect")


def test_export_writes_a_dense_directory(directories, tmp_path, fails):
  packed, dense = tmp_path / "packed", tmp_path / "dense"
  model = f"--model={directories / 'base'}"
  rtn = "--transform=compress.quantize.rtn(bits=4, group_size=8)"
  assert main.run(["apply", model, f"--out={packed}", rtn]) == 0
  assert main.run(["export", f"--model={packed}", f"--out={dense}"]) == 0
  a, b = io.load(packed), io.load(dense)
  address = "layers/0/mlp/up/kernel"
  assert (a.leaf(address).dense() == b.leaf(address)).all()
  assert a.lineage == b.lineage
  assert "exists" in fails("export", f"--model={packed}", f"--out={dense}")
  assert "has no adapters" in fails(
    "export", f"--model={packed}", f"--out={tmp_path / 'p'}", "--format=peft"
  )
  assert "format" in fails("export", model, f"--out={tmp_path / 'p'}", "--format=onnx")
  assert main.run(["export", model, f"--out={tmp_path / 'orbax'}", "--format=orbax"]) == 0


def test_export_writes_what_other_tools_quantize(directories, tmp_path, fails, capsys, monkeypatch):
  packed, out = tmp_path / "packed", tmp_path / "out"
  rtn = "--transform=compress.quantize.rtn(bits=4, group_size=8)"
  assert main.run(["apply", f"--model={directories / 'base'}", f"--out={packed}", rtn]) == 0
  form = "--format=compressed-tensors"
  assert main.run(["export", f"--model={packed}", f"--out={out}", form]) == 0
  assert "14 quantized layers, 9.400 bits a weight with their" in capsys.readouterr().out
  a, b = io.load(packed), io.load(out)
  address = "layers/0/mlp/up/kernel"
  assert (a.leaf(address).codes == b.leaf(address).codes).all()
  assert a.lineage == b.lineage
  said = fails("export", f"--model={packed}", f"--out={tmp_path / 'p'}", "--format=gptq")
  assert "multiples of 32" in said
  said = fails("export", f"--model={directories / 'base'}", f"--out={tmp_path / 'p'}", form)
  assert "no layer of the model is quantized; apply compress.quantize.rtn" in said
  assert main.run(["inspect", f"--model={out}"]) == 0
  assert "int4 g8" in capsys.readouterr().out
  monkeypatch.setitem(sys.modules, "gguf", None)
  said = fails("export", f"--model={packed}", f"--out={tmp_path / 'p'}", "--format=gguf")
  assert "--format=gguf needs the gguf package: pip install 'treesurgeon[gguf]'" in said


def test_a_dry_run_prints_the_tree_and_writes_nothing(directories, tmp_path, capsys):
  out = tmp_path / "out"
  expression = "grow.g_stack(growth=2) + compress.quantize.rtn(bits=4, group_size=4)"
  assert main.run(["apply", f"--model={directories / 'base'}", f"--out={out}",
                   f"--transform={expression}", "--dry_run"]) == 0  # fmt: skip
  printed = capsys.readouterr().out
  assert "layers/0:4/attn/q/kernel" in printed and "int4 g4" in printed
  assert not out.exists()
