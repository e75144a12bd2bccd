# SPDX-License-Identifier: Apache-2.0
"""Small integers packed without gaps: n numbers of b bits take ceil(n b / 8) bytes.

Number i takes the bits i b ... i b + b - 1 of one long row of bits, lowest bit first, and the row fills each byte from
its lowest bit up. At 1, 2, 4 and 8 bits no number crosses a byte; at 3, 5, 6 and 7 some do. The bits that are left in
the last byte are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

PACKED_BITS = tuple(range(1, 9))


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` numbers of `bits` bits take. Raises ValueError for other bits than 1 to 8."""
    if bits not in PACKED_BITS:
        raise ValueError(f"bits: {bits} cannot be packed; choose among 1 to 8")
    return (count * bits + 7) // 8


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Integers 0 ... 2^bits - 1 of any shape and integer type -> uint8 [packed_bytes(numel, bits)], in row-major order.

    Raises ValueError where bits are not 1 to 8, or a number does not fit.
    """
    size = packed_bytes(numbers.numel(), bits)
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < 2**bits:
        raise ValueError(f"numbers from {int(numbers.min())} to {int(numbers.max())} do not fit into {bits} bits")
    flat = numbers.reshape(-1).to(torch.uint8)
    if bits == 8:
        return flat.clone()
    row = torch.zeros(8 * size, dtype=torch.uint8, device=flat.device)
    row[: flat.numel() * bits] = ((flat[:, None] >> _places(bits, flat)) & 1).reshape(-1)
    return (row.view(-1, 8) << _places(8, flat)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """What `pack` was given, as uint8 [count]. Raises ValueError where the bytes are not exactly those of `count`
    numbers of `bits` bits.
    """
    size = packed_bytes(count, bits)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        found = f"{str(packed.dtype).removeprefix('torch.')} {list(packed.shape)}"
        raise ValueError(f"{count} numbers of {bits} bits are {size} bytes, and these are {found}")
    if bits == 8:
        return packed.clone()
    row = ((packed[:, None] >> _places(8, packed)) & 1).reshape(-1)
    if row[count * bits :].any():
        raise ValueError(f"{count} numbers of {bits} bits end in the last byte, and what follows them is not zero")
    return (row[: count * bits].view(count, bits) << _places(bits, packed)).sum(1, dtype=torch.uint8)


def _places(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, dtype=torch.uint8, device=like.device)
