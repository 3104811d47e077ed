# SPDX-License-Identifier: Apache-2.0
"""The training loop: `fit` takes a model and batches and returns the trained model.

The step is compiled once, ahead of time, hence cannot recompile. Runs are compared by
floating-point operations: every record carries the count, and a run can stop at a budget of them.
A run that is killed and started again with the same arguments continues from its last checkpoint
and reports the same losses, to the bit on the same machine.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.train import checkpoints, feed, flops, metrics, objectives, optimizers, partition
from treesurgeon.train import progress as progress_lib
from treesurgeon.train import step as step_lib


def fit(
  model: model_lib.Model,
  data: Iterable[Any],
  *,
  steps: int | None = None,
  max_flops: float | int | None = None,
  optimizer: Mapping[str, Any] | optimizers.Optimizer | None = None,
  objective: objectives.Objective | None = None,
  select: str = ".*",
  types: tuple[str, ...] | None = None,
  accumulate: int = 1,
  seed: int = 0,
  carry: bool = False,
  workdir: str | Path | None = None,
  checkpoint_every: int = 0,
  log_every: int = 10,
  evaluate: Callable[[model_lib.Model], Mapping[str, float]] | None = None,
  evaluate_every: int = 0,
  flops_before: float = 0.0,
  sharding: jax.sharding.Sharding | None = None,
  label: str = "train",
) -> model_lib.Model:
  """Train a model.

  Args:
    model: where to start; its arrays are not modified.
    data: batches, tokens (batch, length + 1) or a tree of arrays with "tokens", or "inputs" and
      "labels", as the objective wants it. `data.batches` resumes by state; of any other iterable
      a resumed run skips what was used, so it must begin anew each time.
    steps: optimizer steps, also the length of the schedule; None takes what `max_flops` allows.
    max_flops: stop before these operations are exceeded (`flops.train_flops`), `flops_before`
      included. The schedule's clock is steps, whichever limit ends the run.
    optimizer: settings of `optimizers.build`, or its result.
    objective: what to minimise, by default `objectives.next_token()`, of an image classifier
      `objectives.classification()`; it holds the compute
      dtype, while master weights are float32 and return in the storage dtype.
    select: addresses that train, a regular expression; the rest stays bit-identical.
    types: kinds of leaf that train, see `partition.trainable`; ("LowRank",) trains adapters.
    accumulate: microbatches a batch is cut into, to save memory.
    seed: of the objective's randomness.
    carry: continue from the moments in `model.aux["optimizer"]`, which must fit.
    workdir: for checkpoints, `metrics.jsonl` and TensorBoard; a run found there is continued.
    checkpoint_every: steps between checkpoints; 0 keeps only the last step.
    log_every: steps between records.
    evaluate: returns figures of a model, recorded under their names.
    evaluate_every: steps between evaluations, with one at the end; 0 is never.
    flops_before: operations spent before, so that several stages share one clock.
    sharding: of a batch over devices; by default every device of the parameters' mesh sees all of
      it.
    label: beside the progress bar, on the first process and only on a terminal.

  Returns:
    The model with trained parameters and, in `aux`, "optimizer" (the optax state of the
    arrays that train) and "flops".

  Raises:
    ValueError: for arguments out of range, ids outside the vocabulary, data that ends early or
      changes shape, a work directory of another run, or a loss that is not finite, naming the step.

  Example:
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> start = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> out = fit(start, [np.ones((2, 4), np.int32)] * 3, steps=3, optimizer={"lr": 0.01})
    >>> sorted(out.aux)
    ['flops', 'optimizer']
  """
  if steps is None and max_flops is None:
    raise ValueError("fit needs a length: give steps, max_flops, or both")
  for name, value in (("steps", steps), ("log_every", log_every)):
    if value is not None and value < 1:
      raise ValueError(f"{name}={value} must be at least 1")
  source = feed.Feed(data, vocab_size=_classes(model.spec))
  per_step = flops.train_flops(model.spec, source.tokens, source.length)
  last = _last_step(steps, max_flops, flops_before, per_step)
  given = None if isinstance(optimizer, optimizers.Optimizer) else dict(optimizer or {})
  if not isinstance(optimizer, optimizers.Optimizer):
    optimizer = optimizers.build(**{"steps": steps or last, **(optimizer or {})})
  mask = partition.trainable(model.params, select, types=types)
  train, frozen = partition.split(model.params, mask)
  state = step_lib.init(train, optimizer.direction)
  if carry:
    state = step_lib.place(state._replace(optimizer=_carried(model, state.optimizer)))
  saver = checkpoints.Checkpoints(workdir)
  found = saver.latest()
  settings = {"seed": seed, "optimizer": given}
  if found:
    _check_settings(saver.meta(found)["settings"], settings, workdir)
    state = saver.restore(found, state)
    source.resume(found, saver.meta(found).get("data"))
  first = found or 0
  run = step_lib.build(
    model.spec,
    objective=objective or objectives.default(model.spec),
    optimizer=optimizer,
    mask=mask,
    accumulate=accumulate,
    seed=seed,
  )
  put = _placer(sharding, model.params)
  writer = metrics.Writer(workdir, step=first)

  def trained(state: step_lib.State) -> model_lib.Model:
    # Copies where no cast makes one: the next step reuses the state's memory.
    part = jax.tree.map(lambda x, old: jax.numpy.array(x, old.dtype, copy=True), state.train, train)
    params = partition.join(part, frozen, mask)
    return model.replace(params=params)

  try:
    with progress_lib.bar(label, total=max(last, first), done=first) as show:
      log = metrics.Log(
        writer, show, per_step=per_step, tokens=source.tokens, flops_before=flops_before
      )
      batch = put(next(source)) if first < last else None
      if batch is not None:
        run, seconds = _compile(run, state, frozen, batch)
        writer.write({"step": first, "compile_seconds": round(seconds, 3)})
      log.start(first)
      for i in range(first + 1, last + 1):
        state, figures = run(state, frozen, batch)
        batch = put(next(source)) if i < last else None
        log.add(figures)
        save = i == last or (checkpoint_every and i % checkpoint_every == 0)
        look = evaluate_every and (i == last or i % evaluate_every == 0)
        if save or look or i % log_every == 0:
          log.check(i)
        if i % log_every == 0 or i == last:
          log.record(i)
        if look and evaluate is not None:
          with log.pause():
            writer.write({"step": i, **evaluate(trained(state))})
        if save and workdir is not None:
          with log.pause():
            saver.save(i, state, {"data": source.state(i), "settings": settings})
  finally:
    saver.close()
    writer.close()
  done = max(last, first)
  spent = flops_before + done * per_step
  return trained(state).replace(aux={**model.aux, "optimizer": state.optimizer, "flops": spent})


def _compile(run: Callable, state: Any, frozen: Any, batch: Any) -> tuple[Callable, float]:
  """Compile ahead of time: shapes cannot change later, and its time is not a step's."""
  began = time.perf_counter()
  placed = jax.tree.map(lambda x: x.sharding, state)
  jitted = jax.jit(run, donate_argnums=0, out_shardings=(placed, None))
  return jitted.lower(state, frozen, batch).compile(), time.perf_counter() - began


