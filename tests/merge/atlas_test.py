# SPDX-License-Identifier: Apache-2.0
"""aTLAS: planted coefficients are found again, and the coefficients alone are enough."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from treesurgeon import models, registry
from treesurgeon.core import descend, model, needs
from treesurgeon.merge import atlas, mixed_models, mixture
from treesurgeon.run import collect, drivers

SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=8)
TEXT = [np.random.default_rng(5).integers(0, 11, (8, 8))]
OUTPUTS = "layers/./(attn/o|mlp/down)/kernel|lm_head/kernel"


def near(base, seed, size=0.3):
  rng = np.random.default_rng(seed)
  return base.replace(
    params=jax.tree.map(
      lambda x: (x + size * rng.standard_normal(x.shape)).astype(x.dtype), base.params
    )
  )


BASE = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
DONORS = [near(BASE, 1), near(BASE, 2)]
GIVEN = collect.Materials(batches=TEXT, donors=DONORS)


def imitate(plan, coefficients, batch, key, parts):
  """Squared distance of the merged network's predictions to given ones."""
  del key
  tokens, wanted = batch
  params = mixture.network(plan, parts, coefficients)
  return jnp.mean((models.forward(plan.spec, params, tokens).logits - wanted) ** 2)


ADAM = optax.adam(0.05)


@pytest.mark.parametrize("blocks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_planted_coefficients_are_recovered(blocks):
  base = near(BASE, 0, 0.5)  # whose activations are not small
  donors = needs.Aligned([near(base, 1), near(base, 2)])
  plan, parts = mixed_models.gather(base, donors, OUTPUTS, granularity="tensor", blocks=blocks)
  rng = np.random.default_rng(3)
  blank = mixture.start(plan, 2, 0.0)
  planted = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.2, 1, x.shape), jnp.float32), blank)
  assert sum(x.size for x in jax.tree.leaves(planted)) == 2 * 5 * blocks
  tokens = jnp.asarray(np.random.default_rng(4).integers(0, 11, (16, 8)))
  params = mixture.network(plan, parts, planted)
  wanted = models.forward(SPEC, params, tokens).logits
  found, losses = descend.minimize(
    imitate, blank, [(tokens, wanted)], parts, optimizer=ADAM, steps=250, spec=plan
  )
  assert losses[-1] < 1e-4 * losses[0]
  for name in planted:
    np.testing.assert_allclose(found[name], planted[name], atol=0.05, err_msg=name)


def test_blocks_divide_every_tensor():
  plan, parts = mixed_models.gather(
    BASE, needs.Aligned(DONORS), ".*", granularity="tensor", blocks=3
  )
  ones = mixture.start(plan, 2, 1.0)
  done = mixed_models.put(BASE, plan, parts, ones)
  whole = mixed_models.gather(BASE, needs.Aligned(DONORS), ".*", granularity="tensor")
  want = mixed_models.put(BASE, *whole, mixture.start(whole[0], 2, 1.0))
  for a in BASE.addresses():
    np.testing.assert_allclose(done.leaf(a), want.leaf(a), atol=1e-6)
  # One block alone moves about a third of the entries, others in each layer.
  one = jax.tree.map(lambda x: x.at[..., 1:].set(0.0), ones)
  moved = mixed_models.put(BASE, plan, parts, one)
  masks = [
    np.asarray(moved.leaf(a) != BASE.leaf(a)) for a in (f"layers/{i}/mlp/up/kernel" for i in (0, 1))
  ]
  assert all(0.15 < m.mean() < 0.55 for m in masks)
  assert (masks[0] != masks[1]).any()


@pytest.mark.parametrize(
  "more", [{}, {"objective": "entropy"}, pytest.param({"blocks": 2}, marks=pytest.mark.slow)]
)
def test_the_loss_falls_and_the_file_does_it_again(tmp_path, more):
  done = drivers.run(atlas.atlas(steps=25, rate=0.05, **more), BASE, GIVEN)
  note = done.lineage[0].notes
  assert note["last_loss"] < note["first_loss"]
  blocks = more.get("blocks", 1)
  assert note["trainable"] == 2 * len(BASE.addresses()) * blocks
  path = tmp_path / "c.json"
  assert atlas.export(done, path, blocks=blocks) == note["trainable"]
  assert path.stat().st_size < 40_000
  (again,) = registry.parse(f"merge.atlas(coefficients='{path}')")
  assert set(again.needs) == {"donors"}
  twin = again.apply(BASE, {"donors": needs.Aligned(DONORS)}, jax.random.key(0))
  for a in BASE.addresses():
    np.testing.assert_array_equal(twin.leaf(a), done.leaf(a), err_msg=a)


def test_what_is_not_selected_stays():
  done = drivers.run(atlas.atlas(steps=3, select="layers/1/.*"), BASE, GIVEN)
  assert set(done.aux["coefficients"]) == {a for a in BASE.addresses() if "layers/1/" in a}
  for a in BASE.addresses():
    same = np.array_equal(done.leaf(a), BASE.leaf(a))
    assert same == ("layers/1/" not in a), a


def test_mistakes_are_named(tmp_path):
  for text, message in (
    ("objective='mse'", "objective='mse'; valid: nll, entropy"),
    ("blocks=2, granularity='task'", "more need granularity='tensor'"),
    ("clip=0.0", "clip=0.0 must be above 0"),
    ("coefficients='nowhere.json'", "coefficients='nowhere.json' cannot be read"),
  ):
    with pytest.raises(ValueError, match=message):
      registry.parse(f"merge.atlas({text})")
  path = tmp_path / "c.json"
  path.write_text("{}")
  with pytest.raises(ValueError, match="is no file that atlas.export wrote"):
    atlas.atlas(coefficients=str(path))
  with pytest.raises(ValueError, match="the model holds no coefficients"):
    atlas.export(BASE, path)
  for held, message in (
    ({"layers/9/w": [1.0, 1.0]}, "layers/9/w: the file of coefficients names it"),
    ({"final_norm/scale": [1.0]}, r"final_norm/scale: the file holds .* \(1,\), 2 donors take"),
  ):
    path.write_text(json.dumps({"format": "atlas", "blocks": 1, "coefficients": held}))
    with pytest.raises(ValueError, match=message):
      drivers.run(atlas.atlas(coefficients=str(path)), BASE, GIVEN)
