# SPDX-License-Identifier: Apache-2.0
"""Compress, grow, merge and edit trained networks: pure functions from a model to a model."""

__version__ = "0.1.0"
