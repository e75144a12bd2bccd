# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation: quantisers with their straight-through gradients, and the layers that use them."""

from common.quant.calibrated import CALIBRATED_METHODS, CalibratedQuantizer
from common.quant.discrete import (
    KBITS,
    TERNARY_BITS,
    StochasticBinary,
    binary,
    kbit,
    kbit_relu,
    stochastic_binary,
    ternary,
)
from common.quant.folding import fold_normalization
from common.quant.integer import Grid, activation_grid, weight_codes, weight_grid
from common.quant.layers import (
    MixedActivation,
    MixedQuantConv2d,
    QuantConv2d,
    QuantLinear,
    frozen_ranges,
    mix,
    mix_levels,
    mix_weights,
    step_parameters,
)
from common.quant.quantizers import (
    ACTIVATION_QUANTIZERS,
    FLOAT_BITS,
    GAUSSIAN_STEP,
    HWGQ_STEP,
    LOW_BITS,
    SCHEMES,
    SUPPORTED_BITS,
    WEIGHT_QUANTIZERS,
    ActivationQuantizer,
    LsqQuantizer,
    LsqWeightQuantizer,
    RunningMaximum,
    WeightQuantizer,
    check_bits,
    lsq,
    quantize_activation,
    quantize_weight,
    straight_through,
)
from common.quant.shared import Reduction, share_first_steps, share_ranges

__all__ = [name for name in dir() if not name.startswith("_")]
