# SPDX-License-Identifier: Apache-2.0
"""Run GPTQModel as its users do, for `quantized_test.py` and `experiments/bench_compress.py`.

  python tests/peers/gptqmodel_oneshot.py gptq4 MODEL TOKENS.npy OUT [GROUP]

One whole command: it loads the model, calibrates on the rows of tokens, quantizes and saves. The
case is "gptq", the bits, and "order" for activation order, "inturn" for none. On two cores its pool
of threads is one short of what its loader asks for, which is told to it; it asks for a tokenizer
beside the model, and leaves logs where it runs.
"""

import os
import pathlib
import shutil
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
BATCH = 8


def compress(what, model, tokens, out, group="128"):
  """Load, quantize, save."""
  import numpy as np
  from gptqmodel import GPTQModel, QuantizeConfig
  from tokenizers import Tokenizer, models
  from transformers import PreTrainedTokenizerFast

  out = pathlib.Path(out).resolve()
  folder, rows = out.with_suffix(".input"), np.load(tokens).tolist()
  shutil.copytree(model, folder, dirs_exist_ok=True)
  os.chdir(folder)
  PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")),
    pad_token="x", eos_token="x",
  ).save_pretrained(folder)  # fmt: skip
  order = what.endswith(("order", "inturn"))
  more = {"desc_act": what.endswith("order"), "act_group_aware": False} if order else {}
  config = QuantizeConfig(bits=int(what[4]), group_size=int(group), device="cpu", **more)
  network = GPTQModel.load(str(folder), config)
  rows = [{"input_ids": r, "attention_mask": [1] * len(r)} for r in rows]
  network.quantize(rows, batch_size=BATCH)
  network.save(str(out))
  os.chdir(out)
  shutil.rmtree(folder)


if __name__ == "__main__":
  compress(*sys.argv[1:])
