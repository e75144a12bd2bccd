# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the mixed activation: run in Triton's interpreter against the formulas written out here, and
compiled for GPUs. No GPU is needed, and none is used.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

STEP = {1: 0.799, 2: 0.538, 3: 0.3217, 4: 0.185}
SPECIAL = [0.0, -0.0, 1e-10, -1e-10, -1e-8, 3e38, -3e38, float("inf"), -float("inf"), 1.614, 2.775, 0.799, 2.2519]
# (bits, groups, channels, shared, rows); widths that are no power of two, a last tile that is not full
SHAPES = [
    ((2, 4), 1, 4, False, 300),
    ((2, 4), 3, 4, False, 300),
    ((2, 4), 5, 6, True, 200),
    ((4, 2), 2, 3, False, 90),
    ((1, 2, 3, 4), 2, 5, True, 250),
    ((3,), 4, 2, True, 64),
]
Case = dict[str, Any]


def interpret(cases: Sequence[Case], folder: Path) -> list[dict[str, Tensor]]:
    """The kernels' results for each case."""
    source, target = folder / "cases.pt", folder / "results.pt"
    torch.save(list(cases), source)
    program = Path(__file__).resolve().parents[1] / "helpers" / "triton_interpreted.py"
    command = [sys.executable, str(program), str(source), str(target)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(target, weights_only=True)


def make_case(
    bits: tuple[int, ...], groups: int, channels: int, shared: bool, rows: int, dtype: torch.dtype, run: str
) -> Case:
    """Random operands, seeded; x has zeros, negatives, and values beyond every range."""
    random = torch.Generator().manual_seed(rows)
    normal = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    x = normal(rows, channels if shared else groups * channels) * 1.5
    x[normal(*x.shape) > 1.2] = 0
    case = {
        "x": x.to(dtype),
        "p": normal(groups, len(bits)).softmax(1).to(torch.float32 if dtype == torch.bfloat16 else dtype),
        "gradient": normal(rows, groups * channels).to(dtype),
        "channels": channels,
        "bits": bits,
        "run": run,
    }
    return case


def levels(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """HWGQ of x in its own precision, and its straight-through mask (bounds inclusive, |x| < 1e-9 is zero)."""
    top = STEP[bits] * (2**bits - 1)
    return torch.round(x.clamp(0, top) / STEP[bits]) * STEP[bits], (x > -1e-9) & (x <= top)


def split(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, groups or 1, c], p [groups, bits], gradient [N, groups, c]."""
    x, p, gradient = (case[name].to(dtype) for name in ("x", "p", "gradient"))
    c = case["channels"]
    return x.view(len(x), x.shape[1] // c, c), p, gradient.view(len(x), len(p), c)


def wanted(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the kernels must give, in plain operations of `dtype`."""
    x, p, gradient = split(case, dtype)
    values, x_gradient, p_gradient = 0, torch.zeros_like(gradient), []
    for position, bits in enumerate(case["bits"]):
        value, mask = levels(x, bits)
        weight = p[:, position].view(1, -1, 1)
        values = values + value * weight
        x_gradient = x_gradient + gradient * (mask * weight)
        p_gradient.append((gradient * value).sum((0, 2)))
    if x.shape[1] == 1:
        x_gradient = x_gradient.sum(1)
    return {
        "values": values.flatten(1),
        "x_gradient": x_gradient.flatten(1),
        "p_gradient": torch.stack(p_gradient, 1),
    }


def code_of(x: Tensor, bits: tuple[int, ...]) -> Tensor:
    """The number of steps below x: of the mask, of every width's levels, of every range's end. A NaN comes last."""
    code = (x > -1e-9).long()
    for b in bits:
        code += torch.round(levels(x, b)[0] / STEP[b]).nan_to_num(0).long() + (x > STEP[b] * (2**b - 1))
    largest = 1 + sum(2**b for b in bits)
    return torch.where(x.isnan(), largest + 1, code)


def all_cases() -> list[Case]:
    """Shapes and types; special values; no pixels; rows that lie apart."""
    cases = [make_case(*s, dtype, "primitives") for s in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    cases.append(make_case(*SHAPES[1], torch.float64, "primitives"))
    for special in (SPECIAL, [*SPECIAL, float("nan")]):  # a NaN spreads to every sum: apart
        case = make_case((2, 4), 3, 2, True, len(special), torch.float32, "primitives")
        case["x"] = torch.tensor(special).unsqueeze(1).repeat(1, 2)
        cases.append(case)
    cases.append(make_case((2, 4), 2, 4, False, 0, torch.float32, "primitives"))
    sliced = make_case((2, 4), 1, 4, False, 50, torch.float32, "primitives")
    sliced["x"] = torch.cat([sliced["x"], torch.ones(50, 12)], 1)[:, :4]
    assert not sliced["x"].is_contiguous()
    return [*cases, sliced]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, dict[str, Tensor]]]:
    """All cases of one call of the kernels, run in one process: starting it costs more than they do."""
    cases = all_cases()
    return list(zip(cases, interpret(cases, tmp_path_factory.mktemp("triton")), strict=True))


def check_values(case: Case, found: dict[str, Tensor]) -> None:
    """Assert the mixture and the gradients of one case."""
    kind = case["x"].dtype
    work = torch.promote_types(kind, torch.float32)
    exact = wanted(case, work)
    # bfloat16 in and out, float32 between: one rounding, which the interpreter makes towards zero. Sums of tiles
    # take another order.
    close = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7}[kind]
    summed = 1e-13 if kind == torch.float64 else 2e-5
    for name, bound in (("values", close), ("x_gradient", close), ("p_gradient", summed)):
        assert found[name].dtype == (kind if name != "p_gradient" else case["p"].dtype)
        torch.testing.assert_close(found[name].to(work), exact[name].to(work), rtol=bound, atol=bound, equal_nan=True)
    assert torch.equal(found["unrecorded"].nan_to_num(9), found["values"].nan_to_num(9))


