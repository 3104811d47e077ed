# SPDX-License-Identifier: Apache-2.0
"""Products that look partial sums of the activations up."""
