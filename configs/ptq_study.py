# SPDX-License-Identifier: Apache-2.0
"""What does compression cost? Every method at every width on a decoder and an encoder.

Expected, from the papers: GPTQ < RTN with a gap that widens at fewer bits, act-order helps,
asymmetric < symmetric (Frantar et al., 2022, tables 2-4), AWQ < RTN (Lin et al., 2023, table 4),
SparseGPT < Wanda < magnitude and 2:4 worse than 50 % anywhere (Sun et al., 2023, table 3), learned
rounding < RTN (Cheng et al., 2023; Lee et al., 2023). What held: `docs/results/compression.md`.

Cost: ten minutes a network to train and half an hour for the cells, on one CPU core. Command:
python -P -m treesurgeon.experiments.ptq_study --config=configs/ptq_study.py --workdir=DIR

Variants: `:smoke` runs it at toy size; `:gpu` has networks of 97 and 93 million parameters.
"""

import ml_collections

from treesurgeon.configs import facts as facts_config

BITS, GROUPS, BOTH = (8, 4, 3, 2), (32, 128), ("decoder", "encoder")
FORM = "bits={bits}, group_size={group}, scale_dtype='float16'"
BERT = {
  "kind": "encoder", "family": "bert", "positions": "learned", "norm": "layer", "norm_eps": 1e-12,
  "norm_place": "residual", "final_norm": False, "embed_norm": True, "gated": False,
  "activation": "gelu", "qkv_bias": True, "o_bias": True, "mlp_bias": True, "num_types": 2,
  "mlm_head": True, "tied": True, "head_bias": True,
}  # fmt: skip


def methods(steps: int, learned: str) -> dict:
  """List the methods that take a width.

  Args:
    steps: of what learns.
    learned: further arguments of what learns.

  Returns:
    Name to "transform", "bits", "groups", "models"; "rotated" where kernels are not comparable,
    "slow" where it comes last.
  """
  quantize = "compress.quantize."

  def at(call: str, **rest: object) -> dict:
    return {"transform": quantize + call, "bits": BITS, "groups": GROUPS, "models": BOTH, **rest}

  one = {"groups": (32,), "models": ("decoder",)}
  few = {"bits": (4, 3, 2), "groups": (32,), "encoder": {"bits": (3, 2)}}
  low, slow = {"bits": (3, 2), **one}, {"slow": True}
  return {
    "RTN": at(f"rtn({FORM})", encoder={"groups": (32,)}),
    "RTN asym": at(f"rtn({FORM}, symmetric=False)", **few),
    "RTN mse": at(f"rtn({FORM}, mse=True)", **few),
    "GPTQ": at(f"gptq({FORM}, act_order=False)", encoder={"bits": (4, 3, 2), "groups": (32,)}),
    "GPTQ act-order": at(f"gptq({FORM})", **{**few, "encoder": {"bits": (3,)}}),
    "GPTQ asym": at(
      f"gptq({FORM}, symmetric=False, act_order=False)", **{**few, "encoder": {"bits": (3,)}}
    ),
    "GPTQ asym act-order": at(f"gptq({FORM}, symmetric=False)", **low),
    "HQQ": at("hqq(bits={bits}, group_size={group})", **{**few, "encoder": {"bits": (2,)}}),
    "AWQ": at(
      "awq(bits={bits}, group_size={group})", **{**few, "encoder": {"bits": ()}}, rotated=True
    ),
    "AdaDim": at("adadim(bits={bits}, group_size={group})", **low),
    "FineQuant": at("finequant(bits={bits}, smallest={group})", bits=(4, 3), **one),
    "AutoRound": at(f"autoround({FORM}, steps={steps}, {learned})", **slow, **few),
    "AutoRound asym": at(
      f"autoround({FORM}, symmetric=False, steps={steps}, {learned})", **slow, **low
    ),
    "AutoRound, kernel": at(f"autoround({FORM}, steps={steps}, per='kernel')", **slow, **low),
    "FlexRound": at(f"flexround({FORM}, steps={2 * steps}, {learned})", **slow, **few),
    "FlexRound, kernel": at(f"flexround({FORM}, steps={5 * steps}, per='kernel')", **slow, **low),
  }


