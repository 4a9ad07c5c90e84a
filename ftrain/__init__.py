"""ftrain: fault-tolerant distributed training on PyTorch.

The public names; everything else may change.  ``import ftrain`` stays cheap: torch is imported
only when :class:`Session` is first touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftrain.runtime.session import Session

__all__ = ["Session", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Session":
        from ftrain.runtime.session import Session

        return Session
    raise AttributeError(f"module 'ftrain' has no attribute {name!r}")
