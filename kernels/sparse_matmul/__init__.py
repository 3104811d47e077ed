# SPDX-License-Identifier: Apache-2.0
"""Products with N of every M weights, and with groups of weights."""
