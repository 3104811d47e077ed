# SPDX-License-Identifier: Apache-2.0
"""Drivers that gather evidence and apply transforms: whole, block by block, or streaming."""

from treesurgeon.run.collect import Materials as Materials
from treesurgeon.run.drivers import run as run
from treesurgeon.run.drivers import run_blockwise as run_blockwise
from treesurgeon.run.drivers import stream as stream
from treesurgeon.run.drivers import streamable as streamable
