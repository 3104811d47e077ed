# SPDX-License-Identifier: Apache-2.0
"""Apply transforms to a model directory and write the result to another.

  treesurgeon apply --model=DIR --out=DIR --transform='compress.quantize.rtn(bits=4)'
  treesurgeon apply --model=DIR --out=DIR --config=configs/x.py[:variant] [--config.key=value]

Steps that work leaf by leaf are streamed, in memory bounded by the largest leaf; steps that work
block by block too, in memory bounded by the largest block and --activation_budget; others load the
model. An interrupted run leaves the output untouched, and a rerun goes on where a streamed one was.

Statistics of inputs are taken with the blocks before changed already (--driver=blockwise, what
GPTQ and its kin get by default), or all at once on the unchanged model (--driver=run).
"""

import dataclasses
import functools
import hashlib
import pathlib
import shutil
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from treesurgeon import models, registry
from treesurgeon.cli import inspect, main
from treesurgeon.core import lineage, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.edit import requests
from treesurgeon.io import (
  chat_templates,
  checkpoint,
  export,
  layouts,
  loading,
  staging,
  tokenizer_files,
)
from treesurgeon.io import sink as checkpoint_sink
from treesurgeon.io import tokenizer as tokenizers
from treesurgeon.run import activations, budget, calibration, casting, collect, drivers, dry

