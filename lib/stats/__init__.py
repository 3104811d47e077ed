# SPDX-License-Identifier: Apache-2.0
"""Calibration statistics: commuting folds over a layer's inputs, and over gradients."""

from treesurgeon.stats.fisher import Slope as Slope
from treesurgeon.stats.fisher import add_gradient_blocks as add_gradient_blocks
from treesurgeon.stats.fisher import add_gradients as add_gradients
from treesurgeon.stats.fisher import add_squared_gradients as add_squared_gradients
from treesurgeon.stats.fisher import slope as slope
from treesurgeon.stats.folds import FOLDS as FOLDS
from treesurgeon.stats.folds import SAMPLES as SAMPLES
from treesurgeon.stats.folds import Fold as Fold
from treesurgeon.stats.folds import PerFeature as PerFeature
from treesurgeon.stats.folds import Range as Range
from treesurgeon.stats.folds import Samples as Samples
from treesurgeon.stats.folds import SecondMoment as SecondMoment
