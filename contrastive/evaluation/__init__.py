# SPDX-License-Identifier: Apache-2.0
"""Features, the probe and embeddings."""