DRIVERS = ("auto", "run", "blockwise", "stream")


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the command's flags.

  Args:
    values: where to define them.
    argv: the command's arguments, which config overrides are read from.
  """
  define_transform(values, argv)
  flags.DEFINE_enum(
    "format", None, layouts.NAMES,
    "Write the result as another tool's quantized checkpoint; what it cannot hold is refused.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_string(
    "budget", None,
    "Size of the weights, such as 2.6GB: the quantizer of --transform (default: gptq if there is "
    "calibration, else rtn) takes for each kernel the width and group size that lose least.",
    flag_values=values,
  )  # fmt: skip


def define_transform(values: flags.FlagValues, argv: list[str]) -> None:
  """Define the flags of every command that applies a transform.

  Args:
    values: where to define them.
    argv: the command's arguments, which config overrides are read from.
  """
  define_output(values)
  flags.DEFINE_string("model", None, "Model directory to read.", flag_values=values)
  flags.DEFINE_multi_string(
    "transform", [], "Transform in its one-line spelling; repeat to chain.", flag_values=values
  )
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Config whose `transform` (one spelling or a list) is applied.",
    flag_values=values,
    lock_config=True,
    sys_argv=["treesurgeon", *argv],
  )
  flags.DEFINE_multi_string(
    "calibration", [],
    "Calibration data: UTF-8 text, JSON lines (.jsonl), or token ids (.npy, .npz); repeat to give "
    "one to each donor, or several to a transform that takes several.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_string(
    "calibration_field", None,
    "Field of JSON lines that holds the text, or messages; default: `text`, or `messages`.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_enum(
    "calibration_rows", "pack", calibration.ROWS,
    "Join documents and cut them into sequences of one length, or give each a row of its own with "
    "a mask over the padding.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_string(
    "activation_budget", "4GB",
    "Hidden states kept in memory, such as 2GB; beyond it they lie in a file beside --out.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer("samples", 128, "Calibration sequences.", 1, flag_values=values)
  flags.DEFINE_integer(
    "length", None, "Tokens a calibration sequence; default: the context, at most 2048.", 1,
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer("batch", 8, "Calibration sequences at a time.", 1, flag_values=values)
  flags.DEFINE_bool(
    "dry_run", False, "Print the tree that would come out; read and write no weight.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_enum("driver", "auto", DRIVERS, "How to go through the model.", flag_values=values)


def define_output(values: flags.FlagValues) -> None:
  """Define the flags of every command that writes a model.

  Args:
    values: where to define them.
  """
  flags.DEFINE_string("out", None, "Directory to write; must not exist.", flag_values=values)
  flags.DEFINE_bool("overwrite", False, "Replace --out if it exists.", flag_values=values)
  flags.DEFINE_integer("seed", 0, "Seed of everything random.", flag_values=values)
  flags.DEFINE_integer(
    "max_shard_bytes", 5_000_000_000, "Largest file to write.", 1, flag_values=values
  )


def run(values: flags.FlagValues, args: list[str]) -> None:
  """Read, transform, write.

  Args:
    values: parsed flags.
    args: positional arguments; none are taken.
  """
  if args:
    raise ValueError(f"apply takes no positional argument, not {args[0]!r}; use --model=DIR")
  main.required(values, "model", "out")
  staging.check_output(values.out, values.overwrite)
  transform = read_transform(values)
  source = checkpoint.Checkpoint(values.model)
  if values.format is not None:  # not only after all the work
    export.check_family(source.spec, values.out)
  if values.budget is not None:
    materials = bring(values, source, transform)
    transform = fit(values, transform, source, materials)
  if values.driver == "stream":
    for one in transform:
      drivers.refuse_unstreamable(one)
  for one in transform:
    drivers.units(one, source)
    if one.scope == "model":
      break  # it may change the addresses
  if values.dry_run:
    shapes = paths.unflatten({a: source.struct(a) for a in source.addresses()})
    inspect.show(dry.dry_run(transform, model_lib.Model(source.spec, shapes)).params)
    return
  if values.budget is None:
    materials = bring(values, source, transform)
  if values.format is None:
    execute(values, transform, source, materials, driver=values.driver)
    return
  # First our way, beside the output, where a rerun finds what a killed run had finished.
  packed = f"{values.out.rstrip('/')}.packed"
  out, overwrite, values.out, values.overwrite = values.out, values.overwrite, packed, True
  execute(values, transform, source, materials, driver=values.driver)
  source = checkpoint.Checkpoint(packed)
  report = export.to_layout(
    source, out, layout=values.format, max_shard_bytes=values.max_shard_bytes,
    overwrite=overwrite, tokenizer_from=values.model, records=source.lineage,
  )  # fmt: skip
  shutil.rmtree(packed)
  print(report)


def execute(
  values: flags.FlagValues,
  transform: step.Transform,
  source: checkpoint.Checkpoint,
  materials: collect.Materials,
  *,
  driver: str = "auto",
  dtype: str | None = None,
  out_dtype: str | None = None,
) -> None:
  """Apply a transform with the driver that suits it and write the result.

  Args:
    values: parsed flags; those of `define_output` are read.
    transform: what to do.
    source: the base model.
    materials: calibration, donors, requests.
    driver: one of `DRIVERS`.
    dtype: dtype the base is cast to first.
    out_dtype: dtype the result is cast to.
  """
  staging.check_output(values.out, values.overwrite)
  for one in transform:
    collect.require(one, materials)
  recipe = {k: v for k, v in (("dtype", dtype), ("out_dtype", out_dtype)) if v is not None}
  materials = dataclasses.replace(materials, recipe={**materials.recipe, **recipe})
  if driver == "auto":
    blockwise = any(s.scope == "block" for s in transform)
    driver = "blockwise" if blockwise else "run"
    driver = "stream" if drivers.streamable(transform) else driver
  limits = {"overwrite": values.overwrite, "max_shard_bytes": values.max_shard_bytes}
  by_block = driver == "blockwise" and out_dtype is None  # what is written must be what ran
  by_block = by_block and drivers.block_streamable(transform, source)
  if driver == "stream" or by_block:
    inputs = materials.inputs if by_block else materials.digests
    job = (step.spell(transform), values.seed, dtype, out_dtype, sorted(inputs.items()))
    job += (driver, jax.device_count()) if by_block else ()
    fingerprint = hashlib.sha256(repr(job).encode()).hexdigest()
    with checkpoint_sink.Sink(
      values.out, source.spec, companions=source.directory, job=fingerprint, **limits
    ) as sink:
      base = casting.Cast(source, dtype)
      target = sink if by_block else casting.CastSink(sink, out_dtype)
      go = drivers.stream_blocks if by_block else drivers.stream
      records = go(transform, base, target, materials, seed=values.seed)
      sink.close((*source.lineage, *records), inputs=materials.digests)
  else:
    go = drivers.run if driver == "run" else drivers.run_blockwise
    model = loading.load(source.directory)
    if dtype is not None:
      model = model.update({a: casting.cast(model.leaf(a), dtype) for a in model.addresses()})
    model = go(transform, model, materials, seed=values.seed)
    checkpoint_sink.save(
      model,
      values.out,
      tokenizer_from=source.directory,
      dtype=out_dtype,
      inputs=materials.digests,
      **limits,
    )
  print(f"wrote {values.out}")


def fit(
  values: flags.FlagValues,
  transform: step.Transform,
  source: checkpoint.Checkpoint,
  materials: collect.Materials,
) -> step.Transform:
  """Choose a width and a group size for every kernel, so that the weights fit --budget.

  Args:
    values: parsed flags.
    transform: the quantizer; what it says of width and group size is not used.
    source: the base model.
    materials: calibration, if there is any.

  Returns:
    A `by_path` over the quantizer.

  Raises:
    ValueError: for a budget that cannot be read or met, or a transform that is no quantizer.
  """
  limit = budget.read_bytes(values.budget)
  if values.dry_run:
    raise ValueError("--budget measures the weights, which --dry_run does not read; give one")
  given = [one.info.get("arguments", {}) for one in transform]
  if len(given) != 1 or not {"bits", "group_size"} <= given[0].keys():
    raise ValueError(
      f"--budget chooses `bits` and `group_size` of one quantizer; {step.spell(transform)} is none"
    )
  build = functools.partial(registry.load(transform[0].info["name"]), **transform[0].info["given"])
  spare = checkpoint_sink.header_bytes(source.spec, limit, values.max_shard_bytes)
  model = loading.load(source.directory) if values.calibration else None
  chosen = budget.plan(
    budget.configurations(build), source, materials, limit, spare=spare, model=model,
    seed=values.seed,
  )  # fmt: skip
  print(step.spell(chosen))
  return chosen


def read_transform(values: flags.FlagValues) -> step.Transform:
  """Read the transform that flags and config spell.

  Args:
    values: parsed flags.

  Returns:
    The transform.

  Raises:
    ValueError: if there is none, or it cannot be read.
  """
  spelled = list(values.transform)
  if values.config is not None:
    wanted = values.config.get("transform")
    if not wanted:
      raise ValueError("--config: the config has no `transform`")
    spelled += [wanted] if isinstance(wanted, str) else list(wanted)
  if not spelled and values.budget is not None:
    spelled = [f"compress.quantize.{'gptq' if values.calibration else 'rtn'}()"]
  if not spelled:
    raise ValueError("--transform or --config is required; `treesurgeon list` shows transforms")
  return step.chain(*(registry.parse(s) for s in spelled))


def bring(
  values: flags.FlagValues, source: checkpoint.Checkpoint, transform: step.Transform
) -> collect.Materials:
  """Read what a transform needs: calibration text, donors, requests.

  Args:
    values: parsed flags.
    source: the base model.
    transform: what will be applied.

  Returns:
    The materials.

  Raises:
    ValueError: for texts that are too short, or of another number than the donors.
  """
  named, room = [need for one in transform for need in one.needs.values()], _room(values)
  donors = [n for need in named if isinstance(need, needs.Donors) for n in need.models]
  texts, recipe, digests = list(values.calibration), {}, {}
  sets = any(getattr(need, "of", None) == "sets" for need in named)
  if len(texts) > 1 and len(texts) != len(donors) and not sets:
    raise ValueError(
      f"--calibration is given {len(texts)} times; the transform names {len(donors)} donors: give "
      "one text for all, or one for each donor"
    )
  length = values.length or min(getattr(source.spec, "max_positions", None) or 2048, 2048)
  if texts and isinstance(source.spec, models.VisionSpec):
    raise ValueError(f"--calibration is text, and {values.model} is an image classifier")
  if texts:
    recipe = {"samples": values.samples, "length": length, "batch": values.batch}
    if values.calibration_rows != "pack":
      recipe["rows"] = values.calibration_rows
  cut = []
  for i, path in enumerate(texts):
    try:
      held = calibration.read(path, field=values.calibration_field, render=_render(source))
    except ValueError as error:
      raise ValueError(f"--calibration={error}") from error
    cut.append(
      calibration.batches(
        held,
        tokenizers.load(values.model),
        **recipe,
        vocab_size=getattr(source.spec, "vocab_size", 0),
        source=f"--calibration={path}",
      )
    )
    role = f"calibration {i}" if sets else f"calibration of donor {i}"
    role = "calibration" if len(texts) == 1 else role
    digests[role] = lineage.digest(path)
  digests |= {f"donor {i}": checkpoint.Checkpoint(n).digest() for i, n in enumerate(donors)}
  files = [need.path for need in named if isinstance(need, needs.Requests) and need.path]
  for i, path in enumerate(files):
    main.read_text("requests", path)
    digests[f"requests {i}"] = lineage.digest(path)
  return collect.Materials(
    batches=[b for batches in cut for b in batches],
    donor_batches=cut if len(cut) > 1 else (),
    open_model=checkpoint.Checkpoint,
    read_requests=functools.partial(_requests, directory=values.model),
    digests={"base": source.digest(), **digests},
    recipe=recipe,
    room=room,
  )


def _room(values: flags.FlagValues) -> activations.Room:
  """Return where calibration takes place: all devices, and files beside the output."""
  try:
    limit = budget.read_bytes(values.activation_budget)
  except ValueError as error:
    raise ValueError(f"--activation_budget: {error}") from error
  mesh = None
  if jax.device_count() > 1:
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=types)
  return activations.Room(limit, str(pathlib.Path(values.out).absolute().parent), mesh)


def _render(source: checkpoint.Checkpoint) -> calibration.Render | None:
  """Return what writes conversations out, if the model's directory has a chat template."""
  template = tokenizer_files.template(source.directory)
  if template is None:
    return None
  roles = ("bos_token", "eos_token")
  tokens = {role: tokenizer_files.special(source.directory, role) for role in roles}
  return lambda messages: chat_templates.render(template, messages, **tokens)


def _requests(path: str, directory: str) -> list[Any]:
  return requests.read(path, tokenizers.load(directory))
