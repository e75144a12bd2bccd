# SPDX-License-Identifier: Apache-2.0
"""PTQ: a full-precision network, quantised after its training. `search.py`, `train.py`, then `quantize.py`."""
