"""Tensors as blocks with digests, and memory for blocks that come."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash

from ftrain.comms import wire
from ftrain.comms.errors import UsageError
from ftrain.comms.fleet.collectives import memory
from ftrain.comms.fleet.protocol import state_messages
from ftrain.comms.fleet.protocol.shared_state import BLOCK_BYTES, BlockId, Plan, TensorEntry
from ftrain.comms.fleet.protocol.state_messages import StateContent

CONTENT_BYTES_MAX = 256 * 1024 * 1024

wire.register(
    state_messages.StateWord,
    state_messages.StateContent,
    state_messages.StateAsk,
    state_messages.StateAnswer,
)


class Snapshot:
    """Tensors, at a revision, with the digests of what they hold now.

    Args:
        tensors: contiguous, on the CPU, of any shape and dtype; their memory is read later on.

    Raises UsageError for tensors that can't be shared.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], revision: int) -> None:
        self.revision = revision
        self.views = tuple(_memory(key, tensors[key]) for key in _sorted(tensors))
        self.content = tuple(
            TensorEntry(
                key,
                str(tensors[key].dtype).removeprefix("torch."),
                tuple(tensors[key].shape),
                view.nbytes,
                _digests(view),
            )
            for key, view in zip(_sorted(tensors), self.views, strict=True)
        )
        self.encoded = wire.encode(StateContent(self.content))
        if len(self.encoded) > CONTENT_BYTES_MAX:
            raise UsageError(f"the list of tensors takes more than {CONTENT_BYTES_MAX} bytes")
        self.digest = xxhash.xxh3_128_digest(self.encoded)

    def blocks(self, wanted: tuple[BlockId, ...]) -> list[memoryview] | None:
        """The bytes of some blocks; None if there is one that is not here."""
        found = []
        for number, block in wanted:
            if not 0 <= number < len(self.content):
                return None
            if not 0 <= block < len(self.content[number].digests):
                return None
            start, stop = self.content[number].span(block)
            found.append(self.views[number][start:stop])
        return found


class Landing:
    """Where the blocks of elected contents arrive; may be used from any thread.

    Args:
        in_place: in the tensors at once; else beside them, until :meth:`commit`, so that they stay
            as they were if the rest does not arrive.
    """

    def __init__(self, views: tuple[memoryview, ...], *, in_place: bool) -> None:
        self._views = views
        self._in_place = in_place
        self._beside: dict[BlockId, tuple[bytes, memoryview]] = {}

    def room(self, plan: Plan, block: BlockId) -> memoryview:
        """Memory for a block that is under way."""
        start, stop = plan.content[block[0]].span(block[1])
        if self._in_place:
            return self._views[block[0]][start:stop]
        return memoryview(bytearray(stop - start))

    def arrived(self, block: BlockId, digest: bytes, room: memoryview) -> None:
        """A block is there, and is right."""
        if not self._in_place:
            self._beside[block] = digest, room

    def has(self, block: BlockId, digest: bytes) -> bool:
        """Whether a block arrived before, in an attempt that failed."""
        return block in self._beside and self._beside[block][0] == digest

    def commit(self, plan: Plan, member: int) -> None:
        """Put what a member lacked into its tensors."""
        if self._in_place:
            return
        for blocks in plan.fetches.get(member, {}).values():
            for block in blocks:
                start, stop = plan.content[block[0]].span(block[1])
                self._views[block[0]][start:stop] = self._beside.pop(block)[1]


def _sorted(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    if any(not isinstance(key, str) for key in tensors):
        raise UsageError("tensors that are shared have strings as keys")
    return sorted(tensors)


def _memory(key: str, tensor: torch.Tensor) -> memoryview:
    if tensor.device.type != "cpu":
        raise UsageError(
            f"tensor {key!r} is on {tensor.device}: shared state is on the CPU, copy it there first"
        )
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise UsageError(
            f"tensor {key!r} is not contiguous: give shared state a contiguous one, which it may"
            " write into"
        )
    return memory(tensor)


def _digests(view: memoryview) -> tuple[bytes, ...]:
    """Reads in place; the interpreter lock is released meanwhile."""
    starts = range(0, view.nbytes, BLOCK_BYTES)
    return tuple(xxhash.xxh3_128_digest(view[start : start + BLOCK_BYTES]) for start in starts)
