# SPDX-License-Identifier: Apache-2.0
"""Every configuration of the guide for mergekit's users runs, on tiny models under its names."""

import hashlib
import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
import tokenizers
import yaml

from treesurgeon import io, models
from treesurgeon.cli import main
from treesurgeon.core import model
from treesurgeon.io import raw, with_lora, writer

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "mergekit.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
WORDS = "<s> </s> def f ( x ) : import please explain".split()
NAMES = ("base-7b", "base-7b-instruct", "base-7b-code", "base-7b-chat")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Writes a base of 32 layers, three fine-tunes, one with more tokens, and two adapters."""
  root = tmp_path_factory.mktemp("guide")
  rng = np.random.default_rng(0)
  spec = models.Spec(
    family="llama", vocab_size=len(WORDS), d_model=4, num_layers=32, num_heads=1, d_ff=4,
    max_positions=32,
  )  # fmt: skip
  io.save(model.Model(spec, models.init(spec, jax.random.key(0))), root / "models" / NAMES[0])
  base = raw.Directory(root / "models" / NAMES[0])
  for name in NAMES:
    words = [*WORDS, "<|im_end|>", "<|im_start|>"] if "chat" in name else WORDS
    folder = root / "models" / name
    if name != NAMES[0]:
      with raw.Sink(folder, base.config | {"vocab_size": len(words)}) as sink:
        for tensor in base.addresses():
          x = base.leaf(tensor)
          more = rng.normal(size=(len(words) - len(WORDS), 4)).astype(np.float32)
          x = np.concatenate([x, more]) if len(x) == len(WORDS) else x
          sink.write(tensor, x + 0.01 * rng.normal(size=x.shape).astype(np.float32))
        sink.close()
    inner = tokenizers.Tokenizer(
      tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "x")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(folder / "tokenizer.json"))
  for name in ("math", "code"):
    folder = root / "adapters" / name
    with writer.Writer(folder, single=with_lora.WEIGHTS) as out:
      for part, shape in (("A", (2, 4)), ("B", (4, 2))):
        tensor = f"base_model.model.model.layers.3.self_attn.q_proj.lora_{part}.weight"
        out.write(tensor, rng.normal(size=shape).astype(np.float32))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / with_lora.CONFIG).write_text(json.dumps(settings))
  return root


@pytest.fixture
def here(place, monkeypatch):
  """Works next to the models, which the page names by relative paths."""
  monkeypatch.chdir(place)
  return place


def ran(here, text):
  """Runs a configuration, once."""
  name = hashlib.sha256(text.encode()).hexdigest()[:8]
  if not (here / name).exists():
    (here / f"{name}.yml").write_text(text)
    command = "moe" if "experts" in yaml.safe_load(text) else "merge"
    assert main.run([command, f"{name}.yml", f"--out={name}"]) == 0
  return raw.Directory(here / name)


def written(name):
  return (DOCS / "mergekit" / f"{name}.yml").read_text()


@pytest.mark.parametrize("name", ["slerp", "dare_ties", "frankenmerge"])
def test_the_page_shows_the_files(name):
  assert written(name) in BLOCKS and f"mergekit/{name}.yml" in PAGE


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_every_configuration_runs(here, index):
  out = ran(here, BLOCKS[index])
  document = yaml.safe_load(BLOCKS[index])
  dtype = document.get("out_dtype", document.get("dtype", "float32"))
  assert {out.struct(n).dtype.name for n in out.addresses()} == {dtype}


def test_slerp_is_what_the_page_says(here):
  out = ran(here, written("slerp"))
  a, b = (raw.Directory(f"models/base-7b-{n}") for n in ("instruct", "code"))
  for name, model_at in (("0.self_attn.q", a), ("31.self_attn.q", b), ("0.mlp.up", b)):
    name = f"model.layers.{name}_proj.weight"
    got, want = out.leaf(name).astype(float), model_at.leaf(name).astype(float)
    np.testing.assert_allclose(got, want, rtol=0.01)


def test_the_frankenmerge_is_what_the_page_says(here):
  out = ran(here, written("frankenmerge"))
  assert out.config["num_hidden_layers"] == 48
  for layer, zero in ((23, False), (24, True), (47, True)):
    for part in ("self_attn.o_proj", "mlp.down_proj"):
      assert (not out.leaf(f"model.layers.{layer}.{part}.weight").any()) == zero
  name = "model.layers.{}.mlp.up_proj.weight"
  got = out.leaf(name.format(24))
  want = raw.Directory("models/base-7b-code").leaf(name.format(8)).astype(got.dtype)
  np.testing.assert_array_equal(got, want)


def test_masks_do_not_depend_on_what_else_is_merged(here):
  whole = ran(here, written("dare_ties"))
  document = yaml.safe_load(written("dare_ties"))
  layers = {"layer_range": [0, 2]}
  document["slices"] = [{"sources": [m | layers for m in document.pop("models")]}]
  for source in document["slices"][0]["sources"]:
    source.setdefault("parameters", {})
  part = ran(here, yaml.safe_dump(document))
  assert len(part.addresses()) < len(whole.addresses())
  name = "model.embed_tokens.weight"
  np.testing.assert_array_equal(part.leaf(name), whole.leaf(name))


def test_traps_are_noted(here, capsys):
  (here / "noted.yml").write_text(written("slerp"))
  assert main.run(["merge", "noted.yml", "--out=noted"]) == 0
  assert "embeddings, final norm and head take the first value" in capsys.readouterr().err


def test_the_extraction_runs(here, capsys):
  (line,) = re.findall(r"^treesurgeon extract-lora .*$", PAGE, re.MULTILINE)
  assert main.run(shlex.split(line)[1:]) == 0, capsys.readouterr().err
  back = with_lora.WithLora(raw.Directory("models/base-7b"), "adapter")
  tuned = raw.Directory("models/base-7b-code")
  name = "model.layers.5.mlp.up_proj.weight"
  np.testing.assert_allclose(back.leaf(name), tuned.leaf(name), atol=1e-5)


def test_links_lead_somewhere():
  headings = {
    re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
    for h in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
  }
  for target in re.findall(r"\]\(([^)]+)\)", PAGE):
    if target.startswith("#"):
      assert target[1:] in headings, target
    else:
      assert (DOCS / target).exists(), target
