# SPDX-License-Identifier: Apache-2.0
"""Make a model forget, one method a file."""
