# SPDX-License-Identifier: Apache-2.0
"""Fake quantisers: values on a grid of 2^bits levels, gradients straight through.

Straight-through rule of every quantiser here: the bounds are inclusive, and an activation of |x| < 1e-9 counts as
zero, in value and in mask. Both are written out: the gradient of torch.clamp at its bounds differs between releases,
and whether an exact cancellation gives 0 or -1e-17 depends on the order of a sum.

Sources: HWGQ (Cai et al., CVPR 2017) for activations and its Gaussian counterpart for weights as in EdMIPS (Cai and
Vasconcelos, CVPR 2020) for 1 to 4 bits; uniform ranges for 8 bits; LSQ (Esser et al., ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant.shared import Reduction

FLOAT_BITS = 32
"""The bit-width that means: not quantised."""

HWGQ_STEP = {1: 0.799, 2: 0.538, 3: 0.3217, 4: 0.185}
"""Optimal step of a uniform quantiser for a half-wave Gaussian of unit variance, by bits."""

GAUSSIAN_STEP = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.336}
"""Optimal step of a mid-rise uniform quantiser for a Gaussian, in standard deviations, by bits."""

LOW_BITS = tuple(HWGQ_STEP)
SUPPORTED_BITS = (*LOW_BITS, 8, FLOAT_BITS)
SCHEMES = ("default", "reference")

ZERO = 1e-9  # |x| below this is zero: exact cancellations must not depend on the summation order
TINY = 1e-12
"""No scale is smaller: an all-zero tensor or channel must not divide 0 by 0."""
_RANGE_MOMENTUM = 0.1  # weight of the newest batch in a running maximum


class _StraightThrough(torch.autograd.Function):
    """Forward a quantised value, backward the gradient where the mask is true (everywhere when it is None)."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return gradient if mask is None else gradient * mask, None, None


