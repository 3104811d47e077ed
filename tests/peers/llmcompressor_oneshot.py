# SPDX-License-Identifier: Apache-2.0
"""Run llm-compressor as its users do, for `experiments/bench_compress.py`.

In its own environment (`make test-peers` makes it):

  python tests/peers/llmcompressor_oneshot.py gptq4 MODEL TOKENS.npy OUT
  python tests/peers/llmcompressor_oneshot.py dense MODEL OUT

The first is a whole command: it loads the model, calibrates on the rows of tokens, compresses and
saves. The second writes what a compressed directory stands for as a plain float32 checkpoint, so
that one evaluator serves all. Two things are in the way: without an accelerator AWQ fails in
`IntermediatesCache` (it pins memory), and `oneshot` wants a tokenizer for data that are tokens.
"""

import json
import pathlib
import shutil
import sys

BATCH = 8  # faster than its default of 1 on these sizes


def recipe(what):
  """Make the modifiers of a case."""
  from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
  from llmcompressor.modifiers.gptq import GPTQModifier
  from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
  from llmcompressor.modifiers.quantization import QuantizationModifier

  def scheme(bits, **more):
    args = QuantizationArgs(
      num_bits=bits, type="int", symmetric=True, strategy="group", group_size=128, **more
    )
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}

  if what.startswith("gptq"):
    order = {"actorder": None} if what.endswith("inturn") else {}
    return [GPTQModifier(config_groups=scheme(int(what[4])), ignore=["lm_head"], **order)]
  if what == "awq":
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(), QuantizationModifier(config_groups=scheme(4), ignore=["lm_head"])]
  if what == "sparsegpt":
    return [SparseGPTModifier(sparsity=0.5, targets=["Linear"], ignore=["lm_head"])]
  if what == "smoothquant":
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    w8a8 = QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=["lm_head"])
    return [SmoothQuantModifier(), w8a8]
  if what == "rtn":
    return [QuantizationModifier(config_groups=scheme(4), ignore=["lm_head"])]
  raise ValueError(what)


def compress(what, model, tokens, out):
  """Load, compress, save."""
  import numpy as np
  import torch
  from datasets import Dataset
  from llmcompressor import oneshot
  from llmcompressor.pipelines.cache import IntermediatesCache
  from tokenizers import Tokenizer, models
  from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, default_data_collator

  if hasattr(IntermediatesCache, "pin_memory"):
    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
  rows = np.load(tokens)
  network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
  none = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")), pad_token="x"
  )
  data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows)})
  oneshot(
    model=network, tokenizer=none, dataset=data, recipe=recipe(what), batch_size=BATCH,
    num_calibration_samples=len(rows), max_seq_length=rows.shape[1],
    shuffle_calibration_samples=False, data_collator=default_data_collator,
  )  # fmt: skip
  network.save_pretrained(out, save_compressed=True)


def dense(model, out):
  """Write a compressed directory as plain float32 tensors, and an unsparsified config."""
  import torch
  from transformers import AutoModelForCausalLM, CompressedTensorsConfig

  config = json.loads((pathlib.Path(model) / "config.json").read_text())
  more = {}
  if config.pop("quantization_config", None) is not None:
    more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
  network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **more)
  from safetensors.torch import save_file

  folder = pathlib.Path(out)
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  # What a kernel was made from is still there beside it.
  rest = ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
  state = {
    k: v.float().contiguous() for k, v in network.state_dict().items() if not k.endswith(rest)
  }
  save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
  dense(*sys.argv[2:]) if sys.argv[1] == "dense" else compress(*sys.argv[1:])
