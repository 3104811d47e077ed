# SPDX-License-Identifier: Apache-2.0
"""A dry run tells what the real run makes."""

import jax
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model as model_lib
from treesurgeon.run import collect, drivers, dry

SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=16)
MODEL = model_lib.Model(SPEC, models.init(SPEC, jax.random.key(0)))
CHAINS = [
  "compress.quantize.rtn(bits=3, group_size=4)",
  "compress.prune.wanda(pattern='2:4', packed=True)",
  "grow.g_stack(growth=3) + compress.quantize.gptq(bits=4, group_size=8)",
  "merge.ties(density=0.5) + adapt.lora(rank=2)",
  "by_path([('layers/0/.*', compress.quantize.rtn(bits=8)), ('lm_head/.*', adapt.lora(rank=1))])",
]


@pytest.mark.parametrize("expression", CHAINS)
def test_shapes_agree_with_the_real_run(expression):
  transform = registry.parse(expression)
  text = [np.arange(20).reshape(2, 10) % 11]
  real = drivers.run(transform, MODEL, collect.Materials(batches=text, donors=[MODEL]))
  told = dry.dry_run(transform, MODEL)
  assert told.spec == real.spec
  assert told.nbytes() == real.nbytes()
  same = jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), told.params, real.params
  )
  assert all(jax.tree.leaves(same))


def test_finds_mistakes_without_work():
  with pytest.raises(ValueError, match="no address matches"):
    dry.dry_run(registry.parse("compress.quantize.rtn(select='nothing')"), MODEL)
