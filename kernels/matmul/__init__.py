# SPDX-License-Identifier: Apache-2.0
"""Product of activations with a dense or compressed kernel matrix."""
