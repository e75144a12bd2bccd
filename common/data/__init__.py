# SPDX-License-Identifier: Apache-2.0
"""Data: one registry of image sets, resident in memory as uint8 tensors, and batches made from them on the device."""

from common.data.images import DatasetInfo, ImageData, Split, channel_statistics
from common.data.registry import SHAPES, canonical_name, dataset_names, load, locate
from common.data.splits import hold_out, split_search, take_subset
from common.data.streams import Stream, evaluation_batches

__all__ = [
    "SHAPES",
    "DatasetInfo",
    "ImageData",
    "Split",
    "Stream",
    "canonical_name",
    "channel_statistics",
    "dataset_names",
    "evaluation_batches",
    "hold_out",
    "load",
    "locate",
    "split_search",
    "take_subset",
]
