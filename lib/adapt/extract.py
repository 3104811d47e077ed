# SPDX-License-Identifier: Apache-2.0
"""Extract a LoRA adapter from a fine-tune: the best low-rank change of every linear weight.

`W_tuned - W_base`, taken in float32, is cut off after its largest singular values, which gives the
closest matrix of that rank (Eckart and Young, 1936); the square root of each goes to A and to B, as
in mergekit's `mergekit-extract-lora`. The scale is one: alpha equals the rank. Linear weights are
all matrices but embeddings and heads. What no adapter can hold (those, norms, biases) is saved in
full, as mergekit does, but only where it changed, and a weight that did not change gets no adapter.
Tensors are read, decomposed and written one at a time.
"""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from treesurgeon.core import needs, paths
from treesurgeon.io import peft_config, remapped, writer
from treesurgeon.io.with_lora import CONFIG, WEIGHTS

_PREFIX = "base_model.model."
_EMBEDDING = re.compile(r"(.*\.)?(wpe|wte|\w*embed\w*)")
# Modules that keep their weights as (in, out), by model type.
_CONV = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn")}
_RENAMED = {"embed_out": "lm_head"}  # files keep the name of earlier versions


class Extracted(NamedTuple):
  """What an extraction wrote.

  Attributes:
    ranks: module to rank.
    errors: module to the relative Frobenius norm of what was cut off.
    saved: modules that were saved in full.
    biases: modules whose bias alone was.
    left: modules that changed but were excluded.
  """

  ranks: dict[str, int]
  errors: dict[str, float]
  saved: list[str]
  biases: list[str]
  left: list[str]


@functools.partial(jax.jit, static_argnames="rank")
def decompose(
  tuned: Float[Array, "out inner"], base: Float[Array, "out inner"], *, rank: int
) -> tuple[Float[Array, "r inner"], Float[Array, "out r"], Float[Array, " n"]]:
  """Find the factors of the best rank-r approximation of a change.

  Args:
    tuned: the weight after training.
    base: the weight before.
    rank: r, at most the smaller side.

  Returns:
    (A, B, all singular values), float32; B A approximates `tuned - base`, and the factors share
    the singular values evenly.

  Example:
    >>> a, b, s = decompose(jnp.diag(jnp.array([3.0, 1.0])), jnp.zeros((2, 2)), rank=1)
    >>> (b @ a).round(4).tolist(), s.round(4).tolist()
    ([[3.0, 0.0], [0.0, 0.0]], [3.0, 1.0])
  """
  delta = tuned.astype(jnp.float32) - base.astype(jnp.float32)
  u, s, vt = jnp.linalg.svd(delta, full_matrices=False)
  root = jnp.sqrt(s[:rank])
  return root[:, None] * vt[:rank], u[:, :rank] * root[None, :], s


