# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts from dense models: mergekit-moe's configurations.

Attention, embeddings and norms are the base's, the MLPs are the experts'. A token goes to the
experts whose router rows its hidden state agrees with most (`moe_gates`). Tensors are streamed;
noise is keyed by a tensor's name. mergekit writes the fused tensors of `transformers` 5; here each
expert has its own, which other engines and earlier versions read too.

Reference: Komatsuzaki et al., "Sparse Upcycling", 2022, arXiv:2212.05055; Goddard et al.,
"Arcee's MergeKit", 2024, arXiv:2403.13257.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import lineage, step
from treesurgeon.io import checkpoint, raw, tokenizer_files, writer
from treesurgeon.io import tokenizer as tokenizers
from treesurgeon.merge import mergekit, moe_config, moe_gates, moe_layouts

_EMBEDDING = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a configuration asks for, ready to be written.

  Attributes:
    layout: the output's architecture.
    config: its config.json.
    base: the base model's tensors.
    experts: the experts' and then the shared experts' tensors.
    spec: the experts as configured, in the same order.
    gates: router rows, [layers, experts and shared experts, dim].
    notes: what the user ought to know.
  """

  layout: moe_layouts.Layout
  config: dict[str, Any]
  base: Any
  experts: tuple[Any, ...]
  spec: tuple[moe_config.Expert, ...]
  gates: np.ndarray
  notes: tuple[str, ...]


def build(
  config: moe_config.Config,
  out: str | pathlib.Path,
  *,
  seed: int = 0,
  overwrite: bool = False,
  max_shard_bytes: int | float = writer.MAX_SHARD_BYTES,
  tell: Callable[[str], None] | None = None,
) -> pathlib.Path:
  """Build a mixture of experts and write it.

  Args:
    config: as `moe_config.read` returns it.
    out: directory to write.
    seed: of random router rows and noise.
    overwrite: replace an existing output when the new one is complete.
    max_shard_bytes: data bytes after which a new file begins.
    tell: takes a sentence on what a reader may not expect.

  Returns:
    The output directory.

  Raises:
    ValueError: for models that do not fit the architecture or each other.
    OSError: if the disk is full.
  """
  made = plan(config, seed=seed)
  for note in made.notes:
    if tell is not None:
      tell(note)
  sources = {"base": made.base, **{f"donor {i}": e for i, e in enumerate(made.experts)}}
  stamps = sorted((role, s.stamp()) for role, s in sources.items())
  document = json.dumps(config.document, sort_keys=True, default=str)
  job = hashlib.sha256(repr(("moe", document, seed, stamps)).encode()).hexdigest()
  tensors = dict(_tensors(made, config.dtype, seed))
  with raw.Sink(
    out, made.config, tensors=len(tensors), companions=_directory(made.base), job=job,
    overwrite=overwrite, max_shard_bytes=max_shard_bytes,
  ) as sink:  # fmt: skip
    for name, make in tensors.items():
      if not sink.done(name):
        sink.write(name, make())
    inputs = {role: s.digest() for role, s in sources.items()}
    record = lineage.Record(
      "merge.moe()", {"document": config.document}, seed=seed, driver="stream", inputs=inputs,
      versions=lineage.versions(),
    )  # fmt: skip
    records = (*getattr(made.base, "lineage", ()), record)
    text = moe_config.text(config)
    return sink.close(records, inputs=inputs, texts={"mergekit_moe_config.yml": text})


def plan(config: moe_config.Config, *, seed: int = 0) -> Plan:
  """Open the models, check that they fit, and find the router rows.

  Args:
    config: the configuration.
    seed: of random router rows.

  Returns:
    The plan.

  Raises:
    ValueError: as `build`.
  """
  opened = {name: mergekit.open_model(name) for name in config.models()}
  settings = {name: _settings(source) for name, source in opened.items()}
  types = {name: str(s.get("model_type")) for name, s in settings.items()}
  layout = moe_layouts.choose(config.architecture, types, len(config.shared_experts))
  base, named = opened[config.base_model], (*config.experts, *config.shared_experts)
  experts = tuple(opened[e.source_model] for e in named)
  layers = int(settings[config.base_model]["num_hidden_layers"])
  moe_layouts.check_biases(layout, base.addresses(), config.base_model)
  for expert, source in zip(named, experts, strict=True):
    _check(base, source, expert.source_model, layers)
  gates, notes = _gates(config, opened, settings[config.base_model], layers, seed)
  window = settings[config.base_model]
  if window.get("sliding_window") and window.get("use_sliding_window", True):
    notes.append("the base attends within a sliding window; the mixture attends to everything")
  if len(config.experts) & (len(config.experts) - 1):
    notes.append(f"{len(config.experts)} experts are no power of two, which llama.cpp asks for")
  out = moe_layouts.config(
    layout, settings[config.base_model], len(config.experts), config.experts_per_token
  )
  return Plan(layout, out, base, experts, named, gates, tuple(notes))


def _tensors(
  made: Plan, dtype: str | None, seed: int
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
  """List the output's tensors and how to make each."""
  layers, count = made.config["num_hidden_layers"], made.gates.shape[1]
  count -= made.layout.shared

  def copied(source: Any, name: str, out: str, expert: moe_config.Expert | None = None) -> Any:
    return lambda: _cast(_changed(np.asarray(source.leaf(name)), name, out, expert, seed), dtype)

  for name in made.base.addresses():
    if ".mlp." not in name:
      yield name, copied(made.base, name, name)
  stored = np.dtype(dtype) if dtype else made.base.struct(_EMBEDDING).dtype
  held = set(made.base.addresses())
  for name, width in moe_layouts.zero_biases(made.layout, made.config, layers).items():
    if name not in held:
      yield name, lambda width=width: np.zeros(width, stored)
  for layer in range(layers):
    gate = made.layout.gate(layer)
    yield gate, lambda layer=layer: made.gates[layer, :count].astype(stored)
    for part in moe_layouts.PARTS:
      name = f"model.layers.{layer}.mlp.{part}.weight"
      for e in range(count):
        out = made.layout.expert(layer, e, part)
        yield out, copied(made.experts[e], name, out, made.spec[e])
      if made.layout.shared:
        out = f"model.layers.{layer}.mlp.shared_expert.{part}.weight"
        yield out, copied(made.experts[count], name, out, made.spec[count])
    if made.layout.shared:
      name = f"model.layers.{layer}.mlp.shared_expert_gate.weight"
      yield name, lambda layer=layer: made.gates[layer, count:].astype(stored)


