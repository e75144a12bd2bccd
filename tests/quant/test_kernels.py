# SPDX-License-Identifier: Apache-2.0
"""The native kernels against plain PyTorch: quantisers, convolutions, normalisation, pooling and their gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.quant import quantize_activation
from common.quant.kernels import disabled, native, usable
from common.quant.kernels import pooling as P
from common.quant.kernels import separable as S
from common.quant.kernels.levels import CODE, INSIDE8, Operand, codebook, decode, decode_backward, encode, encode_plain

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: the twins compute")

BITS = [(2, 4), (1, 2, 3, 4), (2, 4, 8), (8,), (3,)]
# edges, channels, size, kernel, stride, dilation, whether the edges share the image
SHAPES = [
    (3, 4, 8, 3, 1, 1, True),
    (2, 6, 9, 5, 1, 1, False),
    (4, 8, 8, 3, 2, 2, True),
    (1, 5, 7, 5, 2, 2, False),
    (2, 16, 8, 5, 1, 2, True),
    (1, 32, 5, 3, 1, 1, False),
    (2, 9, 6, 3, 1, 2, True),
    (4, 2, 8, 7, 1, 1, True),
]


def mixture(x: Tensor, bits: tuple[int, ...], p: Tensor, maximum: Tensor | None, relu: bool, shared: bool) -> Tensor:
    """x [B, H, W, c or edges * c] -> [B, H, W, edges * c], by the plain quantisers."""
    x = F.relu(x) if relu else x
    edges = p.shape[0]
    levels = [quantize_activation(x, b, maximum=maximum if b == 8 else None) for b in bits]
    spread = [v.unsqueeze(3).expand(-1, -1, -1, edges, -1) if shared else v.unflatten(3, (edges, -1)) for v in levels]
    return sum(v * p[:, k].view(1, 1, 1, -1, 1) for k, v in enumerate(spread)).flatten(3)


def encoded(x: Tensor, bits: tuple[int, ...], p: Tensor, maximum: Tensor | None, relu: bool, shared: bool) -> Operand:
    """The same as codes."""
    edges = p.shape[0]
    operand = encode(x, bits, maximum, groups=1 if shared else edges, relu=relu)
    scale8 = None if operand.scale8 is None else operand.scale8.expand(edges).contiguous()
    width = x.shape[3] if shared else x.shape[3] // edges
    return replace(operand, groups=edges, width=width, shared=shared, probabilities=p.detach(), scale8=scale8)


def close(found: Tensor, wanted: Tensor, bound: float) -> None:
    """Within `bound` of the largest value."""
    size = wanted.abs().max().clamp_min(1e-6)
    assert (found - wanted).abs().max() <= bound * size, float((found - wanted).abs().max() / size)


def tolerance(dtype: torch.dtype) -> float:
    """For sums of some hundred terms, as kernels.h states it: terms x 2^-24 (2^-53) of the sum of their sizes."""
    return 1e-13 if dtype == torch.float64 else 2e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_twins(bits: tuple[int, ...], dtype: torch.dtype) -> None:
    """Random, zero, negative, huge and non-finite values, thresholds among them; alone and at every lane."""
    low = tuple(b for b in bits if b < 8)
    special = [0.0, -0.0, 1e-10, -1e-10, -1e-8, 1e-8, 1e30, -1e30, float("inf"), -float("inf"), float("nan")]
    thresholds = torch.cat([codebook(low, torch.float64, torch.device("cpu")).tops, torch.linspace(0, 3, 61)])
    for relu in (False, True):
        x = torch.cat([torch.randn(301, dtype=dtype), torch.tensor(special, dtype=dtype), thresholds.to(dtype)])
        x = x.view(1, 1, -1, 1)
        operand = encode(x, bits, torch.tensor(2.0), groups=1, relu=relu)
        assert operand.codes is not None and operand.book is not None
        assert torch.equal(operand.codes & CODE, encode_plain(x, low, relu))
        if 8 in bits:
            assert operand.codes8 is not None
            number = ~x.isnan()
            level = (x.clamp_min(0) / (torch.tensor(2.0, dtype=dtype) / 255)).round().clamp(0, 255)
            assert torch.equal(operand.codes8[number], level[number].to(torch.uint8))
            inside = (x > (0 if relu else -1e-9)) & (x <= 2.0)
            assert torch.equal((operand.codes & INSIDE8) > 0, inside)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_decoding_and_its_gradients(bits: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against autograd through the plain quantisers; what is no number stays none."""
    torch.manual_seed(0)
    edges, width, size, *_, shared = shape
    x = (2 * torch.randn(3, size, size, width if shared else edges * width, dtype=dtype)).requires_grad_()
    p = torch.rand(edges, len(bits), dtype=dtype, requires_grad=True)
    maximum = x.detach().amax() * 0.7
    wanted = mixture(x, bits, p, maximum, shared, shared)
    operand = encoded(x.detach(), bits, p, maximum, shared, shared)
    close(decode(operand), wanted, tolerance(dtype))
    gradient = torch.randn_like(wanted)
    found = decode_backward(operand, gradient, True)
    for one, other in zip(found, torch.autograd.grad(wanted, (x, p), gradient), strict=True):
        assert one is not None
        close(one, other, tolerance(dtype))
    bad = x.detach().clone()
    bad[0, 0, 0, 0], bad[1, 0, 0, 0] = float("nan"), float("inf")
    out = decode(encoded(bad, bits, p, maximum, shared, shared))
    assert out[0, 0, 0, 0].isnan() and out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bits", [*BITS, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_separable_pair(bits: tuple[int, ...] | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Quantiser, depthwise convolution, quantiser, 1x1, normalisation, strength: values and every gradient."""
    torch.manual_seed(1)
    edges, width, size, kernel, stride, dilation, shared = shape
    make = lambda *s: torch.randn(*s, dtype=dtype)  # noqa: E731
    x = (2 * make(3, size, size, width if shared else edges * width)).requires_grad_()
    p = torch.rand(edges, len(bits or ()) or 1, dtype=dtype, requires_grad=True)
    depthwise, pointwise = make(edges * width, 1, kernel, kernel), make(edges * width, width, 1, 1)
    strengths = torch.rand(edges, 3, dtype=dtype)
    leaves = [x, p, depthwise.requires_grad_(), pointwise.requires_grad_(), strengths.requires_grad_()]
    padding = dilation * (kernel - 1) // 2
    window = S.Window(kernel, stride, padding, dilation)
    maximum = torch.tensor(2.5, dtype=dtype)

    norm = torch.nn.BatchNorm2d(edges * width, affine=False, dtype=dtype)
    as_image = lambda t: t.permute(0, 3, 1, 2)  # noqa: E731
    if bits is None:
        entered = F.relu(x)
        entered = entered.repeat(1, 1, 1, edges) if shared else entered
    else:
        entered = mixture(x, bits, p, maximum, True, shared)
    y = F.conv2d(as_image(entered), depthwise, None, stride, padding, dilation, edges * width)
    inner = y if bits is None else as_image(mixture(y.permute(0, 2, 3, 1), bits, p, maximum, False, False))
    out = norm(F.conv2d(inner, pointwise, groups=edges)) * strengths[:, 1].repeat_interleave(width).view(1, -1, 1, 1)
    gradient = make(*out.shape)
    wanted = torch.autograd.grad(out, leaves, gradient, allow_unused=True)

    with torch.no_grad():
        if bits is None:
            image = Operand(edges, width, floats=F.relu(x), shared=shared, relu=True)
        else:
            image = encoded(x, bits, p, maximum, True, shared)
        rows = S.depthwise(image, window, depthwise)
        close(as_image(rows), y, tolerance(dtype))
        # the plain output, so that both round alike and only what follows is compared
        rows = y.permute(0, 2, 3, 1).contiguous()
        middle = Operand(edges, width, floats=rows) if bits is None else encoded(rows, bits, p, maximum, False, False)
        moved = [torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var), torch.zeros(()).long()]
        running = S.Running(*moved, norm.momentum, norm.eps, True)
        folded = S.normalise(middle, pointwise, running, strengths, 1)
        start = make(*(S.pointwise(middle, folded).shape))
        close(as_image(S.pointwise(middle, folded, start.clone()) - start), out, 5 * tolerance(dtype))
        for one, other in zip(moved, norm.buffers(), strict=True):
            close(one.double(), other.double(), tolerance(dtype))
        g = gradient.permute(0, 2, 3, 1).contiguous()
        d_strengths, d_p = torch.zeros_like(strengths), torch.zeros_like(p)
        d_pointwise, through = S.pointwise_backward(middle, folded, pointwise, strengths, 1, g, d_strengths)
        asked = None if bits is None else d_p
        d_x, d_depthwise = S.separable_backward(
            image, window, depthwise, middle, folded, through, g, weights=True, probabilities=asked
        )
    found = [d_x, d_p, d_depthwise, d_pointwise, d_strengths]
    for name, one, other in zip(["x", "p", "depthwise", "pointwise", "strengths"], found, wanted, strict=True):
        # one bit-width alone is a scale, which the normalisation takes away: its gradient is a sum that cancels
        if other is not None and not (name == "p" and bits is not None and len(bits) == 1):
            close(one, other, 10 * tolerance(dtype))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("stride", "columns"), [(1, (1, 2, 0)), (2, (0, 1, -1)), (1, (-1, 0, 1)), (2, (2, -1, -1))])
