# SPDX-License-Identifier: Apache-2.0
"""The one table of all methods: the families' tables, one after the other, sorted by name."""

from treesurgeon.registry import (
  adapt,
  distill,
  edit,
  entries,
  grow,
  low_rank,
  merge,
  prune,
  quantize,
)

TABLE: dict[str, entries.Entry] = {
  **adapt.TABLE,
  **distill.TABLE,
  **low_rank.TABLE,
  **prune.TABLE,
  **quantize.TABLE,
  **edit.TABLE,
  **grow.TABLE,
  **merge.TABLE,
}