def _changed(
  x: np.ndarray, name: str, out: str, expert: moe_config.Expert | None, seed: int
) -> np.ndarray:
  """Add an expert's noise, and scale what it writes to the residual stream."""
  if expert is None:
    return x
  wide = x
  if expert.noise_scale is not None:
    noise = jax.random.normal(step.leaf_key(jax.random.key(seed), out), x.shape)
    wide = wide.astype(np.float32) + np.asarray(noise * expert.noise_scale)
  if expert.residual_scale is not None and ".down_proj." in name:
    wide = wide.astype(np.float32) * np.float32(expert.residual_scale)
  return wide if wide is x else wide.astype(x.dtype)


def _gates(
  config: moe_config.Config,
  opened: Mapping[str, Any],
  settings: Mapping[str, Any],
  layers: int,
  seed: int,
) -> tuple[np.ndarray, list[str]]:
  """Find the rows of all routers, [layers, experts, dim]."""
  experts, dim = (*config.experts, *config.shared_experts), int(settings["hidden_size"])
  if "random" in config.gate_mode:
    return moe_gates.draw(jax.random.key(seed), config.gate_mode, (layers, len(experts), dim)), []
  base = opened[config.base_model]
  if hasattr(base, "source") and config.gate_mode != "cheap_embed":
    raise ValueError(
      f"gate_mode={config.gate_mode!r} runs the base model, to which {config.base_model} adds an "
      "adapter: merge them first, or use cheap_embed or random"
    )
  directory = _directory(base)
  words, start = tokenizers.load(directory), tokenizer_files.special(directory, "bos_token")

  def states(prompts: tuple[str, ...]) -> np.ndarray | None:
    if not prompts:
      return None
    ids = [words.encode(start + p) for p in prompts]
    if not all(len(i) for i in ids):
      raise ValueError("a prompt has no tokens: give it some text")
    tokenizers.check_ids(np.concatenate(ids), int(settings["vocab_size"]), "prompts")
    if config.gate_mode == "cheap_embed":
      return np.repeat(moe_gates.cheap(base.leaf(_EMBEDDING), ids), layers, 0)[None]
    average = config.gate_mode == "hidden_avg"
    return moe_gates.hidden(checkpoint.Checkpoint(directory), ids, average=average)

  rows = []
  for expert in experts:
    positive = states(expert.positive_prompts)
    assert positive is not None  # checked when the configuration was read
    rows.append(moe_gates.rows(positive, states(expert.negative_prompts)))
  gates = np.stack(rows, axis=1)
  bad = moe_gates.degenerate(gates[:, : len(config.experts)])
  if not bad:
    return gates, []
  where = "all layers" if len(bad) == layers else f"layers {', '.join(map(str, bad))}"
  return gates, [
    f"the router rows of {where} are nearly dependent: prompts are too alike, and some expert will "
    "hardly be used"
  ]


def _check(base: Any, expert: Any, name: str, layers: int) -> None:
  """Refuse an expert whose MLPs do not fit the base's."""
  for layer in range(layers):
    for part in moe_layouts.PARTS:
      tensor = f"model.layers.{layer}.mlp.{part}.weight"
      want, got = base.struct(tensor).shape, expert.struct(tensor).shape
      if want != got:
        raise ValueError(
          f"{name}: {tensor} has shape {tuple(got)}, the base's {tuple(want)}; experts must be of "
          "the base's size"
        )


def _cast(x: Any, dtype: str | None) -> np.ndarray:
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  return x.astype(dtype) if dtype is not None and floating else x


def _settings(source: Any) -> Mapping[str, Any]:
  return _settings(source.source) if hasattr(source, "source") else source.config


def _directory(source: Any) -> pathlib.Path:
  return _directory(source.source) if hasattr(source, "source") else source.directory
