# SPDX-License-Identifier: Apache-2.0
"""Encoders besides the ResNets, and the layers and heads of all networks."""
