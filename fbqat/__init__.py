# SPDX-License-Identifier: Apache-2.0
"""FBQAT: quantisation-aware training at fixed, uniform bits. `search.py` (full precision), then `train.py`."""
