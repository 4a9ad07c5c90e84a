"""The entry point ``torchrun.handlers``: nothing is imported before torchrun asks for the handler.

torch loads every entry point while it imports its own rendezvous package; one that imports that
package in turn would meet it half made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousParameters


def get_handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What the entry point group wants: a call without arguments that returns the creator."""

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        from ftrain.launch.rendezvous import create_handler

        return create_handler(parameters)

    return create
