# SPDX-License-Identifier: Apache-2.0
"""The modes of `run.py`, one file each."""
