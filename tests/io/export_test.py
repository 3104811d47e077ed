# SPDX-License-Identifier: Apache-2.0
"""What transformers cannot load is refused before anything is written."""

import jax
import numpy as np
import pytest

from treesurgeon import io, models, registry
from treesurgeon.core import model as model_lib
from treesurgeon.io import export
from treesurgeon.run import drivers


def _model(**settings):
  spec = models.Spec(**{"vocab_size": 7, "d_model": 8, "num_layers": 2, "num_heads": 2, "d_ff": 16}
                     | settings)  # fmt: skip
  return model_lib.Model(spec, models.init(spec, jax.random.key(0)))


def test_compressed_leaves_are_written_dense(tmp_path):
  packed = drivers.run(registry.parse("compress.quantize.rtn()"), _model(family="llama"))
  out = io.load(export.to_hf(packed, tmp_path / "out"))
  address = "layers/1/mlp/up/kernel"
  np.testing.assert_array_equal(out.leaf(address), packed.leaf(address).dense())
  assert out.lineage == packed.lineage


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"family": "treesurgeon"}, "belongs to no family"),
    ({"family": "llama", "d_ff": (16, 8)}, "config of 'llama' cannot express d_ff"),
  ],
)
def test_refuses_what_transformers_cannot_load(tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    export.to_hf(_model(**settings), tmp_path / "out")
  assert not (tmp_path / "out").exists()
