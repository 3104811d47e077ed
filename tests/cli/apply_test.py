# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from treesurgeon import io, models, registry
from treesurgeon.cli import main
from treesurgeon.core import leaves, model
from treesurgeon.evaluate import size
from treesurgeon.io import checkpoint, tokenizer
from treesurgeon.run import calibration, collect, replay

RTN = "compress.quantize.rtn(bits=4, group_size=8)"
CONFIG = """
import ml_collections

def get_config(bits="4"):
  config = ml_collections.ConfigDict()
  config.bits = int(bits)
  config.transform = f"compress.quantize.rtn(bits={bits}, group_size=8)"
  return config
"""


def apply(*argv):
  return main.run(["apply", *map(str, argv)])


def test_a_leaf_transform_is_streamed_and_recorded(directories, tmp_path, capsys):
  out = tmp_path / "out"
  assert apply(f"--model={directories / 'base'}", f"--out={out}", f"--transform={RTN}") == 0
  assert capsys.readouterr().out == f"wrote {out}\n"
  m = io.load(out)
  assert isinstance(m.leaf("layers/1/mlp/up/kernel"), leaves.QuantizedTensor)
  (record,) = m.lineage
  assert (record.expression, record.driver, record.seed) == (
    RTN.replace("bits=4, ", ""),
    "stream",
    0,
  )
  base = io.Checkpoint(directories / "base")
  assert record.inputs == {"base": base.digest()}
  given = collect.Materials(digests={"base": base.digest()})
  again = replay.replay(m.lineage, io.load(directories / "base"), [given], parse=registry.parse)
  assert replay.differing(m, again) == []


def test_one_command_writes_what_other_tools_load(directories, tmp_path, capsys):
  out = tmp_path / "out"
  args = [f"--model={directories / 'base'}", f"--out={out}", f"--transform={RTN}"]
  assert apply(*args, "--format=compressed-tensors") == 0
  assert f"wrote {out}: " in capsys.readouterr().out
  assert [p.name for p in tmp_path.iterdir()] == ["out"]
  config = json.loads((out / "config.json").read_text())["quantization_config"]
  assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
  assert apply(*args[:1], f"--out={tmp_path / 'ours'}", args[2]) == 0
  assert (
    replay.differing(checkpoint.Checkpoint(out), checkpoint.Checkpoint(tmp_path / "ours")) == []
  )
  assert io.load(out).lineage[0].expression == RTN.replace("bits=4, ", "")


@pytest.mark.parametrize("driver", ["run", "blockwise"])
def test_every_driver_writes_the_same_weights(directories, tmp_path, driver):
  for name, more in (("one", []), ("two", [f"--driver={driver}"])):
    args = [f"--model={directories / 'base'}", f"--out={tmp_path / name}", f"--transform={RTN}"]
    assert apply(*args, *more) == 0
  files = [checkpoint.Checkpoint(tmp_path / n) for n in ("one", "two")]
  assert replay.differing(*files) == []
  assert files[1].lineage[0].driver == {"blockwise": "run_blockwise"}.get(driver, driver)


def test_a_family_of_no_other_tool_is_refused_before_the_work(tmp_path, capsys):
  spec = models.Spec(vocab_size=8, d_model=8, num_layers=1, num_heads=1, d_ff=8)
  io.save(model.Model(spec, models.init(spec, jax.random.key(0))), tmp_path / "own")
  args = [f"--model={tmp_path / 'own'}", f"--out={tmp_path / 'out'}", f"--transform={RTN}"]
  assert apply(*args, "--format=compressed-tensors") == 2
  assert "it belongs to no family" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["own"]


