# SPDX-License-Identifier: Apache-2.0
"""Make models smaller: quantize, prune, factorize, distill."""
