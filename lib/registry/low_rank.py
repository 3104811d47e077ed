# SPDX-License-Identifier: Apache-2.0
"""Methods that factorize. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
}
