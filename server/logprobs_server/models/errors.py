"""The one error of this package. Knows nothing of where it is raised."""

from __future__ import annotations

__all__ = ["ModelNotUsableError"]


class ModelNotUsableError(Exception):
    """A model that cannot be served; the message is one sentence for the operator: what, where and why."""
