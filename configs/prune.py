# SPDX-License-Identifier: Apache-2.0
"""Which pruning hurts least, on a small language model of code and prose, against random pruning?

A byte-level decoder learns the standard library's code and prose; its kernels are pruned to 50 %,
to 2:4 and to 80 %, by each method from the same calibration text. Claims are numbers that are
negative where a claim holds; one is counted as reproduced if it holds for every seed. Verdicts are
in the registry's rows of `compress.prune`.

Cost: about two minutes a seed on one CPU core. Command:
python -P -m treesurgeon.experiments.prune_directions --config=configs/prune.py --workdir=DIR

Variants: `configs/prune.py:smoke` runs every arm at toy size, where no claim need hold.
"""

import ml_collections

CUTS = {"50%": "sparsity=0.5", "2:4": "pattern='2:4'", "80%": "sparsity=0.8"}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, or "smoke" for toy size.

  Returns:
    "seeds", the network and its training, "cuts", "arms" (name and expression, whose {cut} is
    replaced), and "claims": name, what is lower, what is higher, of which quantity, at which cuts.

  Raises:
    ValueError: for another variant.
  """
  if arg not in (None, "smoke"):
    raise ValueError(f"configs/prune.py has no variant {arg!r}; valid: smoke")
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.seeds = (0,) if smoke else (0, 1, 2)
  config.spec = {"d_model": 16 if smoke else 64, "num_layers": 2 if smoke else 3, "num_heads": 4,
                 "d_ff": 32 if smoke else 192}  # fmt: skip
  config.length, config.batch = (16, 4) if smoke else (64, 32)
  config.steps, config.rate = 4 if smoke else 600, 3e-3
  config.calibration, config.test = (8, 8) if smoke else (256, 256)
  tune = 4 if smoke else 200
  config.tune = tune
  trained = f"steps={tune}, rate=0.001"
  config.arms = (
    ("random", ""),
    ("magnitude", "compress.prune.magnitude({cut})"),
    ("magnitude over the model", "compress.prune.magnitude({cut}, per='model')"),
    ("wanda", "compress.prune.wanda({cut})"),
    ("sparsegpt", "compress.prune.sparsegpt({cut})"),
    ("obert", "compress.prune.obert({cut})"),
    ("ecoflap", "compress.prune.ecoflap({cut})"),
    ("d_pruner", "compress.prune.d_pruner({cut})"),
    ("d_pruner, domain alone", "compress.prune.d_pruner({cut}, lam=0.0)"),
    ("one shot, then training", f"merge.sparse_model_soups({{cut}}, copies=1, {trained})"),
    ("gradual", f"compress.prune.gradual({{cut}}, every={tune // 20 or 1}, {trained})"),
  )
  config.claims = _claims()
  config.cuts = tuple(CUTS.items())
  return config


def _claims() -> tuple[tuple[str, str, str, str, tuple[str, ...]], ...]:
  each, ratios = tuple(CUTS), ("50%", "80%")
  beat = ("magnitude", "wanda", "sparsegpt", "obert", "d_pruner")
  claims = [(f"{m}: better than random", m, "random", "loss", each) for m in beat]
  return (
    *claims,
    ("ecoflap: better than random", "ecoflap", "random", "loss", ratios),
    ("magnitude: better over the model than by matrix", "magnitude over the model", "magnitude",
     "loss", ratios),
    ("wanda: smaller output errors than magnitude", "wanda", "magnitude", "error", each),
    ("sparsegpt: smaller output errors than wanda", "sparsegpt", "wanda", "error", each),
    ("wanda: better than magnitude", "wanda", "magnitude", "loss", each),
    ("sparsegpt: better than wanda", "sparsegpt", "wanda", "loss", each),
    ("obert: better than magnitude over the model", "obert", "magnitude over the model", "loss",
     ratios),
    ("obert: better than magnitude", "obert", "magnitude", "loss", ("2:4",)),
    ("ecoflap: better than wanda", "ecoflap", "wanda", "loss", ratios),
    ("d_pruner: two texts better than one on both", "d_pruner", "d_pruner, domain alone", "loss",
     each),
    ("gradual: better than one shot, trained as long", "gradual", "one shot, then training",
     "loss", each),
  )  # fmt: skip
