# SPDX-License-Identifier: Apache-2.0
"""Runs the Triton kernels of the mixed activation on a CPU, in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/helpers/triton_interpreted.py CASES RESULTS

Both are files of torch.save. The interpreter is chosen when Triton is imported, hence a process of its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor


def main(source: str, target: str) -> None:
    """Results of every case, in the cases' order."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "Triton must not look for a GPU"
    torch.set_num_threads(1)
    torch.save([RUNS[case["run"]](case) for case in torch.load(source, weights_only=True)], target)


def primitives(case: dict[str, Any]) -> dict[str, Tensor]:
    """The kernels one by one, and the mixture where no gradient is recorded."""
    from common.quant.kernels import triton as kernels

    x, p, gradient, channels, bits = (case[key] for key in ("x", "p", "gradient", "channels", "bits"))
    values, codes = kernels.mixed_forward(x, p, channels, bits)
    assert codes is not None
    x_gradient, p_gradient = kernels.mixed_backward(codes, gradient, p, channels, bits)
    with torch.no_grad():
        unrecorded = kernels.mixed(x, p, channels, bits)
    return {
        "values": values,
        "codes": codes,
        "unrecorded": unrecorded,
        "x_gradient": x_gradient,
        "p_gradient": p_gradient,
    }


def _second(case: dict[str, Any]) -> dict[str, Tensor]:
    """First gradients under create_graph, and the gradients of a function of them; bytes kept for the backward."""
    from common.quant.kernels import triton as kernels

    x, p, gradient = (case[key].requires_grad_() for key in ("x", "p", "gradient"))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mixture = kernels.mixed(x, p, case["channels"], case["bits"])
    first = torch.autograd.grad(mixture, (x, p), gradient, create_graph=True)
    scalar = (first[0] * case["x_probe"]).sum() + (first[1] * case["p_probe"]).sum()
    second = torch.autograd.grad(scalar, (x, p, gradient))
    names = ("x_gradient", "p_gradient", "second_x", "second_p", "second_gradient")
    results = {name: found.detach() for name, found in zip(names, (*first, *second), strict=True)}
    return {**results, "kept": torch.tensor(sum(kept.values()))}


def _supernet(case: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and all gradients of a small supernet whose mixtures are the kernels', or (`twin`) plain operations."""
    from common.nets import build_supernet
    from common.quant import kernels, layers
    from common.quant.kernels import triton

    calls = 0

    def counted(x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return None if case["twin"] else triton

    layers._gpu_kernels = counted
    torch.manual_seed(0)
    net = build_supernet(
        method="pc-darts", bits=case["bits"], num_classes=3, init_channels=8, layers=3, nodes=2, multiplier=2
    ).double()
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    with kernels.disabled():  # those of the CPU
        loss = torch.nn.functional.cross_entropy(net(x), y)
    assert calls > 0
    arch, weights = net.arch_parameters(), [*net.weight_parameters(), *net.gamma_parameters()]
    inner = torch.autograd.grad(loss, weights, create_graph=True)
    outer = torch.autograd.grad(sum((g * g).sum() for g in inner), [*arch, *weights])
    return {"loss": loss.detach(), "inner": _flat(inner), "outer": _flat(outer)}


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


RUNS = {"primitives": primitives, "second": _second, "supernet": _supernet}

if __name__ == "__main__":
    main(*sys.argv[1:])