def test_what_edges_share(stride: int, columns: tuple[int, int, int], training: bool) -> None:
    """Poolings, normalised, and the state itself: against PyTorch's, ties and the border among the pixels."""
    torch.manual_seed(2)
    x = (
        torch.randn(4, 6, 10, 3, dtype=torch.float64)
        .round(decimals=0)
        .add(0.25 * torch.randn(4, 6, 10, 3))
        .round(decimals=1)
    )
    x.requires_grad_()
    strengths = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    norms = [torch.nn.BatchNorm2d(3, affine=False, dtype=torch.float64).train(training) for _ in range(2)]
    for norm in norms:
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    own = [[b.clone() for b in norm.buffers()] for norm in norms]
    image = x.permute(0, 3, 1, 2)
    pooled = [F.max_pool2d(image, 3, stride, 1), F.avg_pool2d(image, 3, stride, 1, count_include_pad=False), image]
    parts = [pooled[k] if k == P.SELF else norms[k](pooled[k]) for k in range(3) if columns[k] >= 0]
    used = [columns[k] for k in range(3) if columns[k] >= 0]
    wanted = sum(s.view(1, -1, 1, 1, 1) * u.unsqueeze(1) for s, u in zip(strengths.t()[used], parts, strict=True))
    wanted = wanted.flatten(1, 2).permute(0, 2, 3, 1)
    gradient = torch.randn_like(wanted).contiguous()
    running = [S.Running(*own[k], norms[k].momentum, norms[k].eps, training) for k in range(2)]
    given = [running[k] if columns[k] >= 0 else None for k in range(2)]
    found, shared = P.share(x.detach(), stride, given, strengths.detach(), columns)
    close(found, wanted, 1e-11)
    for norm, buffers in zip(norms, own, strict=True):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(norm.buffers(), buffers, strict=True))
    d_strengths = torch.zeros_like(strengths)
    d_x = P.share_backward(x.detach(), shared, strengths.detach(), gradient, d_strengths, True)
    for one, other in zip((d_x, d_strengths), torch.autograd.grad(wanted, (x, strengths), gradient), strict=True):
        assert one is not None
        close(one, other, 1e-10)


def test_the_number_of_threads_changes_no_bit() -> None:
    """Work is cut by the batch alone, and sums are taken in its order."""
    torch.manual_seed(3)
    x, gradient = torch.randn(2, 37, 8, 8, 12).unbind()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        p = torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.5, 0.5]])
        operand = encoded(x, (2, 4), p, None, False, False)
        results.append([decode(operand), *decode_backward(operand, gradient, True)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_twins_take_over() -> None:
    """Where the kernels are switched off or cannot work."""
    x = torch.zeros(1)
    assert usable(x) and not usable(x.half()) and not usable(x.to("meta"))
    with disabled():
        assert not usable(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not usable(x)
    assert usable(x)