def _classes(spec: Any) -> int:
  return spec.num_classes if isinstance(spec, models.VisionSpec) else spec.vocab_size


def _last_step(
  steps: int | None, max_flops: float | int | None, before: float, per_step: float
) -> int:
  if max_flops is None:
    assert steps is not None
    return steps
  allowed = int((max_flops - before) // per_step)
  if allowed < 1:
    raise ValueError(
      f"max_flops={max_flops:.3g} does not pay for one step of {per_step:.3g} operations"
      + (f" after flops_before={before:.3g}" if before else "")
    )
  return allowed if steps is None else min(steps, allowed)


def _check_settings(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: Any) -> None:
  if saved != json.loads(json.dumps(wanted)):
    raise ValueError(
      f"{where} holds a run of other settings, {saved}; these are {dict(wanted)}. Give an empty "
      "work directory, or the same settings to continue"
    )


def _carried(model: model_lib.Model, like: Any) -> Any:
  state = model.aux.get("optimizer")
  if state is None:
    raise ValueError("carry=True needs moments, but model.aux has no 'optimizer'")
  if not optimizers.moments(state, like):
    raise ValueError(
      "carry=True, but model.aux['optimizer'] does not fit the parameters that train: it is of "
      "another optimizer, selection or shape; transform it with the model, or carry=False"
    )
  return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), state)


def _placer(sharding: Any, params: Any) -> Callable[[Any], Any]:
  mesh = step_lib.mesh_of(params)
  if sharding is None and mesh is not None:
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  if sharding is None:
    return lambda batch: jax.tree.map(jax.numpy.asarray, batch)
  return lambda batch: jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
  )
