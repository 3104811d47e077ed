# SPDX-License-Identifier: Apache-2.0
"""Methods that grow: deeper or wider networks from trained ones. Sorted by name."""

from treesurgeon.registry import entries

TABLE: dict[str, entries.Entry] = {
  "grow.g_stack": entries.Entry(
    factory="treesurgeon.grow.g_stack:g_stack",
    paper="Du et al., Stacking your transformers, 2024, arXiv 2405.15319",
    oracle="tests/grow/g_stack_test.py",
    verdict="reproduced",
    command=entries.DIRECTIONS,
    note="beats scratch, never growing and interpolation at equal FLOPs in three seeds, growth 2; "
    "does not preserve the function; optimizer moments are gathered along",
  ),
  "grow.interpolate": entries.Entry(
    factory="treesurgeon.grow.interpolate:interpolate",
    paper="Du et al., Stacking your transformers, 2024, arXiv 2405.15319",
    oracle="tests/grow/g_stack_test.py",
    verdict="reproduced",
    command=entries.DIRECTIONS,
    note="the variant the paper finds worse than stacking, and so it is here",
  ),
}
