# SPDX-License-Identifier: Apache-2.0
"""Launchers: run a config, sweep it, tabulate the results, and measure speed."""
