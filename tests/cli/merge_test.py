# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import yaml

from treesurgeon import io, registry
from treesurgeon.cli import main
from treesurgeon.io import raw, safetensors, writer
from treesurgeon.run import drivers, replay


@pytest.fixture
def write(directories, tmp_path):
  """Writes a configuration whose models are directories' names; returns its path."""

  def located(value):
    if isinstance(value, dict):
      return {
        k: str(directories / v) if k in ("model", "base_model") and (directories / v).is_dir()
        else located(v) for k, v in value.items()
      }  # fmt: skip
    return [located(v) for v in value] if isinstance(value, list) else value

  def go(*documents):
    path = tmp_path / "m.yml"
    path.write_text(yaml.safe_dump_all([located(d) for d in documents]))
    return path

  return go


def entry(model, **parameters):
  return {"model": model, "parameters": parameters}


def source(model, first, last):
  return {"model": model, "layer_range": [first, last]}


TASKS = {
  "merge_method": "task_arithmetic", "base_model": "base",
  "models": [entry("a", weight=0.5), entry("b", weight=[0.25, 1.0])],
}  # fmt: skip
PLAIN = {"merge_method": "linear", "models": [entry("a", weight=1), entry("b", weight=1)]}


def merged(path, out, *flags):
  assert main.run(["merge", str(path), f"--out={out}", *flags]) == 0
  return raw.Directory(out)


def same(a, b):
  return sorted(a.addresses()) == sorted(b.addresses()) and replay.differing(a, b) == []


def test_a_merge_is_recorded_and_done_again(directories, write, tmp_path, capsys):
  path = write(TASKS | {"dtype": "bfloat16", "out_dtype": "float32"})
  out = merged(path, tmp_path / "out")
  assert "gradients run over the layers" in capsys.readouterr().err
  assert io.load(tmp_path / "out").spec == io.load(directories / "base").spec
  (record,) = out.lineage
  assert record.driver == "stream" and record.recipe["dtype"] == "bfloat16"
  assert record.inputs == {
    role: io.Checkpoint(directories / name).digest()
    for role, name in (("base", "base"), ("donor 0", "a"), ("donor 1", "b"))
  }
  assert yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text()) == (
    yaml.safe_load(path.read_text())
  )
  card = (tmp_path / "out" / "README.md").read_text()
  assert "1. this configuration" in card and "merge_method: task_arithmetic" in card
  again = replay.remerge(record, tmp_path / "again", lookup=registry.load)
  assert same(out, raw.Directory(again))
  with pytest.raises(ValueError, match="worked on tensors by their names; use remerge"):
    replay.replay([record], io.load(directories / "base"), parse=registry.parse)


def test_a_record_of_other_inputs_is_not_done_again(write, tmp_path):
  (record,) = merged(write(PLAIN), tmp_path / "out").lineage
  record.inputs["donor 0"] = "0"
  with pytest.raises(ValueError, match="another donor 0 than before: sha256 .*, not 0"):
    replay.remerge(record, tmp_path / "again", lookup=registry.load)
  assert not (tmp_path / "again").exists()
  record.recipe.pop("mergekit")
  with pytest.raises(ValueError, match="not made by a mergekit configuration"):
    replay.remerge(record, tmp_path / "again", lookup=registry.load)


def test_layers_come_from_where_slices_say(directories, write, tmp_path):
  slices = [{"sources": [source("a", 0, 2)]}, {"sources": [source("b", 1, 2)]}]
  out = merged(write({"merge_method": "passthrough", "slices": slices}), tmp_path / "out")
  a, b = (raw.Directory(directories / n) for n in "ab")
  rest = "mlp.up_proj.weight"
  for layer, (model, of) in enumerate(((a, 0), (a, 1), (b, 1))):
    want = model.leaf(f"model.layers.{of}.{rest}")
    np.testing.assert_array_equal(out.leaf(f"model.layers.{layer}.{rest}"), want)
  np.testing.assert_array_equal(out.leaf("model.norm.weight"), b.leaf("model.norm.weight"))
  embedding = "model.embed_tokens.weight"
  np.testing.assert_array_equal(out.leaf(embedding), a.leaf(embedding))
  assert out.config["num_hidden_layers"] == 3 == io.load(tmp_path / "out").spec.num_layers


def test_merges_of_merges(write, tmp_path):
  half = PLAIN | {"name": "half"}
  final = {"merge_method": "ties", "base_model": "base", "models": [entry("half", weight=1.0)]}
  out = merged(write(final, half), tmp_path / "out")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["m.yml", "out"]
  (record,) = out.lineage
  assert [d.get("name") for d in record.recipe["mergekit"]] == ["half", None]
  again = replay.remerge(record, tmp_path / "again", lookup=registry.load)
  assert same(out, raw.Directory(again))


