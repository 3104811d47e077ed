# SPDX-License-Identifier: Apache-2.0
"""The `treesurgeon` command: one file a subcommand."""
