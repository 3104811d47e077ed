# SPDX-License-Identifier: Apache-2.0
"""Fast Walsh-Hadamard transform of activations."""
