# SPDX-License-Identifier: Apache-2.0
"""Write a model so that other tools load it: every leaf dense, nothing of ours in the config."""

from pathlib import Path
from typing import Any

from treesurgeon.core import leaves, model
from treesurgeon.io import sink
from treesurgeon.models import hf


def to_hf(m: model.Model, directory: str | Path, **saving: Any) -> Path:
  """Write a Hugging Face directory that `transformers` loads.

  Args:
    m: the model; compressed leaves are written dense.
    directory: the output.
    **saving: passed on to `sink.save`: overwrite, max_shard_bytes, tokenizer_from, dtype, inputs,
      evaluation.

  Returns:
    The directory.

  Raises:
    ValueError: if no family of `transformers` can express the architecture; what stands in the
      way is named. `sink.save` writes such a model for this library.
  """
  ours, odd = m.spec.family == "treesurgeon", hf.unsupported(m.spec)
  if ours or odd:
    why = "it belongs to no family; build its Spec with family='llama' or another"
    if not ours:
      why = f"the config of {m.spec.family!r} cannot express {', '.join(odd)}"
    raise ValueError(f"{directory}: transformers cannot load this architecture: {why}")
  dense = m.replace(params=leaves.map_leaves(leaves.dense, m.params))
  return sink.save(dense, directory, **saving)
