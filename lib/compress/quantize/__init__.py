# SPDX-License-Identifier: Apache-2.0
"""Quantization of weights to a few bits, one method a file."""
