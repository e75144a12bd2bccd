# SPDX-License-Identifier: Apache-2.0
"""DARTS and PC-DARTS: cells in full precision. `search.py`, then `train.py`."""