def test_a_method_of_ours_and_one_on_the_whole_model(write, tmp_path):
  ours = {**TASKS, "merge_method": "tsv_merge", "models": [entry("a"), entry("b")]}
  assert "tsv_merge" in merged(write(ours), tmp_path / "ours").lineage[0].expression
  ties = {**TASKS, "merge_method": "ties", "parameters": {"density": 0.3}}
  by_tensor = merged(write(ties), tmp_path / "tensor")
  by_model = merged(write(ties), tmp_path / "model", "--compat=paper")
  assert by_model.lineage[0].driver == "run" and not same(by_tensor, by_model)
  again = replay.remerge(by_model.lineage[0], tmp_path / "again", lookup=registry.load)
  assert same(by_model, raw.Directory(again))


def test_integers_are_kept_where_they_agree(directories, write, tmp_path, fails):
  def with_ids(name, ids):
    model = raw.Directory(directories / "a")
    with raw.Sink(tmp_path / name, model.config) as sink:
      for tensor in model.addresses():
        sink.write(tensor, model.leaf(tensor))
      sink.write("position_ids", np.array(ids))
      sink.close()
    return str(tmp_path / name)

  x, y, z = with_ids("x", [0, 1]), with_ids("y", [0, 1]), with_ids("z", [1, 0])
  both = PLAIN | {"models": [entry(x, weight=1), entry(y, weight=1)]}
  assert merged(write(both), tmp_path / "out").leaf("position_ids").tolist() == [0, 1]
  both["models"][1] = entry(z, weight=1)
  said = fails("merge", write(both), f"--out={tmp_path / 'no'}")
  assert "position_ids: its values are no floating-point numbers" in said


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"merge_method": "linera"}, "merge_method='linera' is not known; did you mean linear"),
    ({"merge_method": "ties"}, "merge_method 'ties' needs a base_model"),
    ({"merge_method": "slerp"}, "merge_method 'slerp' needs a base_model"),
    (
      {"merge_method": "slerp", "base_model": "base", "parameters": {"t": 0.5}},
      "merge_method 'slerp' takes 2 models, not 3",
    ),
    ({"merge_method": "nearswap", "base_model": "a"}, "lacks the parameter 't'"),
    ({"merge_method": "passthrough"}, "merge_method 'passthrough' takes 1 models, not 2"),
    ({"models": [entry("a"), entry("b", weight=1)]}, "models ("),
    ({"models": [entry("a", wait=1)]}, "linear has no parameter 'wait'; did you mean 'weight'?"),
    ({"models": [entry("a", weight="x")]}, "weight: 'x' is not a number"),
    ({"models": [entry("a", weight=True)]}, "weight: True is not a number"),
    ({"models": [entry("a", weight=1), entry("b", weight=-1)]}, "weights 1.0, -1.0 sum to zero"),
    ({"models": [entry("a", weight=1), entry("a", weight=1)]}, "a is listed twice"),
    ({"base_model": "base"}, "base) lacks the parameter 'weight'"),
    ({"parameters": {"normalize": "often"}}, "normalize: 'often' must be true or false"),
    ({"models": [entry("org/model", weight=1)]}, "org/model is no directory, and no snapshot"),
    ({"models": [entry("a+b", weight=1)]}, "a is no directory"),
    (
      {"models": None, "slices": [{"sources": [source("a", 0, 3)]}]},
      "layer_range [0, 3] of",
    ),
  ],
)
def test_mistakes_are_one_line_and_nothing_is_written(changes, message, write, tmp_path, fails):
  config = {k: v for k, v in {**PLAIN, **changes}.items() if v is not None}
  if "slices" in config:
    config["slices"][0]["parameters"] = {"weight": 1}
  assert message in fails("merge", write(config), f"--out={tmp_path / 'out'}")
  assert [p.name for p in tmp_path.iterdir()] == ["m.yml"]


def test_the_base_must_be_in_every_slice(write, tmp_path, fails):
  slices = [{"sources": [source("a", 0, 1), source("b", 0, 1)]}]
  config = {"merge_method": "slerp", "base_model": "base", "slices": slices}
  said = fails("merge", write(config), f"--out={tmp_path / 'out'}")
  assert re.search(r"slices\[0\]: the base_model .*base must be among the sources", said)


def changed(directories, tmp_path, change):
  """Writes model b with its tensors changed."""
  b = raw.Directory(directories / "b")
  with raw.Sink(tmp_path / "odd", b.config) as sink:
    for name, tensor in change({n: b.leaf(n) for n in b.addresses()}).items():
      sink.write(name, tensor)
    sink.close()
  return {**PLAIN, "models": [entry("a", weight=1), entry(str(tmp_path / "odd"), weight=1)]}


EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda t: t | {EMBEDDING: t[EMBEDDING][:250]},
      r"embed_tokens.weight: .*odd has shape \(250, 8\), .*a has \(257, 8\); different "
      r"vocabularies: give them one with tokenizer: \{source: union\}",
    ),
    (
      lambda t: t | {UP: t[UP][:, :4]},
      r"layers.1.mlp.up_proj.weight: .*odd has shape \(16, 4\), .*a has \(16, 8\)",
    ),
    (
      lambda t: {n: x for n, x in t.items() if n != UP},
      r"layers.1.mlp.up_proj.weight: .*a has it, .*odd lacks it \(nearest there: model",
    ),
    (
      lambda t: {n: x for n, x in t.items() if ".layers.1." not in n},
      r"differ in their number of layers: .*a has 2, .*odd has 1; 'slices' with 'layer_range'",
    ),
    (
      lambda t: t | {UP: np.full_like(t[UP], np.nan)},
      r"odd/model.safetensors: tensor '.*up_proj.weight' holds 128 NaN",
    ),
  ],
)
def test_models_that_do_not_fit(change, message, directories, write, tmp_path, fails):
  config = changed(directories, tmp_path, change)
  assert re.search(message, fails("merge", write(config), f"--out={tmp_path / 'out'}"))
  assert not (tmp_path / "out").exists()


def test_a_buffer_that_only_some_models_hold_is_left_out(directories, write, tmp_path, capsys):
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  config = changed(directories, tmp_path, lambda t: t | {name: np.ones(2, np.float32)})
  out = merged(write(config), tmp_path / "out")
  assert name not in out.addresses()
  assert "inv_freq tensors are left out" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from treesurgeon.cli import main
from treesurgeon.io import writer
finish = writer.Writer._finish
def then_die(self):
  finish(self)
  if len(self._shards) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
