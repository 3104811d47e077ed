# SPDX-License-Identifier: Apache-2.0
"""Layer swapping: which leaf comes from whom, to the bit, however the model is walked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import model, paths
from treesurgeon.merge import layer_swap
from treesurgeon.run import collect, drivers

SPEC = models.Spec(vocab_size=11, d_model=4, num_layers=8, num_heads=2, d_ff=6)


def draw(seed, spec=SPEC):
  shapes = jax.eval_shape(lambda: models.init(spec, jax.random.key(0)))
  rng = np.random.default_rng(seed)
  make = lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
  return model.Model(spec, jax.tree.map(make, shapes))


TASK, LANGUAGE = draw(0), draw(1)
MATERIALS = collect.Materials(donors=[LANGUAGE])


def origins(out):
  """Tells of each layer and of the rest: whose it is, to the bit."""
  found = {}
  for address in out.addresses():
    x, a, b = (np.asarray(m.leaf(address)) for m in (out, TASK, LANGUAGE))
    whose = "task" if (x == a).all() else "language" if (x == b).all() else "mean"
    if whose == "mean":
      np.testing.assert_allclose(x, (a + b) / 2, rtol=0, atol=1e-6)
    part = address.split("/")
    found.setdefault(int(part[1]) if part[0] == "layers" else part[0], set()).add(whose)
  assert all(len(x) == 1 for x in found.values())
  return {k: next(iter(x)) for k, x in found.items()}


def test_the_layers_come_from_whom_they_should():
  found = origins(
    drivers.run(layer_swap.layer_swap(bottom=2, top=1, transition=(2, 1)), TASK, MATERIALS)
  )
  assert [found[i] for i in range(8)] == [
    "language", "language", "mean", "mean", "task", "task", "mean", "language"
  ]  # fmt: skip
  rest = {k: x for k, x in found.items() if isinstance(k, str)}
  assert set(rest) >= {"embed", "final_norm"}
  assert set(rest.values()) == {"language"}


@pytest.mark.parametrize(
  ("bottom", "top", "ends", "embed", "head"),
  [
    (3, 0, True, "language", "task"),
    (0, 3, True, "task", "language"),
    (3, 3, False, "task", "task"),
    (0, 0, True, "task", "task"),
  ],
)
def test_the_ends_go_with_the_layers_they_touch(bottom, top, ends, embed, head):
  transform = layer_swap.layer_swap(bottom=bottom, top=top, ends=ends)
  found = origins(drivers.run(transform, TASK, MATERIALS))
  assert (found["embed"], found["final_norm"]) == (embed, head)
  if not bottom:
    assert found[0] == "task"


def test_a_stream_gives_the_same():
  transform = layer_swap.layer_swap(bottom=2, top=2, transition=1, weight=0.3)

  class Memory(dict):
    def done(self, address):
      return address in self

    write = dict.__setitem__

  sink = Memory()
  drivers.stream(transform, TASK, sink, MATERIALS)
  whole = drivers.run(transform, TASK, MATERIALS)
  for address in whole.addresses():
    assert (np.asarray(sink[address]) == np.asarray(whole.leaf(address))).all(), address


def test_without_a_spec_the_layers_are_counted():
  bare = TASK.replace(spec=None)
  transform = layer_swap.layer_swap(bottom=1, top=1)
  out = drivers.run(transform, bare, collect.Materials(donors=[LANGUAGE.replace(spec=None)]))
  assert origins(out) == origins(drivers.run(transform, TASK, MATERIALS))


def test_a_selection_narrows_it():
  transform = layer_swap.layer_swap(bottom=8, top=0, transition=0, select="layers/.*/mlp/.*")
  out = drivers.run(transform, TASK, MATERIALS)
  flat, task, language = (paths.flatten(m.params) for m in (out, TASK, LANGUAGE))
  for address, leaf in flat.items():
    origin = language if "/mlp/" in address else task
    assert (np.asarray(leaf) == np.asarray(origin[address])).all(), address


def test_mistakes_are_named():
  with pytest.raises(ValueError, match=r"bottom=5, top=4 .* are 9 layers; the model has 8"):
    drivers.run(layer_swap.layer_swap(bottom=5, top=4, transition=0), TASK, MATERIALS)
  with pytest.raises(ValueError, match="must not be negative"):
    layer_swap.layer_swap(bottom=-1)
  with pytest.raises(ValueError, match="exactly 1 donor, the language expert; got 2"):
    drivers.run(
      layer_swap.layer_swap(bottom=1, top=1), TASK, collect.Materials(donors=[LANGUAGE, LANGUAGE])
    )
  part = model.Part(None, {"layers/0/w": jnp.ones(2)})
  (one,) = layer_swap.layer_swap()
  with pytest.raises(ValueError, match="give a spec"):
    one.apply(part, {"donors": {"layers/0/w": (jnp.ones(2),)}}, jax.random.key(0))
  deeper = dataclasses.replace(SPEC, num_layers=9)
  with pytest.raises(ValueError, match="merged models must have the same leaves"):
    drivers.run(layer_swap.layer_swap(), TASK, collect.Materials(donors=[draw(2, deeper)]))
