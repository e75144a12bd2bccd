# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the mixed activation on a GPU: uint8 codes, the mixture, and its gradients.

Only for a process that holds tensors on a GPU: importing this module imports Triton (`kernels.triton_kernels`). The
twin is `_MixedHwgq` in common/quant/layers.py. Tensors are [N, groups * c], or [N, c] where all groups share one; rows
are pixels, channels dense. Arithmetic is float32 for bfloat16 and float32 tensors, float64 for float64.

Codes are those of `levels.py`, for bit-widths below 8. A NaN has a code of its own, which keeps it visible.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.quant.anchor import anchor
from common.quant.kernels.levels import TABLE, codebook
from common.quant.quantizers import HWGQ_STEP, LOW_BITS, ZERO, hwgq_bound, straight_through

_TILE = 1024  # elements of a program's tile: 8 to a thread at 4 warps


@cache
def last_codes(bits: tuple[int, ...]) -> tuple[int, ...]:
    """For each bit-width the largest code of an x that is not above its range: its mask is 1 <= code <= that."""
    masks = codebook(bits, torch.float64, torch.device("cpu")).masks
    return tuple(int(count) for count in masks.sum(1))


@triton.jit
def _encode_tile(
    x, STEPS: tl.constexpr, TOPS: tl.constexpr, ZERO: tl.constexpr, NAN: tl.constexpr, SHIFT: tl.constexpr
):
    """Codes of x (float32 or float64) as int32. Adding and subtracting SHIFT rounds to the nearest even integer."""
    code = (x > -ZERO).to(tl.int32)
    for b in tl.static_range(len(STEPS)):
        inside = tl.minimum(tl.maximum(x, 0.0), TOPS[b])
        step = tl.full(x.shape, STEPS[b], x.dtype)
        if x.dtype == tl.float32:
            level = tl.div_rn(inside, step)  # the plain division of float32 is approximate on a GPU
        else:
            level = inside / step
        level = (level + SHIFT) - SHIFT
        code += tl.where(x == x, level, 0.0).to(tl.int32) + (x > TOPS[b]).to(tl.int32)
    return tl.where(x == x, code, NAN)


@triton.jit
def _forward_kernel(
    x,
    codes,
    p,
    levels,
    out,
    rows,
    groups,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    TOPS: tl.constexpr,
    ZERO: tl.constexpr,
    NAN: tl.constexpr,
    SHIFT: tl.constexpr,
    SHARED: tl.constexpr,
    STORE: tl.constexpr,
    TABLE: tl.constexpr,
    WORK: tl.constexpr,
):
    """out[n, g c + k] = sum_b p[g, b] levels[b, code of x], the rows of x `stride` apart; keeps the codes (STORE)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < C)
    if SHARED:
        value = tl.load(x + row * C + column, inside, other=0.0).to(WORK)
        code = _encode_tile(value, STEPS, TOPS, ZERO, NAN, SHIFT)
        if STORE:
            tl.store(codes + row * C + column, code.to(tl.uint8), inside)
    for group in range(groups):
        if not SHARED:
            value = tl.load(x + row * (C * groups) + group * C + column, inside, other=0.0).to(WORK)
            code = _encode_tile(value, STEPS, TOPS, ZERO, NAN, SHIFT)
            if STORE:
                tl.store(codes + row * (C * groups) + group * C + column, code.to(tl.uint8), inside)
        mixed = tl.zeros((ROWS, BLOCK), WORK)
        for b in tl.static_range(len(STEPS)):
            weight = tl.load(p + group * len(STEPS) + b).to(WORK)
            mixed += tl.load(levels + b * TABLE + code) * weight
        tl.store(out + row * (C * groups) + group * C + column, mixed.to(out.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    codes,
    gradient,
    p,
    levels,
    x_gradient,
    partial,
    rows,
    groups,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,
    SHARED: tl.constexpr,
    TABLE: tl.constexpr,
    WORK: tl.constexpr,
):
    """x_gradient, and per program partial[program, g, b] = the tile's sum of gradient x levels[b, code].

    The sums of the tiles are added by one more kernel in a fixed order, not by atomics: runs repeat bit for bit.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < C)
    total = tl.zeros((ROWS, BLOCK), WORK)
    for group in range(groups):
        given = tl.load(gradient + row * (C * groups) + group * C + column, inside, other=0.0).to(WORK)
        if SHARED:
            code = tl.load(codes + row * C + column, inside, other=0).to(tl.int32)
        else:
            code = tl.load(codes + row * (C * groups) + group * C + column, inside, other=0).to(tl.int32)
        factor = tl.zeros((ROWS, BLOCK), WORK)
        for b in tl.static_range(len(LAST)):
            weight = tl.load(p + group * len(LAST) + b).to(WORK)
            factor += tl.where((code >= 1) & (code <= LAST[b]), weight, 0.0)
            value = tl.load(levels + b * TABLE + code)
            products = tl.where(inside, given * value, 0.0)
            tl.store(partial + (program * groups + group) * len(LAST) + b, tl.sum(tl.sum(products, 1), 0))
        if SHARED:
            total += given * factor
        else:
            target = x_gradient + row * (C * groups) + group * C + column
            tl.store(target, (given * factor).to(x_gradient.dtype.element_ty), inside)
    if SHARED:
        tl.store(x_gradient + row * C + column, total.to(x_gradient.dtype.element_ty), inside)


def _work(dtype: torch.dtype) -> tuple[torch.dtype, dict[str, object]]:
    """The type of a tensor's arithmetic, and the options that go with it: every rounding is the twin's, none fused."""
    wide = dtype == torch.float64
    return (dtype if wide else torch.float32), {"WORK": tl.float64 if wide else tl.float32, "enable_fp_fusion": False}


