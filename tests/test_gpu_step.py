# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a GPU: its path on any machine, its refusal without a card, the steps that its estimate counts."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu_step


def test_refused_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device.*--smoke"):
        gpu_step.main([])


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_step.main(["--smoke", "--sides", "plain", "triton", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sides"].keys() == {"plain", "triton"} and result["ratios"].keys() == {"triton"}
    assert all(side["iteration"] > 0 for side in result["sides"].values())
    assert result["estimate"]["minutes"].keys() == {"plain", "triton"}


def test_estimated_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """97 batches of 256 in 25,000 images; the architecture rests in the warm-up and moves every so many steps."""
    recipe = gpu_step.PRESETS["fast"].__class__("", search={"warmup_epochs": 10, "arch_every": 2})
    monkeypatch.setitem(gpu_step.PRESETS, "fast", recipe)
    assert gpu_step.fast_steps(50, 256) == {"weight_step": 50 * 97, "architecture_step": 40 * 97 // 2}
