# SPDX-License-Identifier: Apache-2.0
"""Merges equal mergekit's on float32 checkpoints, from one and the same configuration.

mergekit breaks ties of magnitude at TIES' threshold in the order of its sort, so entries of exactly
the threshold magnitude are left out of the comparison.
"""

import pathlib

import numpy as np
import pytest
import torch
import transformers
import yaml
from mergekit import config as mk_config
from mergekit import merge as mk_merge
from mergekit import options as mk_options

from treesurgeon import io
from treesurgeon.core import model, paths
from treesurgeon.io import checkpoint
from treesurgeon.merge import mergekit
from treesurgeon.run import collect, drivers

NAMES = ("base", "math", "code", "chat")
LLAMA = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
  """Writes a base and three experts: the base with small changes of every weight."""
  root = tmp_path_factory.mktemp("models")
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)
  base = transformers.LlamaForCausalLM(config)
  state = {k: v + 0.1 * torch.randn_like(v) for k, v in base.state_dict().items()}
  for name in NAMES:
    change = 0.0 if name == "base" else 0.02
    base.load_state_dict({k: v + change * torch.randn_like(v) for k, v in state.items()})
    base.save_pretrained(root / name)
  return root


def each(**parameters):
  """Returns the entries of three experts, each parameter one number a model."""
  return [
    {"model": name, "parameters": {k: v[i] for k, v in parameters.items()}}
    for i, name in enumerate(NAMES[1:])
  ]


CASES = {
  "linear": {"merge_method": "linear", "models": each(weight=(1.0, 0.5, 2.0))},
  "linear raw": {
    "merge_method": "linear",
    "models": each(weight=(1.0, -0.5, 0.25)),
    "parameters": {"normalize": False},
  },
  "task arithmetic": {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": each(weight=(0.3, -0.2, 1.0)),
    "parameters": {"lambda": 0.7},
  },
  "task arithmetic normalized": {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": each(weight=(0.3, 0.2, 1.0)),
    "parameters": {"normalize": True},
  },
  "ties": {
    "merge_method": "ties",
    "base_model": "base",
    "models": each(weight=(1.0, 0.5, 2.0), density=(0.2, 0.2, 0.2)),
  },
  "ties mixed": {
    "merge_method": "ties",
    "base_model": "base",
    "models": each(weight=(1.0, -0.5, 2.0), density=(0.01, 0.5, 1.0)),
    "parameters": {"normalize": False, "lambda": 0.4},
  },
}


@pytest.mark.parametrize("name", CASES)
def test_equals_mergekit(name, directories, tmp_path):
  config = {**CASES[name], "dtype": "float32"}
  config["models"] = [{**m, "model": str(directories / m["model"])} for m in config["models"]]
  if "base_model" in config:
    config["base_model"] = str(directories / config["base_model"])
  written = tmp_path / "merge.yml"
  written.write_text(yaml.safe_dump(config))
  mk_merge.run_merge(
    mk_config.MergeConfiguration.model_validate(config),
    str(tmp_path / "theirs"),
    mk_options.MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True),
  )
  plan = mergekit.read(written)
  base = io.load(plan.base)
  ours = drivers.run(
    plan.transform, base, collect.Materials(open_model=lambda d: checkpoint.Checkpoint(d))
  )
  theirs = checkpoint.Checkpoint(tmp_path / "theirs")
  assert sorted(theirs.addresses()) == sorted(ours.addresses())
  worst = 0.0
  for address in ours.addresses():
    a, b = np.asarray(ours.leaf(address)), np.asarray(theirs.leaf(address))
    assert a.dtype == b.dtype == np.float32
    differ = np.abs(a - b)
    if config["merge_method"] == "ties":
      differ = np.where(at_threshold(address, base, config), 0, differ)
    worst = max(worst, float(differ.max()))
  assert worst <= 1e-6


def at_threshold(address: str, base: model.Model, config: dict) -> np.ndarray:
  """Marks entries whose change in some expert is exactly as large as the last one kept."""
  w = np.asarray(base.leaf(address))
  found = np.zeros(w.shape, bool)
  for item in config["models"]:
    density = item["parameters"]["density"]
    if density >= 1:
      continue
    size = np.abs(np.asarray(checkpoint.Checkpoint(pathlib.Path(item["model"])).leaf(address)) - w)
    k = max(1, int(density * size.size))
    last = np.sort(size.ravel())[-k]
    equal = size == last
    # A single entry of that size is no tie.
    found |= equal if equal.sum() > 1 else False
  return found


def test_the_exclusion_is_narrow(directories):
  base = io.load(directories / "base")
  config = CASES["ties"] | {
    "models": [{**m, "model": directories / m["model"]} for m in CASES["ties"]["models"]]
  }
  excluded = sum(int(at_threshold(a, base, config).sum()) for a in paths.addresses(base.params))
  assert excluded < 0.001 * base.size()
