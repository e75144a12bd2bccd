# SPDX-License-Identifier: Apache-2.0
"""Activations as codes: one byte per element that says what every bit-width under search makes of it.

For bit-widths below 8 the code of x is sum_b q_b(x) + [x > zero] + sum_b [x > top_b], with HWGQ's levels q_b and
largest levels top_b. Every term is a monotone step, so the code names the interval of x between all thresholds, and the
values and straight-through masks of every bit-width are functions of it: tables. At 8 bits, whose range moves, a second
byte holds the level, and a bit of the first says whether the gradient passes. Codes are what is saved for the backward
pass, in place of floats.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from common.quant.kernels.native import function, pointer
from common.quant.quantizers import LOW_BITS, ZERO, hwgq_bound, hwgq_level, hwgq_mask

TABLE = 64  # entries of a table by code, as in kernels.h
CODE, INSIDE8 = 63, 64  # of a first byte: the bits that are the code, and 8 bits' mask
_TINY = 1e-12


@dataclass(frozen=True)
class Codebook:
    """Tables of a set of bit-widths below 8: `levels`, `masks` [bits, TABLE] by code; the last of `count` is NaN's."""

    bits: tuple[int, ...]
    levels: Tensor
    masks: Tensor
    steps: Tensor
    tops: Tensor
    count: int

    @property
    def nan_code(self) -> int:
        """The code of what is no number."""
        return self.count - 1


@cache
def codebook(bits: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Codebook:
    """The codebook of `bits`, each of 1 to 4."""
    steps = [hwgq_level(torch.zeros(1), b)[1] for b in bits]
    tops = [hwgq_bound(b) for b in bits]
    thresholds = {0.0, *tops, *((k + 0.5) * s for b, s in zip(bits, steps, strict=True) for k in range(2**b - 1))}
    ordered = sorted(thresholds)
    inside = [(low + high) / 2 for low, high in pairwise(ordered)]
    samples = torch.tensor([-1.0, *inside, ordered[-1] + 1.0], dtype=torch.float64)
    codes = encode_plain(samples, bits).long()
    count = int(codes.max()) + 2
    levels = torch.zeros(len(bits), TABLE, dtype=torch.float64)
    masks = torch.zeros(len(bits), TABLE, dtype=torch.float64)
    for position, b in enumerate(bits):
        value, step = hwgq_level(samples, b)
        levels[position, codes] = value * step
        masks[position, codes] = hwgq_mask(samples, b).double()
        levels[position, count - 1] = float("nan")
    as_type = lambda t: t.to(device=device, dtype=dtype)  # noqa: E731
    return Codebook(
        bits,
        as_type(levels),
        as_type(masks),
        as_type(torch.tensor(steps, dtype=torch.float64)),
        as_type(torch.tensor(tops, dtype=torch.float64)),
        count,
    )


def encode_plain(x: Tensor, bits: tuple[int, ...], relu: bool = False) -> Tensor:
    """The twin of `encode` below 8 bits: codes of x, uint8; the last is that of what is no number."""
    code = (x > (0.0 if relu else -ZERO)).to(x.dtype)
    for b in bits:
        code = code + hwgq_level(x, b)[0] + (x > hwgq_bound(b)).to(x.dtype)
    largest = 1 + sum(2**b for b in bits)  # all levels, all bounds and zero passed
    return torch.where(x.isnan(), largest + 1, code).to(torch.uint8)


class _Mixture(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("p", "levels", "masks", "scale8")),
        ("bits", ctypes.c_int),
        ("codes", ctypes.c_int),
    ]


class _Source(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("floats", "codes", "codes8")),
        ("mixture", _Mixture),
        *((name, ctypes.c_int) for name in ("groups", "width", "shared", "relu")),
    ]


def _encoding(dtype: torch.dtype) -> type[ctypes.Structure]:
    real = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    fields = [
        ("steps", ctypes.c_void_p),
        ("tops", ctypes.c_void_p),
        ("bits", ctypes.c_int),
        ("zero", real),
        ("nan_code", ctypes.c_int),
        ("scale8", ctypes.c_void_p),
        ("top8", ctypes.c_void_p),
    ]
    return type("_Encoding", (ctypes.Structure,), {"_fields_": fields})


_ENCODINGS = {dtype: _encoding(dtype) for dtype in (torch.float32, torch.float64)}