def test_calibration_is_recorded_well_enough_to_do_it_again(directories, tmp_path, text):
  out = tmp_path / "out"
  args = [f"--model={directories / 'base'}", f"--out={out}", f"--calibration={text}", "--seed=3"]
  args += ["--samples=4", "--length=16", "--batch=2", "--transform=compress.prune.wanda()"]
  assert apply(*args) == 0
  m = io.load(out)
  (record,) = m.lineage
  assert record.recipe == {"samples": 4, "length": 16, "batch": 2}
  assert set(record.inputs) == {"base", "batches", "calibration"} and record.seed == 3
  batches = calibration.batches(
    text.read_text(), tokenizer.ByteTokenizer(), **record.recipe, vocab_size=257
  )
  again = replay.replay(
    m.lineage,
    io.load(directories / "base"),
    [collect.Materials(batches=batches)],
    parse=registry.parse,
  )
  assert replay.differing(m, again) == []


def test_a_transform_may_take_several_calibration_texts(directories, tmp_path, text, fails):
  other = tmp_path / "other.txt"
  other.write_text("0123456789" * 40)
  args = [f"--model={directories / 'base'}", f"--out={tmp_path / 'out'}", f"--calibration={text}"]
  args += ["--samples=2", "--length=16", "--transform=compress.prune.d_pruner()"]
  assert "d_pruner needs two calibration texts" in fails("apply", *args)
  assert apply(*args, f"--calibration={other}") == 0
  (record,) = io.load(tmp_path / "out").lineage
  assert {"calibration 0", "calibration 1"} <= set(record.inputs)


