# SPDX-License-Identifier: Apache-2.0
"""Calibration statistics: commuting folds over a layer's inputs, and Fisher information."""

from treesurgeon.stats.fisher import add_squared_gradients as add_squared_gradients
from treesurgeon.stats.folds import FOLDS as FOLDS
from treesurgeon.stats.folds import SAMPLES as SAMPLES
from treesurgeon.stats.folds import Fold as Fold
from treesurgeon.stats.folds import PerFeature as PerFeature
from treesurgeon.stats.folds import Range as Range
from treesurgeon.stats.folds import Samples as Samples
from treesurgeon.stats.folds import SecondMoment as SecondMoment
