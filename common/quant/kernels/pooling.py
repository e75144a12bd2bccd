# SPDX-License-Identifier: Apache-2.0
"""What the edges of a state share (its 3x3 poolings, itself), and the sum of a node's edges, on the CPU.

All tensors are [B, H, W, channels], contiguous unless a pitch is spoken of. Their PyTorch twins are pooling, batch
normalisation, sums and the channel shuffle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.quant.kernels.native import function, pointer
from common.quant.kernels.separable import Running, RunningEntry, strengths
from common.quant.shared import Reduction

_INT64 = ctypes.c_int64
MAXIMUM, MEAN, SELF = 0, 1, 2  # kinds: 3x3 maximum, 3x3 mean (padding not counted), the state itself
KINDS = 3
JOINED_MOST = 1024  # channels of a node that `join` takes


@dataclass
class Shared:
    """The shared candidates' coefficients: `values` holds scale [KINDS, edges, c] and bias [edges, c], `statistics`
    (float64) the poolings' mean and inverse deviation [2, c]; `columns`: the strengths' of each kind (-1: none).
    """

    values: Tensor
    statistics: Tensor
    columns: tuple[int, int, int]
    stride: int
    training: bool

    def entry(self) -> ctypes.Array[ctypes.c_int]:
        """The columns, for the native entries."""
        return (ctypes.c_int * KINDS)(*self.columns)


def _geometry(x: Tensor, stride: int, edges: int) -> tuple[ctypes.c_int64, int, int, int, int, int]:
    batch, height, width, channels = x.shape
    return _INT64(batch), height, width, channels, stride, edges


def share(
    x: Tensor,
    stride: int,
    norms: Sequence[Running | None],
    strength: Tensor,
    columns: tuple[int, int, int],
    reduction: Reduction | None = None,
) -> tuple[Tensor, Shared]:
    """Normalised poolings of x and x itself, each times its strength [edges, primitives]: [B, H', W', edges * c].

    `norms` are those of the maximum and of the mean; in training their running statistics move. `reduction`: their
    statistics are those of all ranks' batches.
    """
    batch, height, width, channels = x.shape
    edges = strength.shape[0]
    out = x.new_empty(batch, (height - 1) // stride + 1, (width - 1) // stride + 1, edges * channels)
    values = x.new_empty((KINDS + 1) * edges * channels)
    statistics = torch.empty(4 * channels, dtype=torch.float64)
    training = any(norm is not None and norm.training for norm in norms)
    shared = Shared(values, statistics, columns, stride, training)
    running = (RunningEntry * 2)(*(RunningEntry() if norm is None else norm.entry() for norm in norms))
    known = None
    if training and reduction is not None:
        known = torch.empty(4 * channels, dtype=torch.float64)
        geometry = _geometry(x, stride, edges)[:-1]
        function("pool_moments", x.dtype)(pointer(x), *geometry, pointer(known), torch.get_num_threads())
        known = reduction.mean(known)
    function("share", x.dtype)(
        pointer(x),
        *_geometry(x, stride, edges),
        running,
        strengths(strength, 0),
        shared.entry(),
        pointer(known),
        1 if reduction is None else reduction.ranks,
        *map(pointer, (values, statistics, out)),
        torch.get_num_threads(),
    )
    return out, shared


def share_backward(
    x: Tensor,
    shared: Shared,
    strength: Tensor,
    gradient: Tensor,
    strength_gradient: Tensor,
    wanted: bool,
    reduction: Reduction | None = None,
) -> Tensor | None:
    """From the gradient of `share`: that of x (None unless wanted); writes those of the strengths."""
    through = x.new_empty(2 * KINDS * x.shape[3])
    geometry = _geometry(x, shared.stride, strength.shape[0])
    function("share_sums", x.dtype)(
        *map(pointer, (x, gradient)),
        *geometry,
        int(shared.training),
        strengths(strength, 0),
        shared.entry(),
        pointer(shared.statistics),
        strengths(strength_gradient, 0),
        pointer(through),
        torch.get_num_threads(),
    )
    if not wanted:
        return None
    if shared.training and reduction is not None:
        through = reduction.mean(through)
    out = torch.empty_like(x)
    function("share_spread", x.dtype)(
        *map(pointer, (x, gradient)),
        *geometry,
        shared.entry(),
        *map(pointer, (shared.values, through, out)),
        torch.get_num_threads(),
    )
    return out


def _addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def _pitches(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """Values from pixel to pixel of what `dense_pixels` made."""
    return (_INT64 * len(tensors))(*(_pitch(t) for t in tensors))


def _pitch(x: Tensor) -> int:
    """Of a view [B, C, H, W]: the stride of the innermost axis of pixels that has any length."""
    for axis in (3, 2, 0):
        if x.shape[axis] > 1:
            return x.stride(axis)
    return x.shape[1]


def dense_pixels(x: Tensor) -> Tensor:
    """A view [B, C, H, W] with dense channels and its pixels in a row at one pitch: x, or a copy of it."""
    rows = x.permute(0, 2, 3, 1)
    _, height, width, channels = rows.shape
    pitch = _pitch(x)
    wanted = (pitch * width * height, pitch * width, pitch, 1)
    fits = all(size == 1 or own == want for own, want, size in zip(rows.stride(), wanted, rows.shape, strict=True))
    return x if fits and pitch >= channels else rows.contiguous().permute(0, 3, 1, 2)


def join(heads: Sequence[Tensor], rests: Sequence[Tensor], betas: Tensor) -> Tensor:
    """Sum of heads [B, c, H, W], beside the sum of beta_e x rests [B, (k - 1) c, H, W], shuffled: [B, H, W, k c].

    Channel i * k is the heads' channel i, channel i * k + 1 + r the rests' channel r * c + i (PC-DARTS's shuffle).
    """
    batch, width, height, columns = heads[0].shape
    channels = width + rests[0].shape[1]
    out = heads[0].new_empty(batch, height, columns, channels)
    function("join", out.dtype)(
        len(heads),
        _addresses(heads),
        _pitches(heads),
        _addresses(rests),
        _pitches(rests),
        pointer(betas),
        _INT64(batch * height * columns),
        width,
        channels // width,
        pointer(out),
        torch.get_num_threads(),
    )
    return out


def join_backward(
    gradient: Tensor, rests: Sequence[Tensor], betas: Tensor, width: int, wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """From the gradient of `join`: every head's [B, H, W, c], the wanted rests' [B, H, W, (k - 1) c], betas'."""
    batch, height, columns, channels = gradient.shape
    head = gradient.new_empty(batch, height, columns, width)
    found = [gradient.new_empty(batch, height, columns, channels - width) if w else None for w in wanted]
    sums = torch.empty(len(rests), dtype=torch.float64)
    function("join_backward", gradient.dtype)(
        len(rests),
        pointer(gradient),
        _addresses(rests),
        _pitches(rests),
        pointer(betas),
        _INT64(batch * height * columns),
        width,
        channels // width,
        pointer(head),
        _addresses(found),
        pointer(sums),
        torch.get_num_threads(),
    )
    return head, found, sums