def test_transforms_chain_and_lineage_goes_on(directories, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  assert apply(f"--model={directories / 'base'}", f"--out={one}", "--transform=grow.g_stack()") == 0
  models = f"merge.linear(models=['{one}'])"
  assert apply(f"--model={one}", f"--out={two}", f"--transform={models}", f"--transform={RTN}") == 0
  lineage = io.Checkpoint(two).lineage
  assert [r.index for r in lineage] == [0, 0, 1]
  assert lineage[0].expression == "grow.g_stack()"
  assert lineage[1].inputs["donor 0"] == io.Checkpoint(one).digest()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_a_config_names_the_transform(directories, tmp_path, fails):
  config = tmp_path / "x.py"
  config.write_text(CONFIG)
  args = [f"--model={directories / 'base'}", f"--out={tmp_path / 'out'}"]
  assert apply(*args, f"--config={config}:3") == 0
  assert io.load(tmp_path / "out").leaf("layers/0/attn/q/kernel").bits == 3
  args[1] = f"--out={tmp_path / 'other'}"
  said = fails("apply", *args, f"--config={config}", "--config.bitz=3")
  assert "bitz" in said and "--config" in said
  assert "bits" in fails("apply", *args, f"--config={config}", "--config.bits=x")
  assert "nothing.py" in fails("apply", *args, f"--config={tmp_path / 'nothing.py'}")


@pytest.mark.parametrize(
  ("transform", "message"),
  [
    ("compress.quantize.rtm()", "unknown transform 'compress.quantize.rtm'; did you mean compress"),
    ("compress.quantize.rtn(bit=4)", "compress.quantize.rtn has no argument 'bit'; it takes bits"),
    ("compress.quantize.rtn(bits=n)", "the argument bits=n is not a literal"),
    ("compress.quantize.rtn(bits={[1]: 2})", "is not a literal"),
    ("compress.quantize.rtn(bits='4')", "compress.quantize.rtn: bits='4' must be int"),
    ("compress.quantize.rtn(bits=3, bits=4)", "'bits'"),
    ("compress.quantize.rtn(4)", "arguments are given by name"),
    ("compress.quantize.rtn", "'compress.quantize.rtn' is not a call"),
    ("compress.quantize.rtn(bits=4", "cannot read the transform"),
    ("compress.quantize.rtn(select='layers/9/.*')", "no address matches 'layers/9/.*'; nearest"),
    ("by_path([('layers/9/.*', compress.quantize.rtn())])", "no address matches 'layers/9/.*'"),
    ("by_path([('.*', grow.g_stack())])", "works on whole models"),
    ("compress.quantize.gptq()", "needs calibration text and none was given"),
    ("merge.ties()", "needs donor models and none was given"),
    ("edit.rome()", "needs edit requests and none were given"),
    ("merge.ties(models=['nowhere'])", "nowhere"),
    ("edit.rome(requests='nowhere.json')", "requests=nowhere.json is not a file"),
  ],
)
def test_a_bad_transform_is_told(directories, tmp_path, fails, transform, message):
  out = tmp_path / "out"
  said = fails(
    "apply", f"--model={directories / 'base'}", f"--out={out}", f"--transform={transform}"
  )
  assert message in said
  assert not out.exists()


def test_bad_models_are_told(directories, tmp_path, fails):
  def go(model):
    return fails("apply", f"--model={model}", f"--out={tmp_path / 'out'}", f"--transform={RTN}")

  (tmp_path / "empty").mkdir()
  assert "no config.json" in go(tmp_path / "empty")
  assert str(tmp_path / "nowhere") in go(tmp_path / "nowhere")
  file = tmp_path / "file"
  file.write_text("")
  assert "directory" in go(file)
  (tmp_path / "alien").mkdir()
  (tmp_path / "alien" / "model.safetensors").write_bytes(
    (directories / "base" / "model.safetensors").read_bytes()
  )
  (tmp_path / "alien" / "config.json").write_text(json.dumps({"model_type": "mamba9"}))
  said = go(tmp_path / "alien")
  assert "mamba9" in said and "llama" in said and "gpt2" in said


def test_bad_calibration_texts_are_told(directories, tmp_path, fails):
  def go(path, *more):
    return fails(
      "apply", f"--model={directories / 'base'}", f"--out={tmp_path / 'out'}",
      f"--calibration={path}", "--transform=compress.prune.wanda()", *more,
    )  # fmt: skip

  short = tmp_path / "short.txt"
  short.write_text("abc")
  assert f"--calibration={short} has 3 tokens, fewer than one sequence of 32" in go(short)
  short.write_text("")
  assert "has 0 tokens" in go(short)
  short.write_bytes(b"\xff\xfe" * 50)
  assert f"--calibration={short} is not UTF-8 text" in go(short)
  assert "is not a file" in go(tmp_path / "nowhere.txt")
  assert "samples" in go(short, "--samples=0")
  lines = tmp_path / "lines.jsonl"
  lines.write_text('{"text": "a"}\n"b"\n')
  assert f"""--calibration={lines}:2: '"b"' is not a JSON object""" in go(lines)
  lines.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
  assert f"--calibration={lines}:1: 'messages' holds messages, and the model has no chat" in go(
    lines
  )
  np.save(tmp_path / "ids.npy", np.full((2, 32), 257))
  said = go(tmp_path / "ids.npy")
  assert "ids.npy has the token 257, the model's vocabulary ends at 256" in said
  assert "--activation_budget: budget 'much' is not a size such as" in go(
    short, "--activation_budget=much"
  )


@pytest.mark.filterwarnings("always")
def test_too_few_tokens_are_told_in_one_line(directories, tmp_path, text, capsys):
  args = [f"--model={directories / 'base'}", f"--calibration={text}", "--samples=1", "--length=8"]
  assert apply(*args, f"--out={tmp_path / 'out'}", f"--transform={GPTQ}") == 0
  said = capsys.readouterr().err
  told = (
    "layers/0/mlp/down/kernel: 8 calibration tokens for 16 input features, so the second moment"
  )
  assert said.startswith(f"treesurgeon: warning: {told}") and said.count("\n") == 1, said


def test_an_output_that_exists_is_kept(directories, tmp_path, fails):
  out = tmp_path / "out"
  args = [f"--model={directories / 'base'}", f"--out={out}"]
  assert apply(*args, f"--transform={RTN}") == 0
  before = (out / "model.safetensors").read_bytes()
  other = "--transform=compress.quantize.rtn(bits=3, group_size=8)"
  said = fails("apply", *args, other)
  assert str(out) in said and "exists" in said and "overwrite" in said
  assert (out / "model.safetensors").read_bytes() == before
  assert apply(*args, other, "--overwrite") == 0
  assert io.load(out).leaf("layers/0/mlp/up/kernel").bits == 3


def test_flags_that_are_wrong_or_missing_are_told(directories, tmp_path, fails):
  model, out = f"--model={directories / 'base'}", f"--out={tmp_path / 'out'}"
  assert "--model is required" in fails("apply", out, f"--transform={RTN}")
  assert "--out is required" in fails("apply", model, f"--transform={RTN}")
  assert "--transform or --config is required" in fails("apply", model, out)
  assert "Unknown command line flag 'modle'" in fails("apply", "--modle=x")
  assert "takes no positional argument, not 'x'" in fails("apply", "x", model, out)
  assert "driver" in fails("apply", model, out, f"--transform={RTN}", "--driver=fast")
  said = fails("apply", model, out, "--transform=grow.g_stack()", "--driver=stream")
  assert "works on a whole model, so it cannot be streamed" in said


KILLED = """
import os, signal, sys
from treesurgeon.cli import main
from treesurgeon.io import sink
count, write = 0, sink.Sink.write
def dying(self, address, leaf):
  global count
  count += 1
  if count == int(os.environ["DIES_AT"]):
    os.kill(os.getpid(), signal.SIGKILL)
  write(self, address, leaf)
sink.Sink.write = dying
sys.exit(main.run(sys.argv[1:]))
"""


GPTQ = "compress.quantize.gptq(bits=4, group_size=8)"


@pytest.mark.parametrize("by_block", [False, True], ids=["by leaf", "by block"])
def test_a_killed_stream_loses_nothing_and_a_rerun_completes_it(
  directories, tmp_path, text, by_block
):
  out, whole = tmp_path / "out", tmp_path / "whole"
  args = [f"--model={directories / 'base'}", f"--transform={RTN}", "--max_shard_bytes=600"]
  if by_block:  # in one shard; the second block is cut short
    args = [args[0], f"--transform={GPTQ}", f"--calibration={text}", "--activation_budget=1kB"]
  assert apply(*args, f"--out={whole}") == 0
  out.mkdir()
  (out / "mine.txt").write_text("precious")
  command = [sys.executable, "-P", "-c", KILLED, "apply", *args, f"--out={out}", "--overwrite"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "DIES_AT": "15" if by_block else "12"}
  killed = subprocess.run(command, env=environment, check=False, capture_output=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert os.listdir(out) == ["mine.txt"]
  left = list((tmp_path / ".out.partial").glob("*.safetensors*"))
  assert left or (tmp_path / ".out.partial" / "shard.open").exists(), "nothing was kept"
  assert apply(*args, f"--out={out}", "--overwrite") == 0
  names = sorted(p.name for p in whole.iterdir())
  assert sorted(p.name for p in out.iterdir()) == names
  for name in names:
    if name != "README.md":  # which bears the directory's name
      same = (out / name).read_bytes() == (whole / name).read_bytes()
      assert same or name == "lineage.json", name
  assert replay.differing(io.Checkpoint(out), io.Checkpoint(whole)) == []
  assert io.Checkpoint(out).lineage == io.Checkpoint(whole).lineage
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt", "whole"]


def test_blocks_are_streamed_as_they_are_changed_in_memory(directories, tmp_path, text):
  out = tmp_path / "out"
  args = [f"--model={directories / 'base'}", f"--calibration={text}", f"--transform={GPTQ}"]
  args += ["--samples=4", "--length=16", "--activation_budget=1kB"]
  assert apply(*args, f"--out={out}") == 0
  streamed = io.load(out)
  batches = calibration.batches(
    text.read_text(), tokenizer.ByteTokenizer(), **streamed.lineage[0].recipe, vocab_size=257
  )
  again = replay.replay(
    streamed.lineage,
    io.load(directories / "base"),
    [collect.Materials(batches=batches)],
    parse=registry.parse,
  )
  assert replay.differing(streamed, again) == []
  assert streamed.lineage[0].driver == "run_blockwise"


def test_kernels_that_gpt2_stores_the_other_way_round_are_grouped_along_their_inputs(
  tmp_path, text
):
  spec = models.Spec(
    family="gpt2", vocab_size=257, d_model=8, num_layers=1, num_heads=2, d_ff=16, max_positions=32,
    positions="learned", norm="layer", gated=False, activation="gelu_tanh", qkv_bias=True,
    o_bias=True, mlp_bias=True, tied=True,
  )  # fmt: skip
  base = model.Model(spec, models.init(spec, jax.random.key(0)))
  io.save(base, tmp_path / "base")
  stored = io.Checkpoint(tmp_path / "base").tensors
  (name,) = (n for n in stored if n.endswith("mlp.c_fc.weight"))
  kernel = np.asarray(stored[name])
  assert kernel.shape == (8, 16)  # in, out, where other families have out, in
  args = [f"--model={tmp_path / 'base'}", f"--calibration={text}", "--length=16"]
  assert apply(*args, f"--out={tmp_path / 'out'}", f"--transform={GPTQ}") == 0
  made = io.load(tmp_path / "out").leaf("layers/0/mlp/up/kernel")
  assert made.scales.shape == (1, 16)
  np.testing.assert_allclose(made.scales[0], np.abs(kernel).max(axis=0) / 7.5, rtol=1e-6)
  assert isinstance(
    io.load(tmp_path / "out").leaf("layers/0/attn/q/kernel"), leaves.QuantizedTensor
  )


def test_image_classifiers_are_pruned_and_merged_but_not_calibrated_by_text(tmp_path, text, fails):
  spec = models.VisionSpec("mlp", image_size=2, num_classes=3, d_model=4, num_layers=2)
  for seed, name in enumerate(("base", "other")):
    io.save(model.Model(spec, models.init(spec, jax.random.key(seed))), tmp_path / name)
  where = [f"--model={tmp_path / 'base'}", f"--out={tmp_path / 'out'}"]
  other = str(tmp_path / "other")
  go = [f"--transform=merge.wise_ft(models=[{other!r}]) + compress.prune.magnitude(sparsity=0.75)"]
  assert main.run(["apply", *where, *go]) == 0
  merged = io.load(tmp_path / "out")
  assert merged.spec == spec
  assert (np.asarray(merged.leaf("layers/1/dense/kernel")) == 0).sum() == 12
  wanda = ["--transform=compress.prune.wanda()", f"--calibration={text}", "--overwrite"]
  assert "is text, and" in fails("apply", *where, *wanda)


@pytest.mark.parametrize("calibrated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_budget_is_met_on_disk_and_replays(directories, tmp_path, text, fails, calibrated):
  out, base = tmp_path / "out", io.Checkpoint(directories / "base")
  args = [f"--model={directories / 'base'}", f"--out={out}"]
  if calibrated:
    args += [f"--calibration={text}", "--samples=4", "--length=16", "--batch=2"]
  said = fails("apply", *args, "--budget=1KB")
  least = int(re.search(r"the smallest possible is ([\d,]+),", said)[1].replace(",", ""))
  assert "a budget of 1,000 bytes cannot be met" in said
  for limit in (least, least + 500):
    assert apply(*args, f"--budget={limit}", "--overwrite") == 0
    assert limit - 300 < size.on_disk(out, pattern="*.safetensors") <= limit
  m = io.load(out)
  method = "gptq" if calibrated else "rtn"
  assert re.match(
    rf"by_path\(\[\('layers.*', compress.quantize.{method}\(", m.lineage[0].expression
  )
  given = collect.Materials(digests={"base": base.digest()})
  if not calibrated:
    again = replay.replay(m.lineage, io.load(directories / "base"), [given], parse=registry.parse)
    assert replay.differing(m, again) == []


def test_a_budget_that_makes_no_sense_is_told(directories, tmp_path, fails):
  args = ["apply", f"--model={directories / 'base'}", f"--out={tmp_path / 'out'}", "--budget=1GB"]
  said = fails(*args, "--transform=compress.prune.magnitude()")
  assert "chooses `bits` and `group_size` of one quantizer; compress.prune.magnitude() is" in said
  assert "one quantizer" in fails(*args, f"--transform={RTN}", f"--transform={RTN}")
  assert "--dry_run" in fails(*args, "--dry_run")
  assert "is not a size" in fails(*args[:-1], "--budget=much")
