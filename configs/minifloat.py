# SPDX-License-Identifier: Apache-2.0
"""Minifloats or integers, for weights and activations of 3 to 8 bits, on a small language model?

A byte-level decoder with biases learns the standard library's code and prose. Its kernels are
rounded to nearest in every format of every width, one scale an output; their inputs likewise, one
scale a tensor from calibration. All pairs are judged on held-out text, against an estimate of what
a multiply-accumulate costs on an FPGA. Some pairs are repeated after equalization, SmoothQuant,
GPTQ and bias correction. What was found: `docs/results/minifloat.md`.

Expected (Aggarwal et al., 2023, arXiv 2311.12359): minifloats lose less than integers of the same
few bits; at equal hardware cost integers often remain on the Pareto front.

Cost: four to six minutes of one CPU core. Command:
python -P -m treesurgeon.experiments.minifloat_study --config=configs/minifloat.py --workdir=DIR

Variants: `configs/minifloat.py:smoke` at toy size.
"""

import ml_collections

Q = "compress.quantize."


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, or "smoke" for toy size.

  Returns:
    "seed", the network and its training, "widths" of weights and activations, formats left "alone"
    by pairs, widths "chosen" for a format a kernel, "recipes" (name, what comes before the weights,
    what rounds them, whether biases are corrected) and the "points" at which they run: widths and
    formats of weights and activations.

  Raises:
    ValueError: for another variant.
  """
  if arg not in (None, "smoke"):
    raise ValueError(f"configs/minifloat.py has no variant {arg!r}; valid: smoke")
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.spec = {
    "d_model": 16 if smoke else 64, "num_layers": 2 if smoke else 3, "num_heads": 4,
    "d_ff": 32 if smoke else 192, "qkv_bias": True, "o_bias": True, "mlp_bias": True,
  }  # fmt: skip
  config.length, config.batch = (16, 4) if smoke else (64, 32)
  config.steps, config.rate = 4 if smoke else 600, 3e-3
  config.calibration, config.test = (8, 8) if smoke else (128, 64)
  config.alone = ("e1", "e6", "e7")  # left out of pairs: e1 is integers without the lowest code
  config.widths = (3, 4) if smoke else (3, 4, 5, 6, 7, 8)
  config.chosen = (3,) if smoke else (3, 4, 5)
  rtn, gptq = f"{Q}rtn({{form}})", f"{Q}gptq({{form}}, act_order=False)"
  config.recipes = (
    ("RTN", "", rtn, False),
    ("RTN, ranges searched", "", f"{Q}rtn({{form}}, mse=True)", False),
    ("bias correction", "", rtn, True),
    ("equalization", f"{Q}equalize()", rtn, False),
    ("SmoothQuant", f"{Q}smoothquant()", rtn, False),
    ("GPTQ", "", gptq, False),
    ("GPTQ, bias correction", "", gptq, True),
    ("SmoothQuant, GPTQ, bias correction", f"{Q}smoothquant()", gptq, True),
  )
  pairs = (
    (4, "int", 4, "int"), (4, "e2m1", 4, "e2m1"), (3, "int", 8, "int"), (3, "e2m0", 8, "int"),
  )  # fmt: skip
  config.points = pairs[:1] if smoke else pairs
  return config
