# SPDX-License-Identifier: Apache-2.0
"""Grow trained models, parameters and optimizer state alike, one operator a file."""
