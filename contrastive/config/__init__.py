# SPDX-License-Identifier: Apache-2.0
"""The configuration: fields, flags, resolution."""
