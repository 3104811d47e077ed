# SPDX-License-Identifier: Apache-2.0
"""Experiment configurations, one file an experiment."""