def extract(
  base: needs.Source,
  tuned: needs.Source,
  directory: str | Path,
  *,
  max_rank: int = 32,
  include: Sequence[str] = (),
  exclude: Sequence[str] = (),
  save_modules: Sequence[str] = (),
  epsilon: float = 0.0,
  dtype: str | None = None,
  base_model: str = "",
  model_type: str = "",
  overwrite: bool = False,
) -> Extracted:
  """Write the difference of two models as a peft adapter.

  Args:
    base: the model before training, by the tensor names of its files.
    tuned: the model after.
    directory: the adapter's, which must not exist unless `overwrite`.
    max_rank: largest rank of a module.
    include: regular expressions, searched for in module names; of linear weights and norms only
      what one matches is extracted. Empty takes all.
    exclude: what one of these matches stays as in the base.
    save_modules: names, or last parts of names, of modules to save in full.
    epsilon: singular values up to this are cut off too.
    dtype: of the factors; None takes the fine-tune's.
    base_model: where the base is found, for the adapter's config.
    model_type: of the base's config.json; tells of weights that lie the other way (GPT-2).
    overwrite: replace an existing output.

  Returns:
    What was written.

  Raises:
    ValueError: for models that differ in their tensors or shapes, a change that an adapter cannot
      hold, no linear weight that changed, or an expression that matches nothing.
  """
  if isinstance(max_rank, bool) or max_rank < 1:
    raise ValueError(f"max_rank={max_rank!r} must be an integer of 1 or more, such as 32")
  if not epsilon >= 0:
    raise ValueError(f"epsilon={epsilon!r} must be a number of 0 or more")
  modules = _modules(base, tuned)
  kinds = _kinds(modules, tuned, include, exclude, save_modules)
  conv = _CONV.get(model_type, ())
  done = Extracted({}, {}, [], [], [])
  room = 4096 + 400 * len(tuned.addresses())
  with writer.Writer(
    directory, overwrite=overwrite, max_shard_bytes=1 << 62, single=WEIGHTS, header_bytes=room
  ) as out:
    for module, parts in modules.items():
      changed = [p for p, name in parts.items() if _changed(base, tuned, name)]
      if not changed:
        continue
      if kinds[module] == "left":
        done.left.append(module)
        continue
      if "" in parts:
        raise ValueError(
          f"{module} changed, which peft can neither adapt nor save; leave it as in the base with "
          f"exclude={re.escape(module)!r}"
        )
      if kinds[module] == "whole":
        done.saved.append(_RENAMED.get(module, module))
        for part, name in parts.items():
          out.write(f"{_PREFIX}{done.saved[-1]}.{part}", np.asarray(tuned.leaf(name)))
        continue
      if "weight" in changed:
        w, w0 = (np.asarray(m.leaf(parts["weight"])) for m in (tuned, base))
        flip = module.rpartition(".")[2] in conv
        a, b, error = _factors(*((w.T, w0.T) if flip else (w, w0)), max_rank, epsilon)
        done.ranks[module], done.errors[module] = len(a), error
        for part, x in (("A", a), ("B", b)):
          name = f"{_PREFIX}{module}.lora_{part}.weight"
          out.write(name, np.ascontiguousarray(x).astype(dtype or w.dtype))
      if "bias" in changed:
        done.biases.append(module)
        inner = ".base_layer" if module in done.ranks else ""
        name = f"{_PREFIX}{module}{inner}.bias"
        out.write(name, np.asarray(tuned.leaf(parts["bias"])))
    if not done.ranks:
      what = ", ".join([*done.saved, *done.biases, *done.left][:5]) or "nothing"
      raise ValueError(f"no linear weight to extract changed; what changed is {what}")
    _tie(out, done, tuned)
    config = _config(done, modules, base_model, conv=bool(conv))
    out.stage.text(CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
  return done


def _factors(
  w: np.ndarray, w0: np.ndarray, max_rank: int, epsilon: float
) -> tuple[np.ndarray, np.ndarray, float]:
  a, b, s = map(
    np.asarray, decompose(jnp.asarray(w), jnp.asarray(w0), rank=min(max_rank, *w.shape))
  )
  rank = max(1, int(np.sum(s[: len(a)] > epsilon)))
  return a[:rank], b[:, :rank], float(np.linalg.norm(s[rank:]) / np.linalg.norm(s))


def _modules(base: needs.Source, tuned: needs.Source) -> dict[str, dict[str, str]]:
  """Group tensors by module: path to part ("weight", "bias", ...) to name."""
  names, olds = dict.fromkeys(tuned.addresses()), dict.fromkeys(base.addresses())
  for some, others, lacking in ((names, olds, "base"), (olds, names, "fine-tune")):
    absent = [n for n in some if n not in others]
    if absent:
      raise ValueError(
        f"the {lacking} lacks the tensor {absent[0]!r} ({len(absent)} in all; nearest: "
        f"{paths.nearest(absent[0], list(others))}); both must be one architecture"
      )
  found: dict[str, dict[str, str]] = {}
  for name in names:
    module, _, part = name.rpartition(".")
    whole = part in ("weight", "bias") and module
    found.setdefault(module if whole else name, {})[part if whole else ""] = name
    a, b = (tuple(m.struct(name).shape) for m in (base, tuned))
    if a != b and not (remapped.is_vocabulary(name) and a[1:] == b[1:]):
      raise ValueError(f"{name}: the base has shape {a}, the fine-tune {b}; both must be equal")
  return found


def _kinds(
  modules: dict[str, dict[str, str]],
  tuned: needs.Source,
  include: Sequence[str],
  exclude: Sequence[str],
  save: Sequence[str],
) -> dict[str, Literal["linear", "whole", "left"]]:
  """Say what becomes of each module that changed."""
  for what, patterns in (("include", include), ("exclude", exclude)):
    for pattern in patterns:
      try:
        used = any(re.search(pattern, m) for m in modules)
      except re.error as error:
        raise ValueError(f"{what}={pattern!r} is no regular expression: {error}") from error
      if not used:
        raise ValueError(f"{what}={pattern!r} matches no module, such as {next(iter(modules))!r}")
  for name in save:
    if not any(name in (m, m.rpartition(".")[2]) for m in modules):
      raise ValueError(f"save_modules: no module {name!r}; nearest: {paths.nearest(name, modules)}")
  kinds: dict[str, Literal["linear", "whole", "left"]] = {}
  for module, parts in modules.items():
    embedding = _EMBEDDING.fullmatch(module) or any(map(remapped.is_vocabulary, parts.values()))
    if module in save or module.rpartition(".")[2] in save:
      kinds[module] = "whole"
    elif any(re.search(p, module) for p in exclude):
      kinds[module] = "left"
    elif include and not embedding and not any(re.search(p, module) for p in include):
      kinds[module] = "left"
    else:
      matrix = "weight" in parts and len(tuned.struct(parts["weight"]).shape) == 2
      kinds[module] = "linear" if matrix and not embedding else "whole"
  return kinds


def _changed(base: needs.Source, tuned: needs.Source, name: str) -> bool:
  return not np.array_equal(np.asarray(tuned.leaf(name)), np.asarray(base.leaf(name)))


def _tie(out: writer.Writer, done: Extracted, tuned: needs.Source) -> None:
  """Save a tied head along with its embedding: peft unties what it wraps."""
  names = set(tuned.addresses())
  tied = [n for n in ("model.embed_tokens", "transformer.wte") if n in done.saved]
  if tied and not names & {"lm_head.weight", "embed_out.weight"}:
    out.write(f"{_PREFIX}lm_head.weight", np.asarray(tuned.leaf(f"{tied[0]}.weight")))
    done.saved.append("lm_head")


def _config(
  done: Extracted, modules: dict[str, dict[str, str]], base_model: str, *, conv: bool
) -> dict[str, Any]:
  every = [_RENAMED.get(m, m) for m in modules]
  saved = set(done.saved)
  short = {m.rpartition(".")[2] for m in saved}
  short = {s for s in short if all(m in saved for m in every if m.endswith(s))}
  full = {m for m in saved if m.rpartition(".")[2] not in short}
  built = peft_config.build(
    {m: (rank, 1.0) for m, rank in done.ranks.items()},
    every=every, rslora=False, base_model=base_model, conv=conv, decoder=True,
  )  # fmt: skip
  more = {"bias": "all" if done.biases else "none", "modules_to_save": sorted(short | full) or None}
  return built | more
