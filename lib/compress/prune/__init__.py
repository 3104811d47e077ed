# SPDX-License-Identifier: Apache-2.0
"""Pruning of weights, one method a file."""
