# SPDX-License-Identifier: Apache-2.0
"""Strategies, Cloud TPU and its compiler."""
