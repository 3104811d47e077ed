# SPDX-License-Identifier: Apache-2.0
"""The main job end to end: train, grow, merge, compress and edit on real text.

Text is the Python standard library of the running interpreter: code, and prose from its docstrings.
Measured at seed 0, bits per byte on code / prose: stacked 2.01 / 2.46, never grown 2.04 / 2.46,
from scratch 2.03 / 2.47, all at equal FLOPs (Du et al., 2024, Figure 1, in direction); before
experts 2.01 / 2.46, code expert 1.96 / 2.65, prose expert 2.27 / 2.34, their average 2.02 / 2.41,
TIES 2.03 / 2.43 (Yadav et al., 2023, whose gain over averaging needs more tasks); 3 bits by GPTQ
2.11 / 2.53, by RTN 2.11 / 2.55 (Frantar et al., 2022, Table 1, in direction). ROME writes a fact,
its paraphrases follow, its neighbours stay, and other facts of the same subject suffer (Meng et
al., 2022).
`configs/directions.py` asks the same over seeds.

Cost: seven to ten minutes on two CPU cores. Command:
python -P -m treesurgeon.experiments.run --config=configs/quickstart.py --workdir=runs/quickstart

Variants: `configs/quickstart.py:smoke` runs every stage at toy size, about two CPU minutes.
"""

import ml_collections

from treesurgeon.configs import facts as facts_config

