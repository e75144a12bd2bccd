# SPDX-License-Identifier: Apache-2.0
"""Seeds: every random stream has a name and is derived from the run's one seed; every generator's state is saved.

Only python's `random` and torch's generators are used. numpy's legacy global generator is neither seeded nor saved,
because its state cannot be loaded with weights_only=True; code that needs numpy makes `default_rng(derive(...))`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from typing import Any

import torch


def derive(seed: int, *words: str | int) -> int:
    """A 63-bit seed for the stream named by `words`: sha256 of (seed, words), so streams never share a sequence.

    `derive(0, "train", 3)` and `derive(0, "train", "3")` differ: the types of the words count.
    """
    name = json.dumps([seed, *words]).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed python's and torch's global generators (every CUDA device too).

    `deterministic` also turns on torch's deterministic algorithms and turns cuDNN's search for the fastest kernel off,
    so that two runs on the same machine are bit-equal on CUDA as well; on CPU they are either way.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS reads it when its handle is made; a user's own choice stays.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    if deterministic != torch.are_deterministic_algorithms_enabled():
        # Not called without need: it imports torch's compiler, which takes seconds.
        torch.use_deterministic_algorithms(deterministic)


def rng_state() -> dict[str, Any]:
    """The states of python's random, torch's CPU generator and every CUDA device's, loadable with weights_only=True."""
    # A CPU run must not start CUDA only to save the state of generators that it never used.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave. Raises ValueError for a CUDA run's state on a machine without CUDA."""
    if state["cuda"] and not torch.cuda.is_available():
        raise ValueError("the checkpoint was made on CUDA and this machine has none: it cannot go on bit-exactly here")
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    for device, one in enumerate(state["cuda"][: torch.cuda.device_count()] if state["cuda"] else []):
        torch.cuda.set_rng_state(one, device)
