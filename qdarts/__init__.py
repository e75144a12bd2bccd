# SPDX-License-Identifier: Apache-2.0
"""QDARTS: cells and bit-widths searched together. `search.py`, then `train.py`."""
