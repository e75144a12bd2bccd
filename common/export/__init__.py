# SPDX-License-Identifier: Apache-2.0
"""Trained networks as files for devices, what runs each, and the proof that it computes the same."""