def _tile(channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "ROWS": max(1, _TILE // block)}


def mixed_forward(
    x: Tensor, p: Tensor, channels: int, bits: tuple[int, ...], keep: bool = True
) -> tuple[Tensor, Tensor | None]:
    """sum_b p_b Q_b(x) and, with `keep`, the codes of x.

    x [N, channels] shared by all groups or [N, groups * channels]; p [groups, bits] -> [N, groups * channels], of x's
    type; codes uint8 of x's shape.
    """
    assert bits and all(b in LOW_BITS for b in bits), "only the widths of HWGQ's fixed grid have codes"
    x, p = x.contiguous(), p.detach().contiguous()
    rows, groups = x.shape[0], p.shape[0]
    out = torch.empty(rows, groups * channels, dtype=x.dtype, device=x.device)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device) if keep else None
    work, constants = _work(x.dtype)
    book, tile = codebook(bits, work, x.device), _tile(channels)
    if rows:
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                x,
                out if codes is None else codes,
                p,
                book.levels,
                out,
                rows,
                groups,
                channels,
                **tile,
                STEPS=tuple(HWGQ_STEP[b] for b in bits),
                TOPS=tuple(hwgq_bound(b) for b in bits),
                ZERO=ZERO,
                NAN=book.nan_code,
                SHIFT=1.5 * 2.0 ** (52 if work == torch.float64 else 23),
                SHARED=x.shape[1] != groups * channels,
                STORE=keep,
                TABLE=TABLE,
                **constants,
            )
    return out, codes


def mixed_backward(
    codes: Tensor, gradient: Tensor, p: Tensor, channels: int, bits: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of x (codes' shape, gradient's type) and of p [groups, bits], for gradient [N, groups * channels]."""
    gradient, p = gradient.detach().contiguous(), p.detach().contiguous()
    rows, groups = codes.shape[0], p.shape[0]
    work, constants = _work(gradient.dtype)
    tile = _tile(channels)
    programs = triton.cdiv(rows, tile["ROWS"])
    x_gradient = torch.empty(codes.shape, dtype=gradient.dtype, device=codes.device)
    partial = torch.empty(programs, groups, len(bits), dtype=work, device=codes.device)
    if rows:
        with torch.cuda.device_of(codes):
            _backward_kernel[(programs,)](
                codes,
                gradient,
                p,
                codebook(bits, work, codes.device).levels,
                x_gradient,
                partial,
                rows,
                groups,
                channels,
                **tile,
                LAST=last_codes(bits),
                SHARED=codes.shape[1] != groups * channels,
                TABLE=TABLE,
                **constants,
            )
    return x_gradient, partial.sum(0).to(p.dtype)


class _Mixed(torch.autograd.Function):
    """The mixture; saves codes (one byte an element) and p. `place` receives x's gradient, of any order."""

    @staticmethod
    def forward(ctx, place: Tensor, x: Tensor, p: Tensor, channels: int, bits: tuple[int, ...]) -> Tensor:
        keep = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        mixed, codes = mixed_forward(x, p, channels, bits, keep)
        if keep:
            ctx.save_for_backward(place, codes, p)
        ctx.channels, ctx.bits = channels, bits
        return mixed

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        place, codes, p = ctx.saved_tensors
        if torch.is_grad_enabled():
            x_gradient, p_gradient = _plain_backward(place, codes, gradient, p, ctx.bits)
        else:
            x_gradient, p_gradient = mixed_backward(codes, gradient, p, ctx.channels, ctx.bits)
        return x_gradient, None, p_gradient, None, None


def _plain_backward(
    place: Tensor, codes: Tensor, gradient: Tensor, p: Tensor, bits: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """`mixed_backward` in plain differentiable operations, for create_graph."""
    work = torch.promote_types(gradient.dtype, torch.float32)
    channels = gradient.shape[1] // p.shape[0]
    split = codes.unflatten(1, (-1, channels))  # [N, groups or 1, c]
    given = gradient.to(work).unflatten(1, (-1, channels))
    place, index = place.to(work).view_as(split), split.long()
    table = codebook(bits, work, codes.device).levels
    x_gradient, p_gradients = torch.zeros_like(given), []
    for position, last in enumerate(last_codes(bits)):
        mask = (split >= 1) & (split <= last)
        value = straight_through(place, table[position][index], mask)
        x_gradient = x_gradient + given * p[:, position].to(work).view(1, -1, 1) * mask
        p_gradients.append((given * value).sum((0, 2)))
    x_gradient = x_gradient.sum_to_size(split.shape).reshape(codes.shape)
    return x_gradient.to(gradient.dtype), torch.stack(p_gradients, 1).to(p.dtype)


def probe() -> None:
    """Compile and launch both kernels on the present GPU; raises whatever this machine lacks for that.

    Triton needs a C compiler and Python's headers for its launcher, and a card that its release still serves.
    """
    x, p, bits = torch.zeros(1, 4, device="cuda"), torch.full((1, 2), 0.5, device="cuda"), (2, 4)
    _, codes = mixed_forward(x, p, 4, bits)
    assert codes is not None
    mixed_backward(codes, x, p, 4, bits)


def mixed(x: Tensor, p: Tensor, channels: int, bits: tuple[int, ...]) -> Tensor:
    """sum_b p_b Q_b(x) with gradients of any order; shapes as in `mixed_forward`."""
    if not torch.is_grad_enabled():
        return mixed_forward(x, p, channels, bits, keep=False)[0]
    return _Mixed.apply(anchor(x), x.detach(), p, channels, bits)
