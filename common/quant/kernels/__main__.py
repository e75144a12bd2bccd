# SPDX-License-Identifier: Apache-2.0
"""Build the native kernels now rather than at the first step, and say whether they are there.

python -m common.quant.kernels
"""

from __future__ import annotations

import sys

from common.quant.kernels import native


def main() -> int:
    """0 where the kernels can be used, 1 where everything is computed without them."""
    if native.library() is None:
        return 1
    print("native kernels: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
