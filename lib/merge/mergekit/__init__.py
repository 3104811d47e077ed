# SPDX-License-Identifier: Apache-2.0
"""mergekit's YAML configurations, carried out tensor by tensor on files as they are."""

from treesurgeon.merge.mergekit.config import Config, parse
from treesurgeon.merge.mergekit.documents import order, read
from treesurgeon.merge.mergekit.methods import COMPATS, METHODS
from treesurgeon.merge.mergekit.opening import digest, open_model, stamp
from treesurgeon.merge.mergekit.planner import CONFIG, Plan, plan

__all__ = [
  "COMPATS",
  "CONFIG",
  "METHODS",
  "Config",
  "Plan",
  "digest",
  "open_model",
  "order",
  "parse",
  "plan",
  "read",
  "stamp",
]
