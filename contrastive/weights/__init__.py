# SPDX-License-Identifier: Apache-2.0
"""Weights read from and written for other programs."""