def factors(steps: int, learned: str) -> list[dict]:
  """List cells that change one choice of gradient-based rounding at a time, at 3 bits.

  Args:
    steps: of each.
    learned: further arguments of each.

  Returns:
    Cells.
  """
  changes = {
    "as it is": "",
    "shift": "variable='shift'",
    "free": "variable='free'",
    "sigmoid": "variable='sigmoid', rate=0.1",
    "scales stay": "scales=False",
    "mae": "loss='mae'",
    "cosine": "loss='cosine'",
    "adamax": "optimizer='adamax'",
    "sgd": "optimizer='sgd'",
    "sign": "optimizer='sign'",
    "rate x3": "rate=0.01",
    "rate / 3": "rate=0.001",
    "1 % kept": "keep=0.01",
    "by kernel": "per='kernel'",
  }
  call = (
    f"compress.quantize.gradient_ptq(bits=3, group_size=32, scale_dtype='float16', steps={steps}"
  )
  return [
    {"model": "decoder", "label": f"gradient 3b g32: {name}", "method": "gradient",
     "transform": ", ".join(x for x in (call, learned, text) if x) + ")"}
    for name, text in changes.items()
  ]  # fmt: skip


def extra(short: str) -> list[dict]:
  """List single cells: below two bits, pruning, and orders of composition.

  Args:
    short: arguments that keep what trains for epochs short.

  Returns:
    Cells.
  """
  rtn, gptq = "compress.quantize.rtn", "compress.quantize.gptq"
  three = f"{gptq}(bits=3, group_size=32, scale_dtype='float16')"
  four = f"{gptq}(bits=4, group_size=32, scale_dtype='float16')"
  nearest = f"{rtn}(bits=3, group_size=32, scale_dtype='float16')"
  nearest4 = f"{rtn}(bits=4, group_size=32, scale_dtype='float16')"
  cells = {
    "original": "chain()",
    "ternary g32": f"{rtn}(bits=2, format='ternary', group_size=32, scale_dtype='float16')",
    "binary g32": f"{rtn}(bits=1, format='sign', group_size=32, scale_dtype='float16')",
    "NF4 g32": f"{rtn}(bits=4, format='nf', group_size=32, scale_dtype='float16')",
    "MXFP4": f"{rtn}(bits=4, format='e2m1', group_size=32, scale_dtype='float8_e8m0fnu')",
    "NVFP4": f"{rtn}(bits=4, format='e2m1', group_size=16, scale_dtype='e4m3fn')",
    "magnitude 50 %": "compress.prune.magnitude(sparsity=0.5)",
    "Wanda 50 %": "compress.prune.wanda(sparsity=0.5)",
    "Wanda 2:4": "compress.prune.wanda(pattern='2:4', packed=True)",
    "SparseGPT 50 %": "compress.prune.sparsegpt(sparsity=0.5)",
    "SparseGPT 2:4": "compress.prune.sparsegpt(pattern='2:4', packed=True)",
    "SVD 50 %": "compress.low_rank.svd(ratio=0.5)",
    "ASVD 50 %": "compress.low_rank.asvd(ratio=0.5)",
    "SVD-LLM 50 %": "compress.low_rank.svd_llm(ratio=0.5)",
  }
  tables = {
    "VPTQ, 64 vectors of 4": "compress.quantize.vptq(length=4, entries=64)",
    "VPTQ, 256 vectors of 4": "compress.quantize.vptq(length=4, entries=256)",
    "decoupleQ 2b g32": "compress.quantize.decoupleq(bits=2, group_size=32, epochs=1)",
    "GQSA 4b, half": f"compress.quantize.gqsa({short})",
    "PTQ1.61": f"compress.quantize.ptq161({short})",
    "GWQ 3b g32": "compress.quantize.gwq(bits=3, group_size=32)",
    "SpQR 3b": "compress.quantize.spqr(bits=3)",
    "aligned 2 and 4b g32": "compress.quantize.aligned()",
    "OliVe 4b": "compress.quantize.olive()",
    "CPTQuant 3b g32": "compress.quantize.cptquant(average=3.0, group_size=32)",
    "minifloat 4b g32": "compress.quantize.minifloat(bits=4, group_size=32)",
    "minifloat 3b g32": "compress.quantize.minifloat(bits=3, group_size=32)",
    "LQ-LoRA 3b g32": "compress.low_rank.lq_lora(bits=3, group_size=32, rank=4)",
    "BitStack, 2 of rank 1": "compress.quantize.bitstack(blocks=2, rank=1)",
    "BitStack, 3 of rank 1": "compress.quantize.bitstack(blocks=3, rank=1)",
  }
  rows = [
    {"model": m, "label": k, "transform": t}
    for m in BOTH
    for k, t in cells.items()
    if m == "decoder" or not k.startswith(("MX", "NV", "ASVD"))
  ]
  rows += [{"model": "decoder", "label": k, "transform": t} for k, t in tables.items()]
  own = {"donors": ("decoder",)}
  prune = "compress.prune.wanda(sparsity=0.5)"
  order = {
    "Wanda 50 %, then RTN 4b": (f"{prune} + {nearest4}", {}),
    "RTN 4b, then Wanda 50 %": (f"{nearest4} + {prune}", {}),
    "SparseGPT 50 %, then RTN 4b": (f"compress.prune.sparsegpt(sparsity=0.5) + {nearest4}", {}),
    "SparseGPT 50 % with 4b": ("compress.prune.sparsegpt(sparsity=0.5, bits=4, group_size=32)", {}),
    "RTN 3b + LoRC 4": (f"{nearest} + compress.low_rank.lorc(rank=4)", own),
    "RTN 3b + EoRA 4": (f"{nearest} + compress.low_rank.eora(rank=4)", own),
    "GPTQ 3b + LoRC 4": (f"{three} + compress.low_rank.lorc(rank=4)", own),
    "GPTQ 3b + EoRA 4": (f"{three} + compress.low_rank.eora(rank=4)", own),
    "Wanda 50 % + EoRA 4": (f"{prune} + compress.low_rank.eora(rank=4)", own),
    "Wanda 2:4 + EoRA 4": (
      "compress.prune.wanda(pattern='2:4', packed=True) + compress.low_rank.eora(rank=4)", own
    ),
  }  # fmt: skip
  rows += [
    {"model": "decoder", "label": k, "transform": t, **more} for k, (t, more) in order.items()
  ]
  a4, a8 = "compress.quantize.activations(bits=4)", "compress.quantize.activations()"
  w8 = f"{rtn}(bits=8, group_size=-1, scale_dtype='float16')"
  turned = {
    "QuaRot, then RTN 3b": f"compress.quantize.quarot() + {nearest}",
    "QuaRot, then GPTQ 3b": f"compress.quantize.quarot() + {three}",
    "W4A4": f"{nearest4} + {a4}",
    "QuaRot, then W4A4": f"compress.quantize.quarot() + {nearest4} + {a4}",
    "SpinQuant, then W4A4": f"compress.quantize.spinquant() + {nearest4} + {a4}",
    "W8A8": f"{w8} + {a8}",
    "SmoothQuant, then W8A8": f"compress.quantize.smoothquant() + {w8} + {a8}",
  }
  rows += [
    {"model": "decoder", "label": k, "transform": t, "rotated": True} for k, t in turned.items()
  ]
  experts = {"donors": ("code expert", "prose expert")}
  ties = "merge.ties(density=0.5, lam=0.5)"
  rows += [
    {"model": "decoder", "label": "merge", "transform": ties, **experts},
    {"model": "decoder", "label": "merge, then GPTQ 3b", "transform": f"{ties} + {three}",
     **experts},
    {"model": "decoder", "label": "experts by GPTQ 3b, then merge", "transform": ties,
     "before": three, **experts},
    {"model": "decoder", "label": "experts by GPTQ 3b, merge, GPTQ 3b",
     "transform": f"{ties} + {three}", "before": three, **experts},
    {"model": "decoder", "label": "merge, then GPTQ 4b", "transform": f"{ties} + {four}",
     **experts},
  ]  # fmt: skip
  families = {
    "original": ("original",),
    "formats": ("ternary", "binary", "NF4", "MX", "NV", "minifloat"),
    "outliers kept": ("GWQ", "SpQR", "aligned", "OliVe"),
    "widths by layer": ("CPTQuant",),
    "pruned": ("magnitude 50 %", "Wanda", "SparseGPT"),
    "low rank": ("SVD", "ASVD", "LQ-LoRA"),
    "merged": ("merge", "experts"),
    "PTQ1.61, GQSA": ("PTQ1.61", "GQSA"),
    "VPTQ": ("VPTQ",),
    "BitStack": ("BitStack",),
    "decoupleQ": ("decoupleQ",),
  }
  for row in rows:
    named = [f for f, starts in families.items() if row["label"].startswith(starts)]
    mixed = "+" in row["transform"] or "with 4b" in row["label"]
    inputs = "activations" in row["transform"]
    row["method"] = "composed" if mixed and named != ["merged"] else (named or ["composed"])[0]
    row["method"] = "inputs too" if inputs else row["method"]
  return rows


