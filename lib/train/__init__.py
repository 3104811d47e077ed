# SPDX-License-Identifier: Apache-2.0
"""Training: data, objectives, optimizers and the one loop that every experiment uses."""
