# SPDX-License-Identifier: Apache-2.0
"""Factors in the place of matrices, or beside compressed ones; one method a file."""
