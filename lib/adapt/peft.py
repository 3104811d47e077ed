# SPDX-License-Identifier: Apache-2.0
"""Read and write LoRA adapters in the directory format of Hugging Face `peft`.

A directory holds `adapter_config.json` and `adapter_model.safetensors`, whose tensors are named
`base_model.model.` + module + `.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]: the
transposes of our factors. Every tensor must be accounted for; what is not plain LoRA (DoRA, biases,
trained modules, initializations that changed the base) is refused rather than read as if it were.
"""

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from treesurgeon.adapt import adapters as adapters_lib
from treesurgeon.adapt import peft_modules
from treesurgeon.core import leaves, needs
from treesurgeon.io import header, peft_config, safetensors, staging

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The last name is how a targeted embedding or head repeats its base.
_TENSOR = re.compile(
  r"base_model\.model\.(?P<module>.+)\."
  r"(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|base_layer\.weight)"
)


def load(directory: str | Path, source: needs.Source) -> dict[str, leaves.LowRank]:
  """Read a peft LoRA adapter; `adapters.attach` puts it on the model.

  Plain and rank-stabilized LoRA, rank and alpha patterns, heads, and embeddings of models with a
  separate head. A module that peft sees fused and we do not (GPT-2's c_attn) gives adapters
  that share A.

  Args:
    directory: holds `adapter_config.json` and `adapter_model.safetensors`.
    source: the base model, a `Model` or anything else with `spec`, `addresses` and `leaf`.

  Returns:
    Address to adapter, factors in the dtype of the file.

  Raises:
    ValueError: for another peft method, a tensor that fits nothing in the model, a missing
      factor, or a rank that the config does not give.
  """
  directory = Path(directory)
  config = peft_config.read(directory / CONFIG)
  tensors = safetensors.open_file(directory / WEIGHTS)
  modules = peft_modules.table(source.spec)
  grouped: dict[str, dict[str, np.ndarray]] = {}
  for name in tensors:
    found = _TENSOR.fullmatch(name)
    module = found["module"] if found else ""
    if found is None or module not in modules:
      raise ValueError(_unmatched(directory, name, module, modules))
    part = found["part"].removesuffix(".weight").replace("lora_embedding_", "lora_")
    if part != "base_layer" and ("embedding" in found["part"]) != modules[module].is_embedding:
      raise ValueError(f"{directory}: tensor {name!r} is not named as for the kind of its module")
    grouped.setdefault(module, {})[part] = np.asarray(tensors[name])
  out: dict[str, leaves.LowRank] = {}
  for module, parts in grouped.items():
    where = f"{directory}: module {module!r}"
    for part in ("lora_A", "lora_B"):
      if part not in parts:
        raise ValueError(f"{where} has no {part}; the file must hold both factors")
    if "base_layer" in parts:
      _check_base(where, modules[module], parts["base_layer"], source)
    a, b = parts["lora_A"], parts["lora_B"]
    modules[module].check(where, a, b, config.ranks(module))
    scale = config.scale(module, a.shape[0])
    for address, rows in modules[module].split(b).items():
      out[address] = leaves.LowRank(jnp.asarray(a.T), jnp.asarray(rows.T), scale)
  if not out:
    raise ValueError(f"{directory / WEIGHTS}: the file holds no tensors")
  return out


def save(
  directory: str | Path,
  adapters: adapters_lib.Adapters,
  spec: Any,
  *,
  base_model: str = "",
  rslora: bool = False,
  overwrite: bool = False,
) -> None:
  """Write adapters as a peft directory, which `peft.PeftModel.from_pretrained` loads.

  Values are written as they are. Where the file fuses what we keep apart (GPT-2's q, k and v),
  adapters with one A and one scale are joined as they were; any others are written in block form,
  with the sum of their ranks: the same function, its zeros stored.

  Args:
    directory: output.
    adapters: address to adapter.
    spec: the base model's architecture.
    base_model: where the base model is found, for `base_model_name_or_path`.
    rslora: write alpha for a scale of alpha / sqrt(r).
    overwrite: replace an existing output.

  Raises:
    ValueError: for no adapters, an existing output, an address that files of this family do
      not name, or fused adapters of different scales.
  """
  if not adapters:
    raise ValueError(f"{directory}: there are no adapters to export; put some on with adapt.lora()")
  fused = peft_modules.gather(spec, adapters)
  config = peft_config.build(
    {m: (f.a.shape[0], f.scale) for m, f in fused.items()},
    every=peft_modules.table(spec, bare=False),
    rslora=rslora,
    base_model=base_model,
    conv=any(f.module.is_conv for f in fused.values()),
    decoder=spec.kind == "decoder",
  )
  tensors = {}
  for module in sorted(fused):
    kind = "lora_embedding_{}" if fused[module].module.is_embedding else "lora_{}.weight"
    tensors[f"{PREFIX}{module}.{kind.format('A')}"] = fused[module].a
    tensors[f"{PREFIX}{module}.{kind.format('B')}"] = fused[module].b
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  files = {CONFIG: text.encode(), WEIGHTS: _serialize(tensors)}
  _write(directory, files, overwrite=overwrite)


def _unmatched(
  directory: Path, name: str, module: str, modules: Mapping[str, peft_modules.Module]
) -> str:
  near = difflib.get_close_matches(module or name.removeprefix(PREFIX), modules, n=3, cutoff=0.0)
  hint = f"nearest: {', '.join(near)}"
  if module.endswith(("lm_head", "embed_out")):
    hint = "this model's head is its embedding (tied), which an adapter would change with it"
  return f"{directory}: tensor {name!r} fits no module of the model; {hint}"


def _check_base(
  where: str, module: peft_modules.Module, stored: np.ndarray, source: needs.Source
) -> None:
  """Accept a repeated base weight only if it is the model's own."""
  address = module.addresses[0]
  own = source.leaf(address)
  same = not leaves.is_leaf(own) and len(module.addresses) == 1
  if same:
    own = np.asarray(own).T if module.kind == "transpose" else np.asarray(own)
    same = own.shape == stored.shape and own.dtype == stored.dtype and np.array_equal(own, stored)
  if not same:
    raise ValueError(
      f"{where} brings a base weight {stored.shape} of its own, which is not the model's "
      f"{address}; load the adapter onto the model that it was trained on"
    )


def _serialize(tensors: Mapping[str, np.ndarray]) -> bytes:
  infos, at = {}, 0
  for name, array in tensors.items():
    dtype = header.check_dtype(name, array.dtype)
    infos[name] = header.Info(dtype, array.shape, at, at + array.nbytes)
    at += array.nbytes
  return header.build(infos) + b"".join(np.ascontiguousarray(x).tobytes() for x in tensors.values())


def _write(directory: str | Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
  """Write files to a directory that appears whole or not at all."""
  stage = staging.Staging(directory, overwrite=overwrite)
  try:
    stage.clear()
    with stage.disk():
      for name, content in files.items():
        (stage.path / name).write_bytes(content)
    stage.commit()
  except BaseException:
    stage.abort(keep=False)
    raise
