# SPDX-License-Identifier: Apache-2.0
"""Test what is claimed of merges that train, on byte-level models of tasks with one right answer.

python -P -m treesurgeon.experiments.merge_directions --what=salsa --seeds=3

Cost: one to two CPU minutes a seed. What held is noted in the registry's rows.
"""

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from treesurgeon import models, registry
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import merge_bench
from treesurgeon.models import preferences
from treesurgeon.run import collect, drivers
from treesurgeon.train import loop, tasks

LENGTH, BATCH = 32, 32
SPEC = models.Spec(
  vocab_size=tasks.VOCABULARY,
  d_model=48,
  num_layers=2,
  num_heads=4,
  d_ff=128,
  max_positions=LENGTH,
)
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
    verdict = "reproduced" if min(values) > 0 else "not reproduced" if max(values) < 0 else "mixed"
    print(f"{text}: {'  '.join(f'{v:+.4f}' for v in values)}  {verdict}")


def salsa(seed: int) -> Numbers:
  """Tune a sorter by preferences, held by itself or by a soup of two.

  Args:
    seed: of everything random.

  Returns:
    Share of the test answers' bytes that are right; share of test pairs ranked rightly, which are
    right answers against wrong ones of the policy; how much likelier answers have become (gain) and
    how far they moved (distance), nats an answer.
  """
  named = {t: tasks.build(t, length=LENGTH, items=512, seed=seed) for t in ("sorting", "capitals")}
  base = trained(_blank(seed), named, steps=120, seed=seed)
  only = {"sorting": named["sorting"]}
  first, second = (trained(base, only, steps=60, seed=100 * seed + i) for i in (1, 2))
  learn = pairs(first, named["sorting"].validation, seed)
  held = pairs(first, named["sorting"].test, seed + 50)
  batches = [{k: v[i : i + BATCH] for k, v in learn.items()} for i in range(0, 512, BATCH)]
  given = collect.Materials(batches=batches, donors=[second])
  out: Numbers = {}
  soup = drivers.run(registry.parse("merge.wise_ft(alpha=0.5)"), first, given)
  policies = {"sft": first, "other sft": second, "soup": soup}
  for name, alpha in (("dpo", 0.0), ("salsa", 0.5)):
    one = registry.load("merge.salsa")(alpha=alpha, beta=0.1, steps=64, rate=1e-4)
    policies[name] = drivers.run(one, first, given, seed=seed)
  start = [np.asarray(x) for x in _answers(first.params, held)]
  for name, policy in policies.items():
    rows = named["sorting"].test
    out[f"accuracy of {name}"] = merge_bench.rate(merge_bench.score(policy, rows, exact=False))
    chosen, rejected = (np.asarray(x) for x in _answers(policy.params, held))
    wrong = (held["chosen"] != held["rejected"]).any(axis=1)
    out[f"ranking of {name}"] = float((chosen > rejected)[wrong].mean())
    out[f"gain of {name}"] = float((chosen - start[0]).mean())
    out[f"distance of {name}"] = float(np.abs(chosen - start[0]).mean())
  return out


def sparse_soups(seed: int) -> Numbers:
  """Prune a model of two tasks, and retrain one copy, one for longer, or several to be averaged.

  Args:
    seed: of everything random.

  Returns:
    Mean loss on test answers, in nats a byte.
  """
  named = {t: tasks.build(t, length=LENGTH, items=512, seed=seed) for t in ("sorting", "counting")}
  dense = trained(_blank(seed), named, steps=250, seed=seed)
  shares = {t: (task, 1.0) for t, task in named.items()}
  batches = list(itertools.islice(tasks.batches(shares, batch=BATCH, seed=seed + 9), 100))
  test = {k: np.concatenate([t.test[k] for t in named.values()]) for k in ("tokens", "weights")}

  def loss(order: int, **arguments: Any) -> float:
    mixed = [batches[i] for i in np.random.default_rng([seed, order]).permutation(len(batches))]
    one = registry.load("merge.sparse_model_soups")(sparsity=0.9, rate=2e-3, **arguments)
    made = drivers.run(one, dense, collect.Materials(batches=mixed), seed=seed)
    return float(_nll(made.params, test))

  alone = [loss(i, copies=1, steps=60) for i in range(3)]
  return {
    "dense": float(_nll(dense.params, test)),
    "pruned": loss(0, steps=0),
    "mean copy": float(np.mean(alone)),
    "best copy": min(alone),
    "one copy for as long": loss(0, copies=1, steps=180),
    "soup": loss(0, copies=3, steps=60),
    "soup of three rounds": loss(0, copies=3, steps=20, rounds=3),
    "three rounds of one copy": loss(0, copies=1, steps=20, rounds=3),
  }


