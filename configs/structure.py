# SPDX-License-Identifier: Apache-2.0
"""Do structured pruning and low rank show their papers' directions on a small language model?

A byte-level decoder learns the standard library's code and prose, and is then made smaller by each
method from the same calibration text. Claims are differences of held-out losses that are negative
where a claim holds; one is counted as reproduced if it holds for every seed. Verdicts are in the
registry's rows of `compress.prune`, `compress.low_rank` and `compress.distill`.

Cost: about two minutes a seed on one CPU core. Command:
python -P -m treesurgeon.experiments.structure_directions --config=configs/structure.py \
  --workdir=DIR

Variants: `configs/structure.py:smoke` runs every arm at toy size, where no claim need hold.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, or "smoke" for toy size.

  Returns:
    "seeds", the network and its training, "arms" (name and expressions, applied in turn),
    "controls" (name, what is chosen at random, how much), and "claims": text, what is lower, what
    is higher.

  Raises:
    ValueError: for another variant.
  """
  if arg not in (None, "smoke"):
    raise ValueError(f"configs/structure.py has no variant {arg!r}; valid: smoke")
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.seeds = (0,) if smoke else (0, 1, 2)
  width, hidden, layers = (16, 32, 3) if smoke else (64, 192, 6)
  config.spec = {"d_model": width, "num_layers": layers, "num_heads": 4, "d_ff": hidden}
  config.length, config.batch = (16, 4) if smoke else (64, 32)
  config.steps, config.rate = 4 if smoke else 400, 3e-3
  config.calibration, config.test = (2, 8) if smoke else (8, 256)
  config.tune = 2 if smoke else 100
  drop, cut = (1, 8) if smoke else (2, 48)
  train = f"steps={config.tune}, rate=0.001"
  small = f"compress.prune.minitron(d_ff={hidden // 2}, heads=2)"
  share = 1 - cut / width
  arms = [
    ("shortgpt", (f"compress.prune.shortgpt(drop={drop})",)),
    ("minitron", (small,)),
    ("minitron, distilled", (small, f"compress.distill.logits({train})")),
    ("minitron, trained on labels", (small, f"compress.distill.logits(alpha=0.0, {train})")),
    ("ziplm", (f"compress.prune.ziplm(speedup=2.0, search={2 if smoke else 100})",)),
    ("slicegpt", (f"compress.prune.slicegpt(slicing={share})",)),
    ("slicegpt, one turn", (f"compress.prune.slicegpt(slicing={share}, shortcuts=False)",)),
  ]
  arms += [(m, (f"compress.low_rank.{m}(ratio=0.6)",)) for m in ("svd", "asvd", "svd_llm")]
  for bits in (3, 2):
    rtn = f"compress.quantize.rtn(bits={bits}, group_size=32)"
    arms += [
      (f"rtn {bits}", (rtn,)),
      (f"lorc {bits}", (rtn, "compress.low_rank.lorc(rank=4)")),
      (f"eora {bits}", (rtn, "compress.low_rank.eora(rank=4)")),
    ]
  config.arms = tuple(arms)
  config.controls = (("random layers", "layers", drop), ("random turn", "width", cut))
  config.claims = (
    ("shortgpt: better than random layers", "shortgpt", "random layers"),
    ("minitron: distilled is better than trained on labels", "minitron, distilled",
     "minitron, trained on labels"),
    ("ziplm: at twice the speed better than minitron at the same", "ziplm", "minitron"),
    ("slicegpt: better than a random turn", "slicegpt", "random turn"),
    ("slicegpt: one turn is better than a random one", "slicegpt, one turn", "random turn"),
    ("slicegpt: a turn a branch is better than one", "slicegpt", "slicegpt, one turn"),
    ("asvd: better than svd", "asvd", "svd"),
    ("svd_llm: better than asvd", "svd_llm", "asvd"),
    ("eora: better than the svd of the error, 3 bits", "eora 3", "lorc 3"),
    ("eora: better than the svd of the error, 2 bits", "eora 2", "lorc 2"),
    ("lorc: better than rounding alone, 3 bits", "lorc 3", "rtn 3"),
    ("lorc: better than rounding alone, 2 bits", "lorc 2", "rtn 2"),
  )  # fmt: skip
  return config
