# SPDX-License-Identifier: Apache-2.0
"""Progress, events and the report page."""