def straight_through(x: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`value` forward; backward, x receives the gradient where `mask` is true (everywhere if it is None)."""
    return _StraightThrough.apply(x, value, mask)


def check_bits(bits: int, allowed: tuple[int, ...] = SUPPORTED_BITS) -> int:
    """Return `bits`, or raise ValueError that lists the supported bit-widths."""
    if bits not in allowed:
        raise ValueError(f"bits: {bits} is not supported; choose among {', '.join(map(str, allowed))}")
    return bits


def _check_scheme(scheme: str, known: tuple[str, ...]) -> None:
    if scheme not in known:
        raise ValueError(f"scheme: {scheme!r} is unknown; choose among {', '.join(known)}")


def hwgq_bound(bits: int) -> float:
    """The largest level of HWGQ."""
    return HWGQ_STEP[bits] * (2**bits - 1)


def hwgq_level(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """HWGQ of x as (codes 0 .. 2^bits - 1 in x's type, step): the value is codes x step. No gradient."""
    step = HWGQ_STEP[bits]
    return x.detach().clamp(0, hwgq_bound(bits)).div_(step).round_(), step


def hwgq_mask(x: Tensor, bits: int) -> Tensor:
    """Where HWGQ passes its gradient: 0 <= x <= the largest level, bounds inclusive."""
    return (x > -ZERO) & (x <= hwgq_bound(bits))


def _hwgq(x: Tensor, bits: int) -> Tensor:
    with torch.no_grad():
        codes, step = hwgq_level(x, bits)
        value, mask = codes.mul_(step), hwgq_mask(x, bits)
    return straight_through(x, value, mask)


def _uniform(x: Tensor, bits: int, maximum: Tensor, signed: bool) -> Tensor:
    """Uniform levels on [0, maximum], or symmetric on [-maximum, maximum] when signed."""
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    bottom = -top if signed else 0
    with torch.no_grad():
        maximum = maximum.to(x.dtype).clamp_min(TINY)
        scale = maximum / top
        value = (x / scale).round_().clamp_(bottom, top) * scale
        mask = (x >= -maximum if signed else x > -ZERO) & (x <= maximum)
    return straight_through(x, value, mask)


def reference8(x: Tensor, dims: tuple[int, ...], groups: int = 1, reduction: Reduction | None = None) -> Tensor:
    """8 bits as the reference: a scale per channel of dimension 1, non-negative or mid-rise symmetric by the data.

    `dims` are the reduced dimensions. The reference takes the non-negative branch when the smallest value is at
    least -0.05 and then spreads 255 steps over max - min from zero (its unused zero point clips the top). With
    `groups` > 1 the channels are that many tensors side by side, and each takes its own branch. `reduction`: by the
    data of all ranks.
    """
    with torch.no_grad():
        near = torch.where(x.abs() < ZERO, 0.0, x)  # mid-rise levels jump at zero
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
        if reduction is not None:
            low, high = -reduction.maximum(-low), reduction.maximum(high)
        step = ((high - low) / 255).clamp_min(TINY)
        unsigned = (near / step).round_().clamp_(0, 255) * step
        half = (2 * torch.maximum(low.abs(), high.abs()) / 255).clamp_min(TINY)
        symmetric = (((near / half + 0.5).round_() - 0.5).clamp_(-127, 127)) * half
        least = low.view(groups, -1).amin(1).repeat_interleave(low.numel() // groups).view_as(low)
        non_negative = least >= -0.05
        value = torch.where(non_negative, unsigned, symmetric)
        # high - low, not 255 * step: rounding would shut the largest value out of its own inclusive bound
        inside = torch.where(non_negative, (x > -ZERO) & (x <= high - low), x.abs() <= 127 * half)
    return straight_through(x, value, inside)


def activation_maximum(x: Tensor, signed: bool = False, groups: int = 1) -> Tensor:
    """The batch's own range: max of x (at least 0), or of |x| when signed; shape [1, groups * c, 1, 1] or scalar.

    With `groups` > 1 the channels of x [B, groups * c, H, W] are `groups` tensors side by side, each with its own.
    """
    x = x.detach()
    if groups == 1:
        return x.abs().amax() if signed else x.amax().clamp_min(0)
    split = x.unflatten(1, (groups, -1))
    split = split.abs() if signed else split
    return split.amax((0, 2, 3, 4)).clamp_min(0)


def quantize_activation(
    x: Tensor,
    bits: int,
    scheme: str = "hwgq",
    maximum: Tensor | float | None = None,
    signed: bool = False,
    groups: int = 1,
) -> Tensor:
    """Fake-quantise an activation tensor [B, C, ...] to `bits` bits.

    `hwgq`: 1 to 4 bits on the fixed half-wave Gaussian grid {0, s, ..., (2^b - 1) s}; 8 bits uniform on
    [0, maximum], per tensor. `signed` gives a symmetric grid of 2^b - 1 levels on [-maximum, maximum] instead, at 2
    to 8 bits (images, the classifier's input). Where a maximum is needed and none is given it is x's own.
    `reference`: the same at 1 to 4 bits, the reference's per-channel form at 8. 32 bits return x. `groups` tensors may
    stand side by side on the channels. Raises ValueError for an unknown scheme or bit-width.
    """
    _check_scheme(scheme, ("hwgq", "reference"))
    check_bits(bits)
    if bits == FLOAT_BITS:
        return x
    if signed and bits == 1:
        raise ValueError("bits: a signed activation needs at least 2 bits (1 bit leaves only the level zero)")
    if bits in LOW_BITS and not signed:
        return _hwgq(x, bits)
    if scheme == "reference" and not signed:
        return reference8(x, tuple(d for d in range(x.dim()) if d != 1), groups)
    if maximum is None:
        maximum = activation_maximum(x, signed, groups)
        if groups > 1:
            maximum = maximum.repeat_interleave(x.shape[1] // groups).view(1, -1, 1, 1)
    return _uniform(x, bits, torch.as_tensor(maximum, device=x.device), signed)


def quantize_weight(w: Tensor, bits: int, scheme: str = "gaussian", stacked: bool = False) -> Tensor:
    """Fake-quantise a weight [out, in / groups, ...] to `bits` bits; gradients pass everywhere.

    `gaussian`: 1 to 4 bits mid-rise, +-s/2, +-3s/2, ... with s = step x unbiased standard deviation of the tensor;
    8 bits symmetric per output channel, scale max|w| / 127. `reference`: the reference's per-input-channel 8 bits.
    32 bits return w. With `stacked`, w is [n, out, in / groups, ...]: n independent tensors, quantised each by itself.
    Raises ValueError for an unknown scheme or bit-width.
    """
    _check_scheme(scheme, ("gaussian", "reference"))
    check_bits(bits)
    if bits == FLOAT_BITS:
        return w
    first = 1 if stacked else 0
    if bits in LOW_BITS:
        return _gaussian(w, bits, tuple(range(first, w.dim())))
    if scheme == "reference":
        stack = w if stacked else w.unsqueeze(0)
        if stack.dim() == 3:  # a linear layer: [n, out, in]
            stack = stack[..., None, None]
        values = torch.stack([reference8(one, (0, 2, 3)) for one in stack])
        return values.reshape(w.shape)
    with torch.no_grad():
        scale = (w.abs().amax(tuple(range(first + 1, w.dim())), keepdim=True) / 127).clamp_min(TINY)
        value = (w / scale).round_().clamp_(-127, 127) * scale
    return straight_through(w, value)


def _gaussian(w: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        if w[(0,) * (w.dim() - len(dims))].numel() == 1:  # one element has no spread: its size stands for it
            deviation = w.abs()
        else:
            deviation = w.std(dims, keepdim=True)
        step = (GAUSSIAN_STEP[bits] * deviation).clamp_min(TINY)
        bound = 2 ** (bits - 1) - 0.5
        value = ((w / step + 0.5).round_() - 0.5).clamp_(-bound, bound) * step
    return straight_through(w, value)


class RunningMaximum(nn.Module):
    """The running range of an 8-bit activation: an exponential average of the batch maximum, set by the first batch.

    It moves in training forwards only; `frozen` stops it there too (the architecture step, second-order passes).
    With `groups` it keeps one range for each group of channels.
    """

    def __init__(self, groups: int = 1, signed: bool = False) -> None:
        super().__init__()
        self.groups, self.signed, self.frozen = groups, signed, False
        self.range_reduction: Reduction | None = None
        self.moved = False  # whether `ready` is known to be true, without reading the device
        shape = (groups,) if groups > 1 else ()
        self.register_buffer("maximum", torch.zeros(shape))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """The range to quantise x with: scalar, or [1, groups * c, 1, 1] for x [B, groups * c, H, W]."""
        maximum = self.observe(activation_maximum(x, self.signed, self.groups))
        if self.groups > 1:
            maximum = maximum.repeat_interleave(x.shape[1] // self.groups).view(1, -1, 1, 1)
        return maximum

    @torch.no_grad()
    def observe(self, batch: Tensor) -> Tensor:
        """Take note of a batch's own range (scalar, or [groups]) and return the one to quantise it with."""
        batch = batch.to(self.maximum.dtype)
        moves = self.training and not self.frozen
        if self.range_reduction is not None and (moves or (self.training and not self.moved)):
            batch = self.range_reduction.maximum(batch)
        if moves:
            self.moved = True
            moved = self.maximum + _RANGE_MOMENTUM * (batch - self.maximum)
            self.maximum.copy_(torch.where(self.ready, moved, batch))
            self.ready.fill_(True)
            return self.maximum.clone()
        # before any training batch there is no range yet: the batch's own
        return torch.where(self.ready, self.maximum, batch)


class ActivationQuantizer(nn.Module):
    """HWGQ at 1 to 4 bits, a running range at 8 bits and wherever the input is signed; the identity at 32."""

    def __init__(self, bits: int, *, scheme: str = "default", signed: bool = False) -> None:
        super().__init__()
        _check_scheme(scheme, SCHEMES)
        self.bits, self.scheme, self.signed = check_bits(bits), scheme, signed
        if signed and bits == 1:
            raise ValueError("bits: a signed activation needs at least 2 bits (1 bit leaves only the level zero)")
        ranged = bits != FLOAT_BITS and (signed or (bits == 8 and scheme == "default"))
        self.range = RunningMaximum(signed=signed) if ranged else None
        self.range_reduction: Reduction | None = None  # of a scale by the batch alone

    def forward(self, x: Tensor) -> Tensor:
        """Quantise x [B, C, ...]."""
        scheme = "reference" if self.scheme == "reference" else "hwgq"
        if scheme == "reference" and self.bits == 8 and not self.signed and x.dim() == 4:
            return reference8(x, (0, 2, 3), reduction=self.range_reduction if self.training else None)
        maximum = self.range(x) if self.range is not None else None
        return quantize_activation(x, self.bits, scheme, maximum, self.signed)


class WeightQuantizer(nn.Module):
    """Mid-rise Gaussian at 1 to 4 bits, symmetric per output channel at 8, the identity at 32."""

    def __init__(self, bits: int, *, scheme: str = "default", signed: bool = True) -> None:
        super().__init__()
        _check_scheme(scheme, SCHEMES)
        self.bits, self.scheme = check_bits(bits), scheme

    def forward(self, w: Tensor) -> Tensor:
        """Quantise w [out, in / groups, ...]."""
        return quantize_weight(w, self.bits, "reference" if self.scheme == "reference" else "gaussian")


class LsqQuantizer(nn.Module):
    """Learned step size quantisation (Esser et al., LSQ, ICLR 2020, equations 1 to 5), 2 to 4 and 8 bits.

    `signed` (weights, images): levels -2^(b-1) .. 2^(b-1) - 1; otherwise 0 .. 2^b - 1. The step is a parameter, set
    from the first tensor seen to 2 mean|v| / sqrt(Q_P), its gradient scaled by 1 / sqrt(numel Q_P), numel per sample
    for activations. 1 bit is refused.
    """

    bits_allowed = (2, 3, 4, 8)

    def __init__(self, bits: int, *, scheme: str = "default", signed: bool = False, per_sample: bool = True) -> None:
        super().__init__()
        if bits not in self.bits_allowed:
            allowed = ", ".join(map(str, self.bits_allowed))
            raise ValueError(
                f"--weight-quantizer, --activation-quantizer: lsq has {allowed} bits, this network asks for {bits}; "
                "use the default quantisers, or other bits"
            )
        self.bits, self.signed, self.per_sample = bits, signed, per_sample
        self.top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.bottom = -(2 ** (bits - 1)) if signed else 0
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.seen = False  # whether `ready` is known to be true, without reading the device
        self.step_reduction: Reduction | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Quantise x with the learned step; the first call in training sets the step."""
        if self.training and not self.seen:
            self.seen = True
            with torch.no_grad():
                size = x.detach().abs().mean()
                if self.step_reduction is not None:
                    size = self.step_reduction.mean(size)
                first = (2 * size / self.top**0.5).clamp_min(1e-8).to(self.step.dtype)
                self.step.copy_(torch.where(self.ready, self.step, first))
                self.ready.fill_(True)
        return self.quantize(x)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.seen = False
        super()._load_from_state_dict(*arguments)

    def quantize(self, x: Tensor) -> Tensor:
        """x at the present step."""
        numel = x[0].numel() if self.per_sample else x.numel()
        return lsq(x, self.step, self.bottom, self.top, (numel * self.top) ** -0.5)


class LsqWeightQuantizer(LsqQuantizer):
    """LSQ of a weight tensor: signed levels, the gradient of its step scaled by the tensor's size."""

    def __init__(self, bits: int, *, scheme: str = "default", signed: bool = True) -> None:
        super().__init__(bits, scheme=scheme, signed=True, per_sample=False)


def lsq(x: Tensor, step: Tensor, bottom: int, top: int, gradient_scale: float) -> Tensor:
    """LSQ's fake quantisation round(clip(x / step, bottom, top)) step and its gradients (paper, equations 1 to 5).

    x receives the gradient strictly inside the bounds; the step receives round(v) - v inside and the bound outside,
    times `gradient_scale`.
    """
    scaled = step * gradient_scale
    step = scaled + (step - scaled).detach()
    step = torch.where(step > 0, step.clamp_min(1e-8), step.clamp_max(-1e-8)).to(x.dtype)
    return _Lsq.apply(x, step, bottom, top)


class _Lsq(torch.autograd.Function):
    """round(clip(x / step, bottom, top)) step, by gradients written out; x alone is kept, of x's size."""

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, bottom: int, top: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.bounds = (bottom, top)
        return (x / step).clamp_(bottom, top).round_().mul_(step)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, step = ctx.saved_tensors
        bottom, top = ctx.bounds
        v = x / step
        clipped = F.hardtanh(v, bottom, top)
        level = clipped.detach().round()
        if torch.is_grad_enabled():  # rounding is straight through here too
            level = clipped + (level - clipped).detach()
        to_x = torch.ops.aten.hardtanh_backward(gradient, v, bottom, top)  # strictly inside; one pass, as no mask has
        return to_x, torch.addcmul(gradient * level, to_x, v, value=-1).sum(), None, None


QuantizerFactory = Callable[..., nn.Module]


def _signed_at_8(bits: int, *, scheme: str = "default", signed: bool = False) -> ActivationQuantizer:
    """HWGQ at 1 to 4 bits; at 8 bits the negatives are kept, as the reference does."""
    return ActivationQuantizer(bits, scheme=scheme, signed=signed or bits == 8)


ACTIVATION_QUANTIZERS: dict[str, QuantizerFactory] = {
    "hwgq": ActivationQuantizer,
    "hwgq-signed8": _signed_at_8,
    "lsq": LsqQuantizer,
}
WEIGHT_QUANTIZERS: dict[str, QuantizerFactory] = {"gaussian": WeightQuantizer, "lsq": LsqWeightQuantizer}


def make_quantizer(
    registry: dict[str, QuantizerFactory], name: str, bits: int, *, scheme: str = "default", signed: bool = False
) -> nn.Module:
    """Build the registered quantiser `name` for `bits` bits (the identity at 32).

    A factory takes (bits, *, scheme, signed) and returns a module on tensors; put your own into
    ACTIVATION_QUANTIZERS or WEIGHT_QUANTIZERS. Raises ValueError for an unknown name or bit-width.
    """
    if name not in registry:
        raise ValueError(
            f"quantizer: {name!r} is unknown; choose among {', '.join(registry)}, or import the file that registers "
            "one of your own first (docs/own-quantiser.md)"
        )
    if bits == FLOAT_BITS:
        return nn.Identity()
    return registry[name](bits, scheme=scheme, signed=signed)