writer.Writer._finish = then_die
main.run(sys.argv[1:])
"""


def test_a_killed_merge_goes_on_with_the_same_bytes(write, tmp_path, monkeypatch):
  path = write(TASKS)
  flags = ("--max_shard_bytes=4000",)
  whole = tmp_path / "whole"
  merged(path, whole, *flags)
  out = tmp_path / "out"
  argv = [sys.executable, "-P", "-c", KILLED, "merge", str(path), f"--out={out}", *flags]
  died = subprocess.run(argv, env=os.environ, capture_output=True, check=False)
  assert died.returncode == -signal.SIGKILL, died.stderr
  assert not out.exists()
  computed = []
  write_leaf = raw.Sink.write
  monkeypatch.setattr(
    raw.Sink, "write", lambda self, name, x: (computed.append(name), write_leaf(self, name, x))
  )
  merged(path, out, *flags)
  files = sorted(p.name for p in whole.glob("*.safetensors"))
  assert len(files) > 3
  assert files == sorted(p.name for p in out.glob("*.safetensors"))
  for name in files:
    assert (whole / name).read_bytes() == (out / name).read_bytes()
  done = [n for f in files[:2] for n in safetensors.open_file(whole / f)]
  assert done and not set(done) & set(computed)
  assert same(raw.Directory(whole), raw.Directory(out))


def test_a_full_disk_keeps_what_is_finished(write, tmp_path, monkeypatch, fails):
  path, out = write(TASKS), tmp_path / "out"
  real, left = os.write, [20000]

  def limited(fd, data):
    if len(data) > 64:
      left[0] -= len(data)
      if left[0] < 0:
        raise OSError(28, "No space left on device")
    return real(fd, data)

  flat = write({**TASKS, "models": [entry("a", weight=0.5)]})
  monkeypatch.setattr(os, "write", limited)
  said = fails("merge", flat, f"--out={out}", "--max_shard_bytes=4000")
  assert "disk full" in said and "kept for a rerun" in said
  monkeypatch.setattr(os, "write", real)
  partial = tmp_path / ".out.partial"
  assert json.loads((partial / "journal.json").read_text())["shards"]
  whole = merged(flat, tmp_path / "whole", "--max_shard_bytes=4000")
  assert same(merged(flat, out, "--max_shard_bytes=4000"), whole)
  assert not partial.exists() and path.is_file()


def test_the_command_says_what_it_needs(write, tmp_path, fails):
  path = write(PLAIN)
  merged(path, tmp_path / "out")
  assert "exists" in fails("merge", path, f"--out={tmp_path / 'out'}")
  assert "merge takes one mergekit configuration file" in fails("merge", "--out=x")
  assert "--out is required" in fails("merge", path)
  assert "is not a file" in fails("merge", tmp_path / "no.yml", f"--out={tmp_path / 'x'}")
  assert "compat" in fails("merge", path, "--out=x", "--compat=fusionbench")


def test_a_merge_streams_whatever_can_be(write, tmp_path, monkeypatch):
  monkeypatch.setattr(drivers, "run", None)
  assert merged(write(PLAIN), tmp_path / "out").lineage[0].driver == "stream"


def with_words(directories, tmp_path, name, words):
  """Writes model a or b with a vocabulary of its own."""
  model = raw.Directory(directories / name)
  with raw.Sink(tmp_path / f"{name}-words", {**model.config, "vocab_size": len(words)}) as sink:
    for tensor in model.addresses():
      array = model.leaf(tensor)
      sink.write(tensor, array[: len(words)] if len(array) == 257 else array)
    sink.close()
  inner = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "x")
  )
  inner.save(str(tmp_path / f"{name}-words" / "tokenizer.json"))
  return str(tmp_path / f"{name}-words")


def test_vocabularies_are_joined(directories, write, tmp_path, fails):
  a = with_words(directories, tmp_path, "a", ("x", "y", "only a"))
  b = with_words(directories, tmp_path, "b", ("y", "x", "only b", "too"))
  config = {**PLAIN, "models": [entry(a, weight=1), entry(b, weight=3)]}
  said = fails("merge", write(config), f"--out={tmp_path / 'no'}")
  assert "give them one with tokenizer: {source: union}" in said
  config["tokenizer"] = {"source": "union"}
  out = merged(write(config | {"chat_template": "chatml"}), tmp_path / "out")
  vocabulary = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
  assert set(vocabulary) == {"x", "y", "only a", "only b", "too"}
  rows, old_a, old_b = (m.leaf(EMBEDDING) for m in (out, raw.Directory(a), raw.Directory(b)))
  assert out.config["vocab_size"] == len(rows) == 5
  np.testing.assert_allclose(rows[vocabulary["x"]], 0.25 * old_a[0] + 0.75 * old_b[1], atol=1e-6)
  np.testing.assert_allclose(rows[vocabulary["only a"]], old_a[2], atol=1e-6)
  np.testing.assert_allclose(rows[vocabulary["too"]], old_b[3], atol=1e-6)
  assert "im_start" in (tmp_path / "out" / "chat_template.jinja").read_text()
  config["tokenizer"] = {"sauce": "union"}
  said = fails("merge", write(config), f"--out={tmp_path / 'no'}")
  assert "tokenizer: unknown key 'sauce'; did you mean 'source'?" in said


def test_a_template_alone_is_put_in(directories, write, tmp_path, fails):
  a = with_words(directories, tmp_path, "a", ("x", "y"))
  config = {"merge_method": "passthrough", "models": [entry(a)], "chat_template": "chatml"}
  merged(write(config), tmp_path / "out")
  assert "im_start" in (tmp_path / "out" / "chat_template.jinja").read_text()
  assert (tmp_path / "out" / "tokenizer.json").is_file()
  said = fails("merge", write(config | {"chat_template": "chatmi"}), f"--out={tmp_path / 'no'}")
  assert "chat_template='chatmi'" in said and "did you mean 'chatml'?" in said


def test_an_adapter_is_folded_into_its_base(directories, write, tmp_path, fails):
  rng = np.random.default_rng(0)
  low, high = rng.normal(size=(2, 8)), rng.normal(size=(16, 2))
  module = UP.removesuffix(".weight")
  adapter = tmp_path / "adapter"
  with writer.Writer(adapter) as out:
    for part, factor in (("A", low), ("B", high)):
      out.write(f"base_model.model.{module}.lora_{part}.weight", factor.astype(np.float32))
  (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
  settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
  (adapter / "adapter_config.json").write_text(json.dumps(settings))
  config = {
    "merge_method": "task_arithmetic", "base_model": "base",
    "models": [entry(f"{directories / 'base'}+{adapter}", weight=0.5)],
  }  # fmt: skip
  out = merged(write(config), tmp_path / "out")
  base = raw.Directory(directories / "base")
  np.testing.assert_allclose(out.leaf(UP), base.leaf(UP) + 0.5 * 2 * high @ low, atol=1e-5)
  np.testing.assert_array_equal(out.leaf(EMBEDDING), base.leaf(EMBEDDING))
  assert len(out.lineage[0].inputs["donor 0"]) == 64
  config["models"] = [entry(f"{directories / 'base'}+{tmp_path / 'none'}", weight=1)]
  assert "none is no directory" in fails("merge", write(config), f"--out={tmp_path / 'no'}")
