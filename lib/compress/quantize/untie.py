# SPDX-License-Identifier: Apache-2.0
"""Give a tied head a kernel of its own, so that it can be quantized and the embedding stay.

A tied network reads its logits off with the transposed embedding (Press and Wolf, "Using the output
embedding to improve language models", 2017, arXiv 1608.05859). One table then serves two uses, and
has no kernel that a quantizer could take; after this it has, of the same function and larger.
"""

import dataclasses

import jax
import jax.numpy as jnp

from treesurgeon import models
from treesurgeon.core import leaves, needs, step
from treesurgeon.core import model as model_lib


@step.method("compress.quantize.untie")
def untie() -> step.Step:
  """Copy the embedding into a head of its own.

  Returns:
    The transform. An untied network is left as it is.

  Raises:
    ValueError: when applied to a network that reads no tokens.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8, tied=True)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> (one,) = untie()
    >>> apart = one.apply(m, {}, jax.random.key(0))
    >>> apart.spec.tied, apart.leaf("lm_head/kernel").shape
    (False, (4, 5))

  Reference:
    Press and Wolf, Using the output embedding to improve language models, 2017, arXiv:1608.05859.
  """
  return step.Step({}, _apply, "model", {}, lambda names: [tuple(names)])


def _apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
  del evidence, key
  if not isinstance(m.spec, models.Spec):
    raise ValueError(f"a {type(m.spec).__name__} has no token embedding; valid: a models.Spec")
  if not m.spec.tied:
    return m
  table = leaves.dense(m.params["embed"]["tokens"]["embedding"])
  head = {**m.params.get("lm_head", {}), "kernel": jnp.swapaxes(table, 0, 1)}
  spec = dataclasses.replace(m.spec, tied=False)
  return m.replace(spec=spec, params={**m.params, "lm_head": head})
