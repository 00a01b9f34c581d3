# SPDX-License-Identifier: Apache-2.0
"""The objectives, one file a family; `objective.py` at the root lists them."""
