# SPDX-License-Identifier: Apache-2.0
"""Packing is its own inverse at every width and length, and its bytes are those of one long number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.quant.packing import PACKED_BITS, pack, packed_bytes, unpack
from tests.helpers.mangled import many


def as_one_number(numbers: list[int], bits: int) -> bytes:
    """Independent of any tensor: every number shifted to its place in one large integer."""
    whole = sum(number << place * bits for place, number in enumerate(numbers))
    return whole.to_bytes((len(numbers) * bits + 7) // 8, "little")


@many(150)
@given(st.data(), st.sampled_from(PACKED_BITS), st.integers(0, 67))
def test_bytes_and_inverse(data: st.DataObject, bits: int, length: int) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length))
    packed = pack(torch.tensor(numbers, dtype=torch.int64), bits)
    assert packed.numpy().tobytes() == as_one_number(numbers, bits)
    assert unpack(packed, bits, length).tolist() == numbers
    assert len(packed) == packed_bytes(length, bits)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_shapes_types_and_many_numbers(bits: int) -> None:
    torch.manual_seed(0)
    numbers = torch.randint(2**bits, (13, 7, 5, 3), dtype=torch.int16)
    packed = pack(numbers, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-13 * 7 * 5 * 3 * bits // 8)
    assert torch.equal(unpack(packed, bits, numbers.numel()).view(numbers.shape).short(), numbers)
    turned = numbers.permute(3, 1, 0, 2)  # row-major order of what is given, not of its memory
    assert torch.equal(unpack(pack(turned, bits), bits, numbers.numel()), turned.reshape(-1).byte())


def test_what_does_not_fit_is_refused() -> None:
    for numbers in ([4], [-1], [0, 255]):
        with pytest.raises(ValueError, match="do not fit into 2 bits"):
            pack(torch.tensor(numbers), 2)
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match="cannot be packed"):
            pack(torch.tensor([0]), bits)
    good = pack(torch.tensor([1, 2, 3]), 3)
    for bad in (good[:1], torch.cat([good, good]), good.short()):
        with pytest.raises(ValueError, match="3 numbers of 3 bits are 2 bytes"):
            unpack(bad, 3, 3)
    good[1] |= 128
    with pytest.raises(ValueError, match="not zero"):
        unpack(good, 3, 3)
