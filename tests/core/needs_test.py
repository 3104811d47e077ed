# SPDX-License-Identifier: Apache-2.0
from treesurgeon.core import needs


class Counting:
  """A source that counts what is read."""

  def __init__(self, name, log):
    self.name, self.log, self.spec = name, log, None

  def addresses(self):
    return ["a", "b"]

  def leaf(self, address):
    self.log.append((self.name, address))
    return self.name + address

  def struct(self, address):
    raise AssertionError(address)


def test_a_tuple_reads_all_and_lazy_leaves_read_when_indexed():
  log = []
  sources = [Counting(name, log) for name in "xyz"]
  assert needs.Aligned(sources)["a"] == ("xa", "ya", "za")
  assert len(log) == 3
  leaves = needs.Aligned(sources, lazy=True)["b"]
  assert len(leaves) == 3 and len(log) == 3
  assert leaves[1] == "yb" and leaves[-1] == "zb" and log[3:] == [("y", "b"), ("z", "b")]
  assert list(leaves[1:]) == ["yb", "zb"]
  assert list(leaves) == ["xb", "yb", "zb"]
