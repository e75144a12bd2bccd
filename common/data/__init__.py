# SPDX-License-Identifier: Apache-2.0
"""Data: one registry of image sets, in memory as uint8 tensors or read while they are used, and their batches."""

from common.data.images import DatasetInfo, ImageData, Split, channel_statistics
from common.data.registry import SHAPES, canonical_name, dataset_names, load, locate
from common.data.splits import hold_out, sample_parts, split_search, take_subset
from common.data.streamed import StreamedBatches, StreamedSplit
from common.data.streams import Stream, evaluation_batches, open_stream

__all__ = [
    "SHAPES",
    "DatasetInfo",
    "ImageData",
    "Split",
    "Stream",
    "StreamedBatches",
    "StreamedSplit",
    "canonical_name",
    "channel_statistics",
    "dataset_names",
    "evaluation_batches",
    "hold_out",
    "load",
    "locate",
    "open_stream",
    "sample_parts",
    "split_search",
    "take_subset",
]
