# SPDX-License-Identifier: Apache-2.0
"""--match-bitops: the largest number of initial channels at which a low-bit network costs no more than a share of a
full-precision one, so that accuracies are compared at equal cost rather than at equal size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from common.cost import architecture_cost
from common.engine.cli import Config
from common.nets import Architecture, load_architecture


def match_channels(
    config: Config, architecture: Architecture, build: dict[str, Any], image_size: int
) -> dict[str, Any]:
    """Find the channels, and what led to them, as JSON values.

    The budget is the cost of `config.match_reference`'s cells in full precision, at the channels and cells of `build`
    (keyword arguments of `build_network`), over `config.match_bitops`. Both costs are BitOps of one image in quantised
    layers alone. Raises ValueError for an unknown reference, and when even one channel costs more.
    """
    try:
        reference = load_architecture(config.match_reference).with_uniform_bits(32, 32)
    except (ValueError, OSError) as error:
        raise ValueError(f"--match-reference: {error}") from error
    whole = architecture_cost(reference, image_size, **build).bitops_quantized
    budget = whole / config.match_bitops

    @cache
    def cost_at(channels: int) -> int:
        return architecture_cost(architecture, image_size, **{**build, "init_channels": channels}).bitops_quantized

    channels = largest(cost_at, budget, start=build["init_channels"])
    if channels is None:
        raise ValueError(
            f"--match-bitops {config.match_bitops:g}: {config.match_reference} at {build['init_channels']} channels "
            f"costs {whole / 1e9:.4g} G BitOps in full precision, which leaves {budget / 1e9:.4g} G; this network "
            f"needs {cost_at(1) / 1e9:.4g} G at a single channel. Give a smaller factor, or fewer bits"
        )
    return {
        "factor": config.match_bitops,
        "reference": config.match_reference,
        "reference_channels": build["init_channels"],
        "reference_bitops": whole,
        "channels": channels,
        "bitops": cost_at(channels),
    }


def largest(cost_at: Callable[[int], float], budget: float, *, start: int) -> int | None:
    """The largest whole number from 1 on whose cost is within the budget; None where 1 is not. The cost must rise."""
    channels = start
    for _ in range(3):  # the cost grows about as the square: a few evaluations in place of a search
        channels = max(1, int(channels * math.sqrt(budget / cost_at(channels))))
    while cost_at(channels + 1) <= budget:
        channels += 1
    while channels and cost_at(channels) > budget:
        channels -= 1
    return channels or None


def matching_text(found: dict[str, Any]) -> str:
    """One line for the user."""
    return (
        f"matched: {found['channels']} channels, {found['bitops'] / 1e9:.4g} G BitOps in quantised layers, within "
        f"1/{found['factor']:g} of the {found['reference_bitops'] / 1e9:.4g} G of {found['reference']} in full "
        f"precision at {found['reference_channels']} channels"
    )