def check_codes(case: Case, found: dict[str, Tensor]) -> None:
    """Assert the codes of one case, all of them: the interpreter and a card divide exactly."""
    x = case["x"].to(torch.promote_types(case["x"].dtype, torch.float32))
    assert found["codes"].dtype == torch.uint8
    assert torch.equal(found["codes"].long(), code_of(x, case["bits"]))


def test_values_and_gradients(results: list[tuple[Case, dict[str, Tensor]]]) -> None:
    for case, found in results:
        check_values(case, found)


def test_codes(results: list[tuple[Case, dict[str, Tensor]]]) -> None:
    for case, found in results:
        check_codes(case, found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card() -> None:
    """The same on a GPU, where there is one."""
    from tests.helpers.triton_interpreted import primitives

    for case in all_cases():
        on_card = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in case.items()}
        found = {name: value.cpu() for name, value in primitives(on_card).items()}
        check_values(case, found)
        check_codes(case, found)


def test_nan_is_seen(results: list[tuple[Case, dict[str, Tensor]]]) -> None:
    """A NaN must not become a level: the loops stop at a loss that is not finite."""
    case, found = next((c, f) for c, f in results if c["x"].isnan().any())
    assert torch.equal(found["values"].isnan(), case["x"].isnan().repeat(1, 3))
    assert found["p_gradient"].isnan().all()
    assert (found["x_gradient"][case["x"].isnan()] == 0).all()


def test_second_order_and_memory(tmp_path: Path) -> None:
    """Under create_graph the gradients are those of the straight-through surrogate, and can be differentiated again."""
    cases = []
    for shape in SHAPES:
        case = make_case(*shape, torch.float64, "second")
        random = torch.Generator().manual_seed(1)
        for name, like in (("x_probe", "x"), ("p_probe", "p")):
            case[name] = torch.randn(case[like].shape, generator=random, dtype=torch.float64)
        cases.append(case)
    for case, found in zip(cases, interpret(cases, tmp_path), strict=True):
        leaves = [case[name].clone().requires_grad_() for name in ("x", "p", "gradient")]
        x, p, gradient = split({**case, **dict(zip(("x", "p", "gradient"), leaves, strict=True))}, torch.float64)
        mixture = 0
        for position, bits in enumerate(case["bits"]):
            value, mask = levels(x.detach(), bits)
            surrogate = value + mask * (x - x.detach())
            mixture = mixture + surrogate * p[:, position].view(1, -1, 1)
        first = torch.autograd.grad(mixture, leaves[:2], gradient, create_graph=True)
        scalar = (first[0] * case["x_probe"]).sum() + (first[1] * case["p_probe"]).sum()
        exact = (*first, *torch.autograd.grad(scalar, leaves))
        names = ("x_gradient", "p_gradient", "second_x", "second_p", "second_gradient")
        for name, value in zip(names, exact, strict=True):
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
        # one byte an element, the probabilities and the anchor's one element: x itself is not kept
        assert found["kept"] == case["x"].numel() + 8 * (case["p"].numel() + 1)


@pytest.mark.slow
def test_supernet(tmp_path: Path) -> None:
    """The dispatch: a supernet whose mixtures run in the kernels, against its plain form, to the second order."""
    cases = [{"run": "supernet", "bits": (2, 4), "twin": twin} for twin in (True, False)]
    plain, fused = interpret(cases, tmp_path)
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-8, atol=1e-10)


def test_the_kernels_are_only_for_gpus() -> None:
    from common.quant import kernels, layers

    assert kernels.triton_kernels() is not None
    assert layers._gpu_kernels(torch.ones(2, 2)) is None
    with kernels.disabled():
        assert kernels.triton_kernels() is None


def test_a_card_that_triton_does_not_serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The twin computes, and that is said once."""
    from common.quant import kernels
    from common.quant.kernels import triton

    def probe() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "probe", probe)
    kernels._triton.cache_clear()
    try:
        assert kernels.triton_kernels() is None and kernels.triton_kernels() is None
        assert capsys.readouterr().err.count("Failed to find C compiler") == 1
    finally:
        kernels._triton.cache_clear()


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way to machine code of an Ampere and a Hopper card, as a launch would ask for it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from common.quant.kernels import triton as kernels

    for name, signature, constants in launches(kernels):
        assert compile_kernel(getattr(kernels, name), signature, constants, capability), name


def launches(kernels: Any) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """(kernel, types of its arguments, its constants) of bfloat16 launches with shared codes."""
    import triton.language as tl

    shared = {"C": 6, "BLOCK": 8, "ROWS": 128, "SHARED": True, "TABLE": 64, "WORK": tl.float32}
    steps = {"STEPS": (0.538, 0.185), "TOPS": (1.614, 2.775), "ZERO": 1e-9, "NAN": 22, "SHIFT": 1.5 * 2.0**23}
    tensors = {"codes": "*u8", "p": "*fp32", "levels": "*fp32", "rows": "i32", "groups": "i32"}
    forward = {**tensors, "x": "*bf16", "out": "*bf16"}
    backward = {**tensors, "gradient": "*bf16", "x_gradient": "*bf16", "partial": "*fp32"}
    return [
        ("_forward_kernel", forward, {**shared, **steps, "STORE": True}),
        ("_backward_kernel", backward, {**shared, "LAST": kernels.last_codes((2, 4))}),
    ]


def compile_kernel(kernel: Any, signature: dict[str, str], constants: dict[str, Any], capability: int) -> bytes:
    """The cubin of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    return compiled.asm["cubin"]
