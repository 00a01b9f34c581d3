# SPDX-License-Identifier: Apache-2.0
"""Reads pickles and torch files as data, executing nothing."""
