# SPDX-License-Identifier: Apache-2.0
"""What two or more methods share: data, quantisation, networks, cost, the engine and its recipes."""
