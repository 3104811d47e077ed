# SPDX-License-Identifier: Apache-2.0
"""Training of a small model on what a large one says, one method a file."""
