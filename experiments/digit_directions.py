# SPDX-License-Identifier: Apache-2.0
"""Test what is claimed of merges that train, on handwritten digits; about a minute a question.

python -P -m treesurgeon.experiments.digit_directions --what=dam --seeds=3

The language-model counterpart is `merge_directions`.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from treesurgeon import models, registry
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import backdoor, classification
from treesurgeon.run import collect, drivers
from treesurgeon.train import loop, vision_data

SPEC = models.VisionSpec("mlp", image_size=8, num_classes=10, d_model=128, num_layers=2)
TARGET = 7  # the attacker's class
SHIFTS = {
  "noise": 0.35,
  "blur": 1.0,
  "occlusion": 0.3,
}  # DAM's tasks; the expert of blur is poisoned
Numbers = dict[str, float]


def main(argv: list[str]) -> None:
  """Run an experiment for every seed, then print its numbers and verdicts.

  Args:
    argv: no positional arguments.
  """
  del argv
  logging.set_verbosity(logging.WARNING)
  measure, claims = EXPERIMENTS[flags.FLAGS.what]
  runs = []
  for seed in range(flags.FLAGS.seeds):
    runs.append(measure(seed))
    print(f"seed {seed}:", json.dumps({k: round(v, 4) for k, v in runs[-1].items()}), flush=True)
  for text, (low, high) in claims.items():
    values = [r[high] - r[low] for r in runs]
    verdict = "reproduced" if min(values) > 0 else "not reproduced" if max(values) <= 0 else "mixed"
    print(f"{text}: {'  '.join(f'{v:+.4f}' for v in values)}  {verdict}")


def bang(seed: int) -> Numbers:
  """Average models that lean on different marks, fine-tuned with hard and with soft labels.

  The first model learns digits with bars in the outer columns that mostly betray the class, the
  fine-tuned one with bars in the outer rows; out of distribution no bar means anything.

  Args:
    seed: of everything random.

  Returns:
    Accuracies out of distribution, and mean confidences there.
  """
  clean = vision_data.build()
  before = _marked(clean.train, rows=0.1, columns=0.7, seed=10 * seed)
  later = _marked(clean.train, rows=0.7, columns=0.1, seed=10 * seed + 3)
  shifted = _marked(clean.test, rows=0.0, columns=0.0, seed=10 * seed + 7)
  first = _trained(_blank(seed), vision_data.batches(before, batch=64, seed=seed), 500)
  data = list(itertools.islice(vision_data.batches(later, batch=64, seed=seed), 300))

  def tuned(**arguments: Any) -> model_lib.Model:
    one = registry.load("merge.bang")(**{"steps": 300, "smoothing": 0.0, **arguments})
    return drivers.run(one, first, collect.Materials(batches=data), seed=seed)

  hard = tuned(alpha=1.0)
  loud = hard.update({f"head/{n}": 10.0 * hard.leaf(f"head/{n}") for n in ("kernel", "bias")})
  found = {
    "first": first,
    "fine-tuned": hard,
    "WiSE-FT": tuned(alpha=0.5),
    "WiSE-FT, logits x10": _run("merge.wise_ft()", first, donors=[loud]),
    "fine-tuned, smoothed": tuned(alpha=1.0, smoothing=0.1),
    "BANG, smoothed": tuned(alpha=0.5, smoothing=0.1),
    "BANG, mixed up": tuned(alpha=0.5, mixup=0.3),
    "BANG, both": tuned(alpha=0.5, smoothing=0.1, mixup=0.3),
  }
  out = {name: classification.accuracy(m, shifted) for name, m in found.items()}
  out["either"] = max(out["first"], out["fine-tuned"])
  for name in ("fine-tuned", "fine-tuned, smoothed"):
    out[f"confidence of {name}"] = classification.confidence(found[name], shifted)
  return out


def dam(seed: int) -> Numbers:
  """Merge experts of three kinds of shifted images, one of whom learned a trigger too.

  Args:
    seed: of everything random.

  Returns:
    Mean accuracy and mean attack success rate over the tasks.
  """
  clean = vision_data.build()
  tasks = {
    n: vision_data.Task(
      *(vision_data.corrupt(r, n, severity=s, seed=seed + i) for i, r in enumerate(clean))
    )
    for n, s in SHIFTS.items()
  }
  base = _trained(_blank(seed), vision_data.batches(clean.train, batch=64, seed=seed), 100, lr=2e-3)
  experts = []
  for name, task in tasks.items():
    rows = task.train
    if name == "blur":
      rows = vision_data.triggered(rows, target=TARGET, share=0.1, seed=seed)
    experts.append(_trained(base, vision_data.batches(rows, batch=64, seed=seed), 250))
  own = [
    [{k: x[i : i + 64] for k, x in t.validation.items()} for i in range(0, 256, 64)]
    for t in tasks.values()
  ]
  learned = "init=0.5, mask_rate=0.01, noise_rate=0.01, mask_steps=300, steps=0"
  out: Numbers = {}
  for name, expression in {
    "TA 0.3": "merge.task_arithmetic(lam=0.3)",
    "TA 0.5": "merge.task_arithmetic(lam=0.5)",
    "AdaMerging": "merge.adamerging(init=0.5, steps=100)",
    "DAM": f"merge.dam({learned}, strength=1.0)",
    "DAM, no penalty": f"merge.dam({learned}, strength=0.0)",
    "DAM, one mask": f"merge.dam({learned}, strength=1.0, masks=1)",
  }.items():
    m = _run(expression, base, donors=experts, donor_batches=own, seed=seed)
    out[f"accuracy of {name}"] = float(
      np.mean([classification.accuracy(m, t.test) for t in tasks.values()])
    )
    out[f"attacks on {name}"] = float(np.mean([_attack(m, t.test) for t in tasks.values()]))
  out["3 points below TA 0.5"] = out["accuracy of TA 0.5"] - 0.03
  return out


def sparse_soups(seed: int) -> Numbers:
  """Prune a model to 5 % of its hidden weights, and retrain single copies or a soup of them.

  Args:
    seed: of everything random.

  Returns:
    Losses on test images in nats, clean and under noise, and accuracies.
  """
  clean = vision_data.build()
  noisy = vision_data.corrupt(clean.test, "noise", severity=0.3, seed=seed)
  dense = _trained(_blank(seed), vision_data.batches(clean.train, batch=50, seed=seed), 400)
  data = list(itertools.islice(vision_data.batches(clean.train, batch=50, seed=seed), 20))

  def cooked(order: int = 0, **arguments: Any) -> model_lib.Model:
    mixed = [data[i] for i in np.random.default_rng([seed, order]).permutation(len(data))]
    one = registry.load("merge.sparse_model_soups")(
      **{"sparsity": 0.95, "rate": 3e-3, "steps": 600, **arguments}
    )
    return drivers.run(one, dense, collect.Materials(batches=mixed), seed=seed)

  singles = [cooked(i, copies=1, decay=(d,)) for i, d in enumerate((0.0, 1e-4, 5e-4))]
  found = {"soup": cooked(), "one for as long": cooked(copies=1, steps=1800)}
  out: Numbers = {}
  for where, rows in {"loss": clean.test, "loss under noise": noisy}.items():
    each = [float(_nll(m.params, rows)) for m in singles]
    out[f"{where}, mean single"], out[f"{where}, best single"] = float(np.mean(each)), min(each)
    out |= {f"{where}, {n}": float(_nll(m.params, rows)) for n, m in found.items()}
  out["accuracy, mean single"] = float(
    np.mean([classification.accuracy(m, clean.test) for m in singles])
  )
  out["accuracy, soup"] = classification.accuracy(found["soup"], clean.test)
  return out


def _marked(split: vision_data.Rows, *, rows: float, columns: float, seed: int) -> vision_data.Rows:
  """Draw bars in the outer rows and in the outer columns that betray the class by their shares."""
  out = vision_data.spurious(split, agreement=rows, seed=seed)
  turned = {**out, "inputs": out["inputs"].swapaxes(1, 2)}
  turned = vision_data.spurious(turned, agreement=columns, seed=seed + 1)
  return {**turned, "inputs": np.ascontiguousarray(turned["inputs"].swapaxes(1, 2))}


def _attack(m: model_lib.Model, rows: vision_data.Rows) -> float:
  triggered = vision_data.triggered(rows, target=TARGET)
  return backdoor.attack_success_rate(m, triggered, rows["labels"], target=TARGET)


def _blank(seed: int) -> model_lib.Model:
  return model_lib.Model(SPEC, models.init(SPEC, jax.random.key(seed)))


def _trained(
  m: model_lib.Model, data: Iterable[Any], steps: int, *, lr: float = 1e-3
) -> model_lib.Model:
  done = loop.fit(m, data, steps=steps, optimizer={"lr": lr}, log_every=steps)
  return model_lib.Model(done.spec, done.params)


def _run(expression: str, m: model_lib.Model, *, seed: int = 0, **given: Any) -> model_lib.Model:
  return drivers.run(registry.parse(expression), m, collect.Materials(**given), seed=seed)


def _nll(params: Any, rows: Mapping[str, Any]) -> jax.Array:
  return models.nll(SPEC, params, dict(rows))


Claims = Mapping[str, tuple[str, str]]  # claim to (what is lower, what is higher)
EXPERIMENTS: Mapping[str, tuple[Callable[[int], Numbers], Claims]] = {
  "bang": (
    bang,
    {
      "the average is better than either model": ("either", "WiSE-FT"),
      "smoothing leaves the model less sure": (
        "confidence of fine-tuned, smoothed",
        "confidence of fine-tuned",
      ),
      "an overconfident expert spoils the average": ("WiSE-FT, logits x10", "WiSE-FT"),
      "smoothed labels make the average better": ("WiSE-FT", "BANG, smoothed"),
      "mixup makes it better": ("WiSE-FT", "BANG, mixed up"),
      "both make it better": ("WiSE-FT", "BANG, both"),
    },
  ),
  "dam": (
    dam,
    {
      "fewer attacks succeed than on task arithmetic": ("attacks on DAM", "attacks on TA 0.5"),
      "than on AdaMerging": ("attacks on DAM", "attacks on AdaMerging"),
      "the penalty is why": ("attacks on DAM", "attacks on DAM, no penalty"),
      "two masks are better than one": ("attacks on DAM", "attacks on DAM, one mask"),
      "it costs less than 3 points of accuracy": ("3 points below TA 0.5", "accuracy of DAM"),
      "fewer succeed than on weaker task arithmetic": ("attacks on DAM", "attacks on TA 0.3"),
    },
  ),
  "sparse_soups": (
    sparse_soups,
    {
      "the soup is better than a single model": ("loss, soup", "loss, mean single"),
      "than the best of them": ("loss, soup", "loss, best single"),
      "than one trained as long as all": ("loss, soup", "loss, one for as long"),
      "and under noise than a single model": (
        "loss under noise, soup",
        "loss under noise, mean single",
      ),
    },
  ),
}


if __name__ == "__main__":
  flags.DEFINE_enum("what", None, sorted(EXPERIMENTS), "Which experiment.")
  flags.DEFINE_integer("seeds", 3, "How many seeds.", lower_bound=1)
  flags.mark_flags_as_required(["what"])
  app.run(main)