SMALL, GROWTH = 2, 2
TEXTS = ("code", "prose")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, or "smoke" for toy size.

  Returns:
    The config.

  Raises:
    ValueError: for an unknown variant.
  """
  if arg not in (None, "smoke"):
    raise ValueError(f"quickstart has no variant {arg!r}; it has 'smoke'")
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.text = {
    "vocab_size": 512,
    "length": 64,
    "document_bytes": 2000,
    "validation_bytes": 20_000 if smoke else 120_000,
    "calibration": 32 if smoke else 256,
  }
  total = 3e9 if smoke else 1.2e12
  _stages(
    config,
    total=total,
    batch=4 if smoke else 8,
    warmup=0 if smoke else 20,
    facts="smoke" if smoke else "quick",
  )
  config.page = _page()
  return config


def _stages(
  config: ml_collections.ConfigDict, *, total: float, batch: int, warmup: int, facts: str
) -> None:
  """Name the stages: three arms of equal FLOPs, two experts, a merge, four compressions."""
  width = {"family": "llama", "d_model": 32, "num_heads": 2, "d_ff": 88, "max_positions": 1024}

  def train(flops: float, schedule: str, lr: float = 4e-3, **rest: object) -> dict:
    optimizer = {"lr": lr, "schedule": schedule, "warmup": warmup, "final": 0.0}
    return {"kind": "train", "domains": TEXTS, "batch": batch, "max_flops": flops,
            "optimizer": optimizer, **rest}  # fmt: skip

  def compress(expression: str, **rest: object) -> dict:
    return {"kind": "transform", "model": "merged", "transform": expression, **rest}

  blockwise = {"driver": "blockwise", "calibration": TEXTS}
  stages = {
    "small": train(0.1 * total, "constant", spec={**width, "num_layers": SMALL}),
    "grown": train(
      0.9 * total, "wsd", model="small", transform=f"grow.g_stack(growth={GROWTH})"
    ),
    "never_grown": train(0.9 * total, "wsd", model="small"),
    "scratch": train(total, "wsd", spec={**width, "num_layers": SMALL * GROWTH}),
    "code_expert": train(0.15 * total, "wsd", lr=1e-3, model="grown", domains=("code",)),
    "prose_expert": train(0.15 * total, "wsd", lr=1e-3, model="grown", domains=("prose",)),
    "average": {
      "kind": "transform", "model": "code_expert", "donors": ("prose_expert",),
      "transform": "merge.linear()",
    },
    "merged": {
      "kind": "transform", "model": "grown", "donors": ("code_expert", "prose_expert"),
      "transform": "merge.ties(density=0.5, lam=0.5)",
    },
    "rtn_4bit": compress("compress.quantize.rtn(bits=4, group_size=32)"),
    "gptq_4bit": compress("compress.quantize.gptq(bits=4, group_size=32)", **blockwise),
    "rtn_3bit": compress("compress.quantize.rtn(bits=3, group_size=32)"),
    "gptq_3bit": compress("compress.quantize.gptq(bits=3, group_size=32)", **blockwise),
    "edited": {
      "kind": "facts", "facts": facts_config.get_config(facts), "evaluate": False,
      "transform": "edit.rome(layer=0)",
    },
    "export": {"kind": "export", "model": "gptq_4bit"},
  }  # fmt: skip
  config.stages, config.order = stages, tuple(stages)


def _page() -> dict:
  """Say what the report shows."""
  arms = {
    "grown: 2 layers, stacked to 4": ["small", "grown"],
    "never grown: 2 layers": ["small", "never_grown"],
    "from scratch: 4 layers": ["scratch"],
  }
  return {
    "title": "Operating on a small language model",
    "lead": (
      "A decoder was trained on the Python standard library, grown, split into two experts, "
      "merged, compressed and edited. Each operation is shown with its control, whether it helped "
      "or not. Bits per byte and perplexity: lower is better."
    ),
    "sections": [
      {"heading": "Growing", "kind": "curves", "arms": arms,
       "text": "The small model was stacked on itself and trained on. All three arms end at the "
               "same number of floating-point operations, the small model's included."},
      {"heading": "Growing: held-out text", "kind": "table", "texts": TEXTS,
       "rows": {"grown": "grown", "never grown (control)": "never_grown",
                "from scratch (control)": "scratch"},
       "findings": [
         _finding("grown", "never_grown", "Stacking beat the model that was never grown",
                  "Stacking lost to the model that was never grown",
                  "Stacking and never growing cannot be told apart"),
         _finding("grown", "scratch", "Stacking beat training the large model from scratch",
                  "Stacking lost to training the large model from scratch",
                  "Stacking and training from scratch cannot be told apart")]},
      {"heading": "Merging", "kind": "table", "texts": TEXTS,
       "text": "Two experts continue from the grown model, one on code, one on prose.",
       "rows": {"before specialising": "grown", "code expert": "code_expert",
                "prose expert": "prose_expert", "plain average": "average", "TIES": "merged"},
       "findings": [
         _finding("merged", "prose_expert", "On code, the merge beats the prose expert",
                  "On code, the merge is worse than even the prose expert",
                  "On code, the merge is no better than the prose expert"),
         _finding("merged", "code_expert", "On prose, the merge beats the code expert",
                  "On prose, the merge is worse than even the code expert",
                  "On prose, the merge is no better than the code expert", "prose"),
         _finding("merged", "code_expert", "On code, the merge beats the code expert itself",
                  "On code, the merge pays against the code expert",
                  "On code, the merge costs nothing against the code expert"),
         _finding("merged", "average", "TIES beats a plain average on code",
                  "TIES loses to a plain average on code",
                  "TIES and a plain average cannot be told apart on code")]},
      {"heading": "Compressing", "kind": "table", "texts": TEXTS,
       "text": "The merged model's kernels, one scale for every 32 input weights. GPTQ sees 256 "
               "sequences of training text; RTN sees none. Embeddings stay as they are.",
       "rows": {"merged, float32": "merged", "RTN, 4 bits": "rtn_4bit",
                "GPTQ, 4 bits": "gptq_4bit", "RTN, 3 bits": "rtn_3bit",
                "GPTQ, 3 bits": "gptq_3bit"},
       "findings": [
         _finding(f"gptq_{b}bit", f"rtn_{b}bit", f"At {b} bits GPTQ beats rounding to nearest",
                  f"At {b} bits GPTQ loses to rounding to nearest",
                  f"At {b} bits GPTQ and rounding to nearest cannot be told apart")
         for b in (4, 3)]},
      {"heading": "Editing", "kind": "edit", "stage": "edited",
       "text": "A second small network was taught a closed world of facts, then single facts were "
               "changed, always from the unedited network.",
       "below": "Means over several edits. The first two columns should rise to 1; in all others "
                "the unedited row is the control. Fine-tuning fits the same matrix. The last "
                "columns are what CounterFact's three scores do not show.",
       "rows": {"unedited": "unedited", "ROME": "ROME", "ROME without covariance": "ROME, C = I",
                "fine-tuning": "fine-tuning"},
       "metrics": {"ES": "edited", "PS": "paraphrases", "NS": "neighbours",
                   "others": "same subject", "shared": "shared name", "world": "all other facts",
                   "world_kl": "drift, KL nats"}},
      {"heading": "Weights", "kind": "histograms",
       "text": "Stacking repeats the small model's weights; training spreads them again; "
               "quantization leaves a few values a group.",
       "stages": ("small", "grown", "merged", "gptq_4bit")},
      {"heading": "The tree before and after", "kind": "trees", "stages": ("small", "gptq_4bit")},
    ],
  }  # fmt: skip


def _finding(a: str, b: str, better: str, worse: str, even: str, text: str = "code") -> dict:
  return {"a": a, "b": b, "text": text, "better": better + ".", "worse": worse + ".",
          "even": even + "."}  # fmt: skip
