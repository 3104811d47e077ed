# SPDX-License-Identifier: Apache-2.0
"""Which quantization in one shot hurts least, on a small language model of code and prose?

A byte-level decoder learns the standard library's code and prose; its kernels are quantized to 4, 3
and 2 bits by each method, from the same calibration text; GWQ sees a batch of it. Where a method
keeps weights or widens groups, chance chooses as many, three times. Claims are numbers that are
negative where a claim holds; one is counted as reproduced if it holds for every seed. Verdicts are
in the registry's rows of `compress.quantize`.

Cost: three minutes a seed on one CPU core, and four to compile. Command:
python -P -m treesurgeon.experiments.quantize_directions --config=configs/quantize.py --workdir=DIR

Variants: `configs/quantize.py:smoke` runs every arm at toy size, where no claim need hold.
"""

import ml_collections

Q = "compress.quantize."
THREE, TWO = ("3 bits",), ("2 bits",)
WAYS = ("cmpq", "pmpq", "tdmpq")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, or "smoke" for toy size.

  Returns:
    "seeds", the network and its training, "arms" (name, expression whose {bits} is replaced, and
    cuts), "controls" likewise and how many "draws" of each, and "claims": name, what is lower, what
    is higher, of which quantity, at which cuts.

  Raises:
    ValueError: for another variant.
  """
  if arg not in (None, "smoke"):
    raise ValueError(f"configs/quantize.py has no variant {arg!r}; valid: smoke")
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.seeds = (0,) if smoke else (0, 1, 2)
  config.spec = {"d_model": 16 if smoke else 64, "num_layers": 2 if smoke else 4, "num_heads": 4,
                 "d_ff": 32 if smoke else 192}  # fmt: skip
  config.length, config.batch = (16, 4) if smoke else (64, 32)
  config.steps, config.rate = 4 if smoke else 600, 3e-3
  config.calibration, config.test = (8, 8) if smoke else (256, 256)
  config.draws = 1 if smoke else 3
  low = THREE if smoke else THREE + TWO
  every = low if smoke else ("4 bits", *low)
  form, asym = "bits={bits}, group_size=32", "symmetric=False"
  fine = "group_size=16, wide=0.25"
  config.arms = (
    ("rtn", f"{Q}rtn({form})", every),
    ("rtn, asymmetric", f"{Q}rtn({form}, {asym})", every),
    ("rtn, by column", f"{Q}rtn(bits={{bits}}, group_size=-1)", THREE),
    ("rtn, nf", f"{Q}rtn({form}, format='nf', scale_dtype='int8')", THREE),
    ("gptq, asymmetric", f"{Q}gptq({form}, {asym}, act_order=False)", THREE + TWO),
    ("gptq, asymmetric, 16",
     f"{Q}gptq(bits={{bits}}, group_size=16, {asym}, act_order=False)", THREE),
    ("hqq", f"{Q}hqq({form})", every),
    ("awq", f"{Q}awq({form})", low),
    ("spqr", f"{Q}spqr(bits={{bits}})", THREE),
    ("gwq", f"{Q}gwq({form})", low),
    ("adadim", f"{Q}adadim({form})", low),
    ("decoupleq", f"{Q}decoupleq({form})", TWO),
    ("finequant", f"{Q}finequant(bits={{bits}}, smallest=16)", THREE),
    ("aligned", f"{Q}aligned({fine})", TWO),
    ("aligned, none wide", f"{Q}aligned(group_size=16, wide=0.0)", TWO),
    ("lq_lora", f"compress.low_rank.lq_lora({form}, rank=4)", THREE),
    ("lq_lora, fisher", f"compress.low_rank.lq_lora({form}, rank=4, fisher=True)", THREE),
    *((w, f"{Q}cptquant(sensitivity={w!r}, average={{bits}}, choices=(2, 3, 4, 6, 8), "
       "group_size=32)", THREE) for w in WAYS),
  )  # fmt: skip
  config.controls = (
    ("gwq, random", f"{Q}gwq({form})", low),
    ("aligned, random", f"{Q}aligned({fine})", TWO),
  )
  config.claims = _claims(every, low)
  return config


def _claims(
  every: tuple[str, ...], low: tuple[str, ...]
) -> tuple[tuple[str, str, str, str, tuple[str, ...]], ...]:
  plain = "rtn, asymmetric"
  claims = (
    ("gptq: better than rtn", "gptq, asymmetric", plain, low),
    ("hqq: better than rtn", "hqq", plain, every),
    ("awq: better than rtn", "awq", plain, low),
    ("adadim: better than rtn", "adadim", plain, low),
    ("gwq: better than rtn", "gwq", plain, low),
    ("gwq: better than random weights kept", "gwq", "gwq, random", low),
    ("decoupleq: better than gptq", "decoupleq", "gptq, asymmetric", TWO),
    ("finequant: better than one scale a column", "finequant", "rtn, by column", THREE),
    ("aligned: the widest better than random groups", "aligned", "aligned, random", TWO),
    ("aligned: wide groups help", "aligned", "aligned, none wide", TWO),
    ("lq_lora: better than rtn", "lq_lora", "rtn, nf", THREE),
    ("lq_lora: Fisher information helps", "lq_lora, fisher", "lq_lora", THREE),
    ("spqr: better than gptq", "spqr", "gptq, asymmetric, 16", THREE),
    *((f"cptquant, {w}: better than one width", w, "rtn", THREE) for w in WAYS),
  )
  bits = ("spqr: fewer bits than gptq", "spqr", "gptq, asymmetric, 16", "bits", THREE)
  return (*((text, less, more, "loss", cuts) for text, less, more, cuts in claims), bits)
