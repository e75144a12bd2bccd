# SPDX-License-Identifier: Apache-2.0
"""The ENAS FILL of tests/oracles/README.md: every tensor in TensorFlow's layout, then turned to torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.fill import waves

# The sample in the public README.
README_ARC = "0 2 1 4 1 3 0 1 1 0 1 0 1 2 0 4 0 0 0 1\n1 3 1 4 0 1 1 1 1 2 1 4 3 2 0 2 1 1 0 3"
LABELS = torch.tensor([3, 7, 1, 9])


def images(channels: int = 3) -> Tensor:
    """The oracle's batch: cos(i*i) as [4, 32, 32, C], in torch's layout."""
    return waves((4, 32, 32, channels), "cos").permute(0, 3, 1, 2).contiguous()


def conv_weight(shape: torch.Size, depthwise: bool) -> Tensor:
    """sin(i*i) in TensorFlow's layout, as torch's [out, in, k, k]; a depthwise kernel is [k, k, channels, 1] there."""
    out, inner, height, width = shape
    if depthwise:
        return waves((height, width, out, 1)).permute(2, 3, 0, 1)
    return waves((height, width, inner, out)).permute(3, 2, 0, 1)


@torch.no_grad()
def fill_enas(network: nn.Module) -> nn.Module:
    """Fill a network of own weights in place; returns it in float64."""
    network.double()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            depthwise = module.groups > 1 or (module.weight.shape[1] == 1 and module.kernel_size[0] > 1)
            module.weight.copy_(conv_weight(module.weight.shape, depthwise))
        elif isinstance(module, nn.Linear):
            module.weight.copy_(waves(module.weight.t().shape).t())
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.copy_(1 + 0.1 * waves(module.weight.shape))
            module.bias.copy_(0.1 * waves(module.bias.shape))
    return network


def source_hinge(logits: Tensor, labels: Tensor) -> Tensor:
    """The source's hinge, written from its formula: targets +1 and -3, mean over batch and classes."""
    targets = torch.full_like(logits, -3.0)
    for row, label in enumerate(labels.tolist()):
        targets[row, label] = 1.0
    return (1 - targets * logits).clamp_min(0).mean()


@torch.no_grad()
def fill_shared(child: nn.Module) -> nn.Module:
    """Fill a child of shared weights in place; its tables are filled whole, [inputs, numel of one row]."""
    fill_enas(child)
    for layer in child.layers:
        cell = layer.cell
        for key, module in cell.separable.items():
            place, kernel = key.split("_")
            block, node, k = int(place[:-2]), int(place[-1]), int(kernel)
            f = module.bn1.num_features
            for stack in ("1", "2"):
                depth, point = getattr(module, f"depthwise{stack}"), getattr(module, f"pointwise{stack}")
                bn = getattr(module, f"bn{stack}")
                rows = block + 2
                depth.weight.copy_(waves((rows, k * k * f))[node].view(k, k, f, 1).permute(2, 3, 0, 1))
                point.weight.copy_(waves((rows, f * f))[node].view(1, 1, f, f).permute(3, 2, 0, 1))
                bn.weight.copy_(1 + 0.1 * waves((rows, f))[node])
                bn.bias.copy_(0.1 * waves((rows, f))[node])
        f = cell.final_bn.num_features
        for node, conv in enumerate(cell.final):
            conv.weight.copy_(waves((len(cell.final), f * f))[node].view(1, 1, f, f).permute(3, 2, 0, 1))
    return child
