# SPDX-License-Identifier: Apache-2.0
"""mergekit's YAML configurations, carried out tensor by tensor on files as they are."""

from treesurgeon.merge.mergekit.config import Config, order, parse, read
from treesurgeon.merge.mergekit.methods import COMPATS, METHODS
from treesurgeon.merge.mergekit.planner import CONFIG, Plan, open_model, plan

__all__ = [
  "COMPATS",
  "CONFIG",
  "METHODS",
  "Config",
  "Plan",
  "open_model",
  "order",
  "parse",
  "plan",
  "read",
]
