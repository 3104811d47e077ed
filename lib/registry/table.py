# SPDX-License-Identifier: Apache-2.0
"""The one table of all methods: the families' tables, one after the other, sorted by name."""

from treesurgeon.registry import adapt, compress, edit, entries, grow, merge

TABLE: dict[str, entries.Entry] = {
  **adapt.TABLE,
  **compress.TABLE,
  **edit.TABLE,
  **grow.TABLE,
  **merge.TABLE,
}