def trained(
  m: model_lib.Model, named: Mapping[str, tasks.Task], *, steps: int, seed: int
) -> model_lib.Model:
  """Train a model on tasks in equal shares.

  Args:
    m: where to start.
    named: the tasks.
    steps: of training.
    seed: of the batches.

  Returns:
    The trained model.
  """
  data = tasks.batches({t: (task, 1.0) for t, task in named.items()}, batch=BATCH, seed=seed)
  done = loop.fit(m, data, steps=steps, optimizer={"lr": 3e-3, "warmup": 20}, log_every=steps)
  return model_lib.Model(done.spec, done.params)


def pairs(policy: model_lib.Model, rows: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
  """Set right answers against those that a policy samples; where these are right both are equal.

  Args:
    policy: who answers.
    rows: "tokens" and "weights" of a question and its answer in each row, questions of one length.
    seed: of the samples.

  Returns:
    A batch of pairs, see `models.preferences`.
  """
  first, stop = (int(f(np.flatnonzero(rows["weights"][0]))) + 1 for f in (np.min, np.max))
  prompts, count = rows["tokens"][:, :first], stop - first  # the line's end is not sampled
  said = models.generate(
    policy.spec, policy.params, prompts, max_new_tokens=count, temperature=1.0,
    key=jax.random.key(seed),
  )  # fmt: skip
  worse = rows["tokens"].copy()
  worse[:, :stop] = said
  sides = {"chosen": rows["tokens"], "rejected": worse}
  return {**sides, **{f"{side}_weights": rows["weights"] for side in sides}}


def _blank(seed: int) -> model_lib.Model:
  return model_lib.Model(SPEC, models.init(SPEC, jax.random.key(seed)))


_answers = jax.jit(functools.partial(preferences.pair_log_probs, SPEC))
_nll = jax.jit(functools.partial(models.nll, SPEC))

Claims = Mapping[str, tuple[str, str]]  # claim to (what is lower, what is higher)
EXPERIMENTS: Mapping[str, tuple[Callable[[int], Numbers], Claims]] = {
  "salsa": (
    salsa,
    {
      "the soup is better than the model tuned": ("accuracy of sft", "accuracy of soup"),
      "preferences help": ("accuracy of sft", "accuracy of dpo"),
      "the soup as reference helps more": ("accuracy of dpo", "accuracy of salsa"),
      "pairs are ranked better with it": ("ranking of dpo", "ranking of salsa"),
      "it lets the policy go further": ("distance of dpo", "distance of salsa"),
    },
  ),
  "sparse_soups": (
    sparse_soups,
    {
      "the soup is better than its mean copy": ("soup", "mean copy"),
      "than its best copy": ("soup", "best copy"),
      "than one copy trained as long as all": ("soup", "one copy for as long"),
      "rounds of soups are better than rounds of one copy": (
        "soup of three rounds",
        "three rounds of one copy",
      ),
    },
  ),
}


if __name__ == "__main__":
  flags.DEFINE_enum("what", None, sorted(EXPERIMENTS), "Which experiment.")
  flags.DEFINE_integer("seeds", 3, "How many seeds.", lower_bound=1)
  flags.mark_flags_as_required(["what"])
  app.run(main)