def claims() -> list[tuple]:
  """List the directions: (what is said, network, terms that sum to below zero, metric)."""

  def less(a: str, b: str) -> tuple:
    return ((1.0, a), (-1.0, b))

  out: list[tuple] = []
  for model in BOTH:
    for metric in ("error", "nll"):
      by = "kernel error" if metric == "error" else "loss"
      for b in (4, 3, 2):
        out.append((f"GPTQ < RTN at {b} bits, {by}", model,
                    less(f"GPTQ {b}b g32", f"RTN {b}b g32"), metric))  # fmt: skip
      pairs = {
        "act-order helps GPTQ at 3 bits": ("GPTQ act-order 3b g32", "GPTQ 3b g32"),
        "asymmetric < symmetric, RTN 3 bits": ("RTN asym 3b g32", "RTN 3b g32"),
        "asymmetric < symmetric, GPTQ 3 bits": ("GPTQ asym 3b g32", "GPTQ 3b g32"),
        "AutoRound < RTN at 3 bits": ("AutoRound 3b g32", "RTN 3b g32"),
        "AutoRound < GPTQ at 2 bits": ("AutoRound 2b g32", "GPTQ 2b g32"),
        "FlexRound < RTN at 3 bits": ("FlexRound 3b g32", "RTN 3b g32"),
        "FlexRound < AutoRound at 2 bits": ("FlexRound 2b g32", "AutoRound 2b g32"),
        "HQQ < RTN asym at 2 bits": ("HQQ 2b g32", "RTN asym 2b g32"),
        "NF4 < INT4, RTN": ("NF4 g32", "RTN 4b g32"),
        "SparseGPT < Wanda at 50 %": ("SparseGPT 50 %", "Wanda 50 %"),
        "Wanda < magnitude at 50 %": ("Wanda 50 %", "magnitude 50 %"),
        "50 % anywhere < 2:4, Wanda": ("Wanda 50 %", "Wanda 2:4"),
        "50 % anywhere < 2:4, SparseGPT": ("SparseGPT 50 %", "SparseGPT 2:4"),
        "SVD-LLM < SVD at half the numbers": ("SVD-LLM 50 %", "SVD 50 %"),
      }
      if model == "decoder":
        if metric == "nll":
          pairs |= {
            "AWQ < RTN asym at 3 bits": ("AWQ 3b g32", "RTN asym 3b g32"),
            "AWQ < GPTQ asym at 3 bits": ("AWQ 3b g32", "GPTQ asym 3b g32"),
            "decoupleQ < GPTQ asym at 2 bits": ("decoupleQ 2b g32", "GPTQ asym 2b g32"),
          }
        pairs |= {
          "groups of 32 < 128, RTN 3 bits": ("RTN 3b g32", "RTN 3b g128"),
          "NVFP4 < MXFP4": ("NVFP4", "MXFP4"),
          "ASVD < SVD at half the numbers": ("ASVD 50 %", "SVD 50 %"),
        }
      out += [(f"{n}, {by}", model, less(*pair), metric) for n, pair in pairs.items()]
    for b in (4, 3):
      wide = (*less(f"RTN {b}b g32", f"GPTQ {b}b g32"),
              *less(f"GPTQ {b - 1}b g32", f"RTN {b - 1}b g32"))  # fmt: skip
      out.append((f"GPTQ's gap to RTN widens from {b} to {b - 1} bits, loss", model, wide, "nll"))
  orders = {
    "prune, then quantize < quantize, then prune": (
      "Wanda 50 %, then RTN 4b", "RTN 4b, then Wanda 50 %"
    ),
    "SparseGPT with rounding < rounding after": (
      "SparseGPT 50 % with 4b", "SparseGPT 50 %, then RTN 4b"
    ),
    "LoRC helps RTN": ("RTN 3b + LoRC 4", "RTN 3b g32"),
    "EoRA < LoRC behind RTN": ("RTN 3b + EoRA 4", "RTN 3b + LoRC 4"),
    "EoRA helps GPTQ": ("GPTQ 3b + EoRA 4", "GPTQ 3b g32"),
    "EoRA helps Wanda 2:4": ("Wanda 2:4 + EoRA 4", "Wanda 2:4"),
    "merge, then quantize < quantize, merge, quantize": (
      "merge, then GPTQ 3b", "experts by GPTQ 3b, merge, GPTQ 3b"
    ),
  }  # fmt: skip
  orders |= {
    "QuaRot helps RTN at 3 bits": ("QuaRot, then RTN 3b", "RTN 3b g32"),
    "QuaRot helps GPTQ at 3 bits": ("QuaRot, then GPTQ 3b", "GPTQ 3b g32"),
    "QuaRot helps W4A4": ("QuaRot, then W4A4", "W4A4"),
    "SpinQuant < QuaRot, W4A4": ("SpinQuant, then W4A4", "QuaRot, then W4A4"),
    "SmoothQuant helps W8A8": ("SmoothQuant, then W8A8", "W8A8"),
    "GWQ < RTN asym at 3 bits": ("GWQ 3b g32", "RTN asym 3b g32"),
    "CPTQuant < RTN at 3 bits": ("CPTQuant 3b g32", "RTN 3b g32"),
    "OliVe < RTN 4b g128": ("OliVe 4b", "RTN 4b g128"),
    "LQ-LoRA < RTN 3b + LoRC 4": ("LQ-LoRA 3b g32", "RTN 3b + LoRC 4"),
    "SpQR < GPTQ asym at 3 bits": ("SpQR 3b", "GPTQ asym 3b g32"),
    "minifloat < RTN at 3 bits": ("minifloat 3b g32", "RTN 3b g32"),
  }
  choices = {
    "dividing < shifting": ("as it is", "shift"),
    "dividing < a rectified sigmoid": ("as it is", "sigmoid"),
    "learning scales helps": ("as it is", "scales stay"),
    "MSE < MAE": ("as it is", "mae"),
    "MSE < cosine": ("as it is", "cosine"),
    "Adam < AdaMax": ("as it is", "adamax"),
    "Adam < SGD": ("as it is", "sgd"),
    "Adam < signs": ("as it is", "sign"),
    "a block's output < a kernel's": ("as it is", "by kernel"),
    "keeping 1 % helps": ("1 % kept", "as it is"),
  }  # fmt: skip
  orders |= {
    f"gradient, 3 bits: {n}": tuple(f"gradient 3b g32: {x}" for x in pair)
    for n, pair in choices.items()
  }
  out += [(f"{n}, loss", "decoder", less(*pair), "nll") for n, pair in orders.items()]
  return out


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, "smoke" for toy size, or "gpu".

  Returns:
    "text", "models", "methods", "extra" cells, "edits", "claims", the models of the "figure".

  Raises:
    ValueError: for an unknown variant.
  """
  if arg not in (None, "smoke", "gpu"):
    raise ValueError(f"the quantization study has no variant {arg!r}; it has smoke and gpu")
  text = {
    "vocab_size": 1024, "length": 64, "document_bytes": 2000, "validation_bytes": 160_000,
    "calibration": 128,
  }  # fmt: skip
  both = ("code", "prose")
  llama = {"family": "llama", "d_model": 128, "num_layers": 4, "num_heads": 4, "d_ff": 352,
           "max_positions": 256}  # fmt: skip
  bert = {**BERT, "d_model": 128, "num_layers": 2, "num_heads": 4, "d_ff": 512,
          "max_positions": 128}  # fmt: skip
  decoder = {"spec": llama, "steps": 1500, "batch": 32, "lr": 3e-3, "domains": both}
  encoder = {"spec": bert, "steps": 6000, "batch": 32, "lr": 1e-3, "domains": both}
  tuned = {"base": "decoder", "steps": 200, "batch": 16, "lr": 5e-4}
  steps, learned, facts = 200, "batch=8", "quick"
  if arg == "gpu":
    text |= {"vocab_size": 8192, "length": 256, "validation_bytes": 400_000, "calibration": 256}
    llama |= {"d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 2048}
    bert |= {"d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 3072, "max_positions": 256}
    decoder |= {"steps": 2000, "lr": 6e-4}
    encoder |= {"steps": 6000, "lr": 3e-4}
  if arg == "smoke":
    text |= {"vocab_size": 300, "length": 16, "validation_bytes": 4000, "calibration": 8}
    small = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 48}
    llama |= small
    bert |= small
    decoder |= {"steps": 3, "batch": 4}
    encoder |= {"steps": 3, "batch": 4}
    tuned |= {"steps": 2, "batch": 4}
    steps, learned, facts = 2, "batch=4", "smoke"
  named = methods(steps, learned)
  cells = extra("epochs=1") + factors(steps, learned)
  if arg == "smoke":  # one width of each
    named = {n: {**m, "bits": m["bits"][-1:], "groups": m["groups"][:1]} for n, m in named.items()}
  edited = facts_config.get_config(facts).to_dict()
  rounds = {
    f"{m} {b}b": f"compress.quantize.{f}(bits={b}, group_size=32)"
    for m, f in (("RTN", "rtn"), ("GPTQ", "gptq"))
    for b in (8, 4, 3, 2)
  }
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.text, config.methods = text, named
  config.models = {
    "decoder": decoder, "encoder": encoder,
    "code expert": {**tuned, "domains": both[:1]}, "prose expert": {**tuned, "domains": both[1:]},
  }  # fmt: skip
  config.extra = tuple(cells)
  config.edits = {
    "facts": {**edited, "edits": 2 if arg == "smoke" else 6},
    "edit": f"edit.rome(layer={edited['layer']})",
    "after": {"edited": "chain()", **rounds},
  }
  config.claims, config.figure = tuple(claims()), BOTH
  return config
