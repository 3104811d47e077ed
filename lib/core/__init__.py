# SPDX-License-Identifier: Apache-2.0
"""Addresses, leaves, models, steps and lineage: what every other part is written in."""
