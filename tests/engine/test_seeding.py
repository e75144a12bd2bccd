# SPDX-License-Identifier: Apache-2.0
"""Seeds derive apart from each other, and every generator's state comes back."""

from __future__ import annotations

import io
import random

import pytest
import torch

from common.engine.seeding import derive, rng_state, seed_everything, set_rng_state


def test_derive_is_stable_63_bit_and_spreads() -> None:
    # A changed value would change every run: sha256 of '[0, "train"]', first 8 bytes, shifted by one.
    import hashlib

    expected = int(hashlib.sha256(b'[0, "train"]').hexdigest()[:16], 16) // 2
    assert derive(0, "train") == expected
    seeds = {derive(seed, word, step) for seed in range(10) for word in ("a", "b") for step in range(50)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive(0, 1) != derive(0, "1")
    assert derive(0, "ab") != derive(0, "a", "b")
    torch.Generator().manual_seed(max(seeds))


def draw() -> tuple[float, float, list[float]]:
    return random.random(), random.gauss(0, 1), torch.randn(3).tolist()


def test_same_seed_same_draws() -> None:
    seed_everything(3)
    first = draw()
    seed_everything(3)
    assert draw() == first
    seed_everything(4)
    assert draw() != first


def test_state_survives_a_weights_only_round_trip() -> None:
    seed_everything(3)
    random.gauss(0, 1)  # leaves a second gauss value pending
    buffer = io.BytesIO()
    torch.save(rng_state(), buffer)
    expected = draw()
    buffer.seek(0)
    draw()
    set_rng_state(torch.load(buffer, weights_only=True))
    assert draw() == expected


def test_a_cuda_state_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="CUDA"):
        set_rng_state({**rng_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)]})


def test_deterministic_switches_both_ways() -> None:
    try:
        seed_everything(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        seed_everything(0)
    assert not torch.are_deterministic_algorithms_enabled()
