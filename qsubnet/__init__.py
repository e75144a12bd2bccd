# SPDX-License-Identifier: Apache-2.0
"""QSubNet: bit-widths of every convolution of a fixed network, by EdMIPS. `search.py`, then `train.py`."""
