# SPDX-License-Identifier: Apache-2.0
"""Everything beside the seven files at the root, by concern."""
