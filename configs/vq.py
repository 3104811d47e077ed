# SPDX-License-Identifier: Apache-2.0
"""Two bits and less: what tables of vectors, stacks, signs and group sparsity do to a small model.

A byte-level decoder learns the standard library's code and prose in bfloat16; its kernels are
quantized by each method from the same calibration text, at about the same bits a weight where a
claim compares two. Claims are differences in held-out loss that are negative where a claim holds;
one is counted as reproduced if it holds for every seed. Verdicts are in the registry's rows.

Measured, nats a byte at bits a compressed weight, means of three seeds: bfloat16 1.821; GPTQ 1.847
at 2.25 and 1.848 at 3.0; VPTQ 1.868 at 2.1, with a residual table 1.827 at 3.1; AQLM 1.835 at 2.2;
VQ4DiT 1.855 at 2.1; PTQ1.61 1.914 at 2.2; GQSA 2.035, trained end to end 1.925, at 2.6; BitStack
from 1 to 6 blocks 2.14, 1.89, 1.85, 1.83, 1.83, 1.82. Tables and scales weigh more at this width
than in the papers, and tuning is shorter.

Cost: about three minutes a seed on two CPU cores. Command:
python -P -m treesurgeon.experiments.vq_directions --config=configs/vq.py --workdir=DIR

Variants: `configs/vq.py:smoke` runs every arm at toy size, where no claim need hold.
"""

import ml_collections

Q = "compress.quantize."


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, or "smoke" for toy size.

  Returns:
    "seeds", the network and its training, "arms" (name and expression), and "claims" (text, arm
    that shall lose less, arm that shall lose more).

  Raises:
    ValueError: for another variant.
  """
  if arg not in (None, "smoke"):
    raise ValueError(f"configs/vq.py has no variant {arg!r}; valid: smoke")
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.seeds = (0,) if smoke else (0, 1, 2)
  config.spec = {"d_model": 16 if smoke else 128, "num_layers": 2, "num_heads": 4,
                 "d_ff": 32 if smoke else 256}  # fmt: skip
  config.length, config.batch = (16, 4) if smoke else (64, 16)
  config.steps, config.rate = 4 if smoke else 500, 3e-3
  config.calibration, config.test = (8, 8) if smoke else (96, 192)
  config.tune, config.blocks = 2 if smoke else 60, 2 if smoke else 6
  entries, epochs = (16, 1) if smoke else (128, 6)
  vq = f"length=4, entries={entries}"
  learn = f"epochs={epochs}, batch=4"
  gqsa = f"{Q}gqsa({learn})"
  config.arms = (
    ("rtn, 2 bits", f"{Q}rtn(bits=2, group_size=64)"),
    ("gptq, 2 bits", f"{Q}gptq(bits=2, group_size=64, act_order=False)"),
    ("gptq, 2 bits of 16", f"{Q}gptq(bits=2, group_size=16, act_order=False)"),
    ("vptq", f"{Q}vptq({vq}, outliers=0.0)"),
    ("vptq, residual", f"{Q}vptq({vq}, outliers=0.0, residual=16)"),
    ("vptq, outliers", f"{Q}vptq({vq})"),
    ("aqlm, untuned", f"{Q}aqlm({vq}, epochs=0)"),
    ("aqlm", f"{Q}aqlm({vq}, {learn}, rate=0.0003)"),
    ("vq4dit, fixed", f"{Q}vq4dit({vq}, candidates=1, {learn})"),
    ("vq4dit", f"{Q}vq4dit({vq}, {learn})"),
    ("sign", f"{Q}rtn(bits=1, format='sign', group_size=-1)"),
    ("ptq161, analytic", f"{Q}ptq161(epochs=0)"),
    ("ptq161", f"{Q}ptq161({learn})"),
    ("gqsa, untuned", f"{Q}gqsa(epochs=0)"),
    ("gqsa", gqsa),
    ("gqsa, end to end", f"{gqsa} + {Q}tune_scales(steps={config.tune}, rate=0.0001)"),
    *((f"{k} logits", f"{Q}vq_logits(clusters={k})") for k in (16, 64, 128, 192)),
  )
  config.claims = _claims(config.blocks)
  return config


def _claims(blocks: int) -> tuple[tuple[str, str, str], ...]:
  bitstack = (
    (f"bitstack: {b + 1} blocks better than {b}", f"{b + 1} blocks", f"{b} blocks")
    for b in range(1, blocks)
  )
  logits = (
    (f"vq_logits: {b} clusters better than {a}", f"{b} logits", f"{a} logits")
    for a, b in ((16, 64), (64, 128), (128, 192))
  )
  return (
    ("gptq: better than rtn", "gptq, 2 bits", "rtn, 2 bits"),
    ("vptq: better than gptq at no more bits", "vptq", "gptq, 2 bits"),
    ("vptq: a residual table helps", "vptq, residual", "vptq"),
    ("vptq: outliers help", "vptq, outliers", "vptq"),
    ("aqlm: better than gptq at no more bits", "aqlm", "gptq, 2 bits"),
    ("aqlm: tuning blocks helps", "aqlm", "aqlm, untuned"),
    ("vq4dit: candidates better than fixed assignments", "vq4dit", "vq4dit, fixed"),
    ("ptq161: better than signs alone", "ptq161", "sign"),
    ("ptq161: learned scales better than analytic ones", "ptq161", "ptq161, analytic"),
    ("gqsa: half of four bits better than two", "gqsa", "gptq, 2 bits of 16"),
    ("gqsa: tuning blocks helps", "gqsa", "gqsa, untuned"),
    ("gqsa: tuning scales end to end helps", "gqsa, end to end", "gqsa"),
    *bitstack,
    *logits,
  )
