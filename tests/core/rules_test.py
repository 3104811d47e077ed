# SPDX-License-Identifier: Apache-2.0
import pathlib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import lifting, literals, model, needs, step

KEY = jax.random.key(0)
NAMES = [f"layers/{i}/{m}/kernel" for i in range(3) for m in ("attn/q", "attn/k", "mlp/up")]


def make(names=NAMES):
  layers = {}
  for n in names:
    a, b = n.split("/")[2:4]
    layers.setdefault(a, {})[b] = {"kernel": jnp.ones((3, 8, 4))}
  return model.Model(None, {"layers": {"0:3": layers}})


def double(w):
  return 2 * w


def noise(w, key):
  return w + jax.random.normal(key, w.shape)


def add_up(w):
  return {role: sum(w.values()) for role in w}


@step.method("test.twice")
def twice(
  *, select: str | None = None, times: int = 1, by: float = 2.0, of: Sequence[str] = ()
) -> step.Step:
  """Double kernels."""
  del times, by, of
  return lifting.over_leaves(double, hyper={}, select=select)


@step.method("test.noisy")
def noisy(*, select: str | None = None) -> step.Step:
  """Add noise."""
  return lifting.over_leaves(noise, hyper={}, select=select, random=True)


@step.method("test.together")
def together() -> step.Step:
  """Add q and k."""
  groups = r"(?P<group>layers/\d+/attn)/(?P<role>q|k)/kernel"
  return lifting.over_groups(add_up, groups=groups, hyper={})


def value(m, address):
  return float(m.leaf(address)[0, 0])


def test_arguments_are_plain_and_checked():
  (one,) = twice(times=np.int64(3), by=np.float32(0.5), of=[pathlib.Path("a")])
  assert repr(one) == "test.twice(times=3, by=0.5, of=('a',))"
  assert repr(twice(by=2.0)[0]) == "test.twice()"
  assert repr(twice(by=2)[0]) == "test.twice(by=2)"
  with pytest.raises(ValueError, match="test.twice: times='3' must be int"):
    twice(times="3")
  with pytest.raises(ValueError, match=r"test.twice: of='ab' must be Sequence\[str\]"):
    twice(of="ab")
  with pytest.raises(ValueError, match="test.twice: times=True must be int"):
    twice(times=True)
  with pytest.raises(ValueError, match="test.twice has no argument 'tims'; it takes select, times"):
    twice(tims=1)


@pytest.mark.parametrize("x", [None, True, 3, -0.5, float("inf"), "it's", (), (1,), ((1, 2), "a")])
def test_literals_are_read_back(x):
  assert eval(literals.write(x), {}) == x
  with pytest.raises(ValueError, match="is not a number, a string"):
    literals.write(object())
  with pytest.raises(ValueError, match="nan is not a number"):
    literals.write(float("nan"))


def test_a_selection_without_a_match_is_told_in_the_users_words():
  (one,) = twice(select="layers/7/mlp/up/kernel")
  with pytest.raises(ValueError, match=r"matches 'layers/7/mlp/up/kernel'; nearest: layers/\d/mlp"):
    one.units(NAMES)


def test_by_path_takes_the_first_rule_that_matches():
  rules = [("layers/0/.*", twice()), ("layers/[01]/mlp/.*", twice() + twice())]
  (one,) = step.by_path(rules)
  out = one.apply(make(), {}, KEY)
  assert value(out, "layers/0/mlp/up/kernel") == 2
  assert value(out, "layers/1/mlp/up/kernel") == 4
  assert value(out, "layers/1/attn/q/kernel") == 1
  assert value(out, "layers/2/mlp/up/kernel") == 1
  assert {u[0] for u in one.units(NAMES)} == {*NAMES[:3], "layers/1/mlp/up/kernel"}


def test_by_path_nests():
  inner = step.by_path([("layers/0/.*", twice()), (".*", twice() + twice())])
  (one,) = step.by_path([(".*/mlp/.*", inner)])
  out = one.apply(make(), {}, KEY)
  assert value(out, "layers/0/mlp/up/kernel") == 2
  assert value(out, "layers/2/mlp/up/kernel") == 4
  assert value(out, "layers/0/attn/q/kernel") == 1
  spelled = "by_path([('a', by_path([('b', compress.quantize.rtn())]))])"
  assert step.spell(registry.parse(spelled)) == spelled


def test_by_path_says_what_is_wrong():
  with pytest.raises(ValueError, match="by_path needs at least one"):
    step.by_path([])
  with pytest.raises(ValueError, match=r"by_path: '\(' is not a regular expression"):
    step.by_path([("(", twice())])
  (one,) = step.by_path([("layers/.*", twice()), ("layers/1/.*", twice())])
  with pytest.raises(
    ValueError, match=r"no address matches 'layers/1/.\*' that test.twice\(\) can"
  ):
    one.units(NAMES)


def test_by_path_draws_the_same_whole_and_in_parts():
  (one,) = step.by_path([("layers/0/.*", noisy()), (".*", noisy() + noisy())])
  m = make()
  whole = one.apply(m, {}, KEY)
  for address in reversed(NAMES):
    part = one.apply(model.Part(None, {address: m.leaf(address)}), {}, KEY)
    np.testing.assert_array_equal(part.leaf(address), whole.leaf(address))
  drawn = {np.asarray(whole.leaf(a)).tobytes() for a in NAMES}
  assert len(drawn) == len(NAMES)


def test_groups_change_together_and_are_not_torn():
  (one,) = together()
  out = one.apply(make(), {}, KEY)
  assert value(out, "layers/1/attn/k/kernel") == 2
  (aimed,) = step.by_path([("layers/2/.*", together())])
  out = aimed.apply(make(), {}, KEY)
  assert value(out, "layers/2/attn/q/kernel") == 2
  assert value(out, "layers/1/attn/q/kernel") == 1
  (torn,) = step.by_path([(".*/q/kernel", together())])
  with pytest.raises(
    ValueError, match="tears a group apart; these change together: layers/0/attn/k"
  ):
    torn.apply(make(), {}, KEY)


def test_groups_check_their_donors():
  pattern = r"(?P<group>x)/(?P<role>a)"
  one = lifting.over_groups(
    lambda w, donors: w, groups=pattern, hyper={}, wants={"donors": needs.Donors()}
  )
  m = model.Model(None, {"x": {"a": jnp.ones(3)}})
  with pytest.raises(ValueError, match=re.escape("x/a: donor 0 has shape (2,), the base has (3,)")):
    one.apply(m, {"donors": {"x/a": (jnp.ones(2),)}}, KEY)


def test_the_key_depends_on_the_address_alone():
  a, b = (step.leaf_key(KEY, n) for n in NAMES[:2])
  assert not bool(a == b)
