# SPDX-License-Identifier: Apache-2.0
"""Folding leaves a network's outputs in evaluation mode equal, in float64, and leaves no normalisation behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from common.nets import Network, build_network
from common.quant import fold_normalization
from genotypes import GENOTYPES


def network(name: str, stem: str, auxiliary: bool = False) -> Network:
    """A tiny network in float64 whose normalisations do something."""
    torch.manual_seed(0)
    sizes = {"num_classes": 5, "init_channels": 4, "layers": 3, "auxiliary": auxiliary}
    model = build_network(GENOTYPES[name], stem=stem, **sizes).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", list(GENOTYPES))
@torch.no_grad()
def test_logits_are_equal_and_no_normalization_is_left(name: str, stem: str) -> None:
    model = network(name, stem)
    folded = copy.deepcopy(model)
    fold_normalization(folded)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(folded(x)[0], model(x)[0], rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    scales = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    size = [sum(p.numel() for p in m.parameters()) for m in (model, folded)]
    assert size[0] - size[1] == scales  # each shift lives on as a bias


def test_every_part_changes() -> None:
    """Not equal because nothing happens: each folded weight differs, the classifier and depthwise ones do not."""
    model = network("PC_DARTS_cifar", "cifar")
    before = copy.deepcopy(model.state_dict())
    fold_normalization(model)
    after = model.state_dict()
    same = {name for name, tensor in before.items() if name in after and torch.equal(after[name], tensor)}
    assert all("depthwise" in name or name.startswith("classifier") for name in same)
    assert {name for name in after if "depthwise" in name} <= same


@torch.no_grad()
def test_the_auxiliary_head_and_unknown_modules_are_left_alone() -> None:
    model = network("PC_DARTS_cifar", "cifar", auxiliary=True)
    fold_normalization(model)
    assert isinstance(model.auxiliary_head.bn1, nn.BatchNorm2d)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    own = Own()
    fold_normalization(own)
    assert isinstance(own.bn, nn.BatchNorm2d)


@torch.no_grad()
def test_a_bias_and_a_normalization_without_parameters() -> None:
    pair = nn.Sequential(nn.Conv2d(2, 3, 1, bias=True), nn.BatchNorm2d(3, affine=False)).double().eval()
    pair[1].running_mean.normal_()
    pair[1].running_var.uniform_(0.2, 3)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    expected = pair(x)
    fold_normalization(pair)
    torch.testing.assert_close(pair(x), expected)
