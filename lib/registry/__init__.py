# SPDX-License-Identifier: Apache-2.0
"""The table of every method: name, factory, paper, and how it was verified.

Explicit and lazy: a method's module is imported when its name is first used. The ledger
`docs/methods.md`, `treesurgeon list`, the parser and the contract suite all read this table.
"""

from treesurgeon.registry.architectures import ARCHITECTURES
from treesurgeon.registry.entries import Architecture, Entry, Procedure
from treesurgeon.registry.parsing import load, parse, summary
from treesurgeon.registry.procedures import PROCEDURES
from treesurgeon.registry.recipes import RECIPES
from treesurgeon.registry.table import TABLE

__all__ = [
  "ARCHITECTURES",
  "PROCEDURES",
  "RECIPES",
  "TABLE",
  "Architecture",
  "Entry",
  "Procedure",
  "load",
  "parse",
  "summary",
]