@dataclass
class Operand:
    """What enters a convolution: floats [B, H, W, C], or codes of that shape with the mixture that they are decoded to.

    `groups` x `width` channels come out; `shared` codes have `width` channels, read by every group. `probabilities`
    [groups, bits] mix the bit-widths (8 last); `scale8` [groups] is the step of 8 bits. `relu`: floats left a ReLU.
    """

    groups: int
    width: int
    floats: Tensor | None = None
    codes: Tensor | None = None
    codes8: Tensor | None = None
    book: Codebook | None = None
    probabilities: Tensor | None = None
    scale8: Tensor | None = None
    shared: bool = False
    relu: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of what it decodes to."""
        tensor = self.floats if self.floats is not None else self.probabilities
        assert tensor is not None
        return tensor.dtype

    @property
    def shape(self) -> torch.Size:
        """[B, H, W, channels as stored]."""
        tensor = self.floats if self.floats is not None else self.codes
        assert tensor is not None
        return tensor.shape

    @property
    def columns(self) -> int:
        """Bit-widths mixed (0: floats)."""
        return 0 if self.probabilities is None else self.probabilities.shape[1]

    def source(self) -> _Source:
        """For the native entries; valid while this object lives."""
        mixture = _Mixture()
        if self.book is not None:
            scale8 = None if self.scale8 is None else self.scale8.data_ptr()
            assert self.probabilities is not None and self.probabilities.is_contiguous()
            mixture = _Mixture(
                self.probabilities.data_ptr(),
                self.book.levels.data_ptr(),
                self.book.masks.data_ptr(),
                scale8,
                len(self.book.bits),
                self.book.count,
            )
        at = lambda t: None if t is None else t.data_ptr()  # noqa: E731
        return _Source(
            at(self.floats), at(self.codes), at(self.codes8), mixture, self.groups, self.width, self.shared, self.relu
        )


def encode(x: Tensor, bits: tuple[int, ...], maximum: Tensor | None, *, groups: int, relu: bool) -> Operand:
    """Codes of x [B, H, W, groups * width], contiguous: an Operand that still lacks its probabilities.

    `bits` may end with 8, whose range is `maximum` (a scalar, or [groups]). `relu`: x stands for max(x, 0), whose
    gradient stops at zero.
    """
    low = tuple(b for b in bits if b in LOW_BITS)
    book = codebook(low, x.dtype, x.device)
    batch, height, width, channels = x.shape
    codes = torch.empty(x.shape, dtype=torch.uint8)
    codes8 = scale8 = top8 = None
    if 8 in bits:
        assert maximum is not None
        top8 = maximum.to(x.dtype).clamp_min(_TINY).reshape(-1).expand(groups).contiguous()
        scale8, codes8 = top8 / 255, torch.empty_like(codes)
    encoding = _ENCODINGS[x.dtype](
        book.steps.data_ptr(),
        book.tops.data_ptr(),
        len(low),
        0.0 if relu else -ZERO,
        book.nan_code,
        None if scale8 is None else scale8.data_ptr(),
        None if top8 is None else top8.data_ptr(),
    )
    function("encode", x.dtype)(
        ctypes.byref(encoding),
        pointer(x),
        ctypes.c_int64(batch),
        ctypes.c_int64(height * width),
        groups,
        channels // groups,
        pointer(codes),
        pointer(codes8),
        torch.get_num_threads(),
    )
    return Operand(groups, channels // groups, codes=codes, codes8=codes8, book=book, scale8=scale8)


def decode(operand: Operand) -> Tensor:
    """The mixture [B, H, W, groups * width]."""
    batch, height, width, _ = operand.shape
    out = torch.empty(batch, height, width, operand.groups * operand.width, dtype=operand.dtype)
    source = operand.source()
    function("decode", operand.dtype)(
        ctypes.byref(source),
        ctypes.c_int64(batch),
        ctypes.c_int64(height * width),
        pointer(out),
        torch.get_num_threads(),
    )
    return out


def decode_backward(operand: Operand, gradient: Tensor, probabilities: bool) -> tuple[Tensor, Tensor | None]:
    """From the gradient of `decode` [B, H, W, groups * width]: that of what was encoded, and of the probabilities
    [groups, bits] where asked for.
    """
    batch, height, width, _ = operand.shape
    out = torch.empty(operand.shape, dtype=operand.dtype)
    sums = torch.empty(operand.groups, operand.columns, dtype=torch.float64) if probabilities else None
    source = operand.source()
    function("decode_backward", operand.dtype)(
        ctypes.byref(source),
        pointer(gradient),
        ctypes.c_int64(batch),
        ctypes.c_int64(height * width),
        pointer(out),
        pointer(sums),
        torch.get_num_threads(),
    )
    return out, None if sums is None else sums.to(operand.dtype)
