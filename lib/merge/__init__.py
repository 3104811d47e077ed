# SPDX-License-Identifier: Apache-2.0
"""Combine models of one architecture into one, one method a file."""
