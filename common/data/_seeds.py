# SPDX-License-Identifier: Apache-2.0
"""Named random generators of this room: every draw is a function of a seed and of words that say what it is for."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *words: str | int) -> torch.Generator:
    """A CPU generator seeded by sha256 over `seed` and `words`; equal arguments give equal draws in any process.

    The words are joined with their types and lengths, so that ("a", 12) and ("a1", 2) differ.
    """
    text = "".join(f"{type(word).__name__}{len(str(word))}:{word};" for word in (seed, *words))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
