# SPDX-License-Identifier: Apache-2.0
"""Locate and edit: requests, causal tracing, rank-one edits and the deltas they return."""
