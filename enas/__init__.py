# SPDX-License-Identifier: Apache-2.0
"""ENAS over quantised cells: a controller, a child of shared weights, and REINFORCE."""
