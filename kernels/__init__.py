# SPDX-License-Identifier: Apache-2.0
"""Matrix products and attention over dense and compressed arrays, one folder an operation."""
