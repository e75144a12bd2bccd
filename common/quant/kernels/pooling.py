# SPDX-License-Identifier: Apache-2.0
"""What the edges of a state share (its 3x3 poolings, itself), and the sum of a node's edges, on the CPU.

All tensors are [B, H, W, channels], contiguous unless a pitch is spoken of. Their PyTorch twins are pooling, batch
normalisation, sums and the channel shuffle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from common.quant.kernels.native import function, pointer

_INT64 = ctypes.c_int64
MAXIMUM, MEAN, SELF = 0, 1, 2  # kinds: 3x3 maximum, 3x3 mean (padding not counted), the state itself
KINDS = 3
JOINED_MOST = 1024  # channels of a node that `join` takes


def _geometry(x: Tensor, stride: int) -> tuple[ctypes.c_int64, int, int, int, int]:
    batch, height, width, channels = x.shape
    return _INT64(batch), height, width, channels, stride


def pool_moments(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Means over all pixels of both poolings u of x and of u^2: [2, c] each, float64."""
    mean, second = torch.empty(2, 2, x.shape[3], dtype=torch.float64).unbind()
    function("pool_moments", x.dtype)(
        pointer(x), *_geometry(x, stride), pointer(mean), pointer(second), torch.get_num_threads()
    )
    return mean, second


def shared_forward(x: Tensor, stride: int, kinds: int, scale: Tensor, bias: Tensor) -> Tensor:
    """bias + the sum over kinds of scale x u_kind: [B, H', W', edges * c].

    `kinds` has a bit for each kind; scale [KINDS, edges, c], bias [edges, c].
    """
    batch, height, width, channels = x.shape
    edges = bias.shape[0]
    out = x.new_empty(batch, (height - 1) // stride + 1, (width - 1) // stride + 1, edges * channels)
    function("shared_forward", x.dtype)(
        pointer(x),
        *_geometry(x, stride),
        edges,
        kinds,
        *map(pointer, (scale, bias, out)),
        torch.get_num_threads(),
    )
    return out


def shared_sums(x: Tensor, gradient: Tensor, stride: int, kinds: int) -> tuple[Tensor, Tensor]:
    """Gradients of scale [KINDS, edges, c] and bias [edges, c] from that of the output, float64."""
    channels = x.shape[3]
    edges = gradient.shape[3] // channels
    products = torch.empty(KINDS, edges, channels, dtype=torch.float64)
    sums = torch.empty(edges, channels, dtype=torch.float64)
    function("shared_sums", x.dtype)(
        *map(pointer, (x, gradient)),
        *_geometry(x, stride),
        edges,
        kinds,
        *map(pointer, (products, sums)),
        torch.get_num_threads(),
    )
    return products, sums


def shared_backward(
    x: Tensor, gradient: Tensor, stride: int, kinds: int, scale: Tensor, constant: Tensor, linear: Tensor
) -> Tensor:
    """Gradient of x, u_kind's being scale x gradient (summed over edges) + constant + linear x u_kind, [KINDS, c]."""
    out = torch.empty_like(x)
    function("shared_backward", x.dtype)(
        *map(pointer, (x, gradient)),
        *_geometry(x, stride),
        scale.shape[1],
        kinds,
        *map(pointer, (scale, constant, linear, out)),
        torch.get_num_threads(),
    )
    return out


def _addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def _pitches(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """Values from pixel to pixel of channels-last views [B, C, H, W]."""
    return (_INT64 * len(tensors))(*(t.stride(3) for t in tensors))


def dense_pixels(x: Tensor) -> bool:
    """Whether a view [B, C, H, W] has dense channels and pixels in a row, at whatever pitch."""
    pitch, height, width = x.stride(3), x.shape[2], x.shape[3]
    return x.stride(1) == 1 and x.stride(2) == pitch * width and x.stride(0) == pitch * width * height


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
