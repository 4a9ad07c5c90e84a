"""How a ring's chunks travel: as they are, or quantised.

The ring says what is to be done with a chunk; a codec does it, from the lane it comes in by to the
lane it leaves by.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ftrain.comms.collectives.arithmetic import Arithmetic, Reduction
from ftrain.comms.collectives.lanes import InLane, OutLane
from ftrain.comms.collectives.quantise import Quantisation, Quantiser, Scratch
from ftrain.comms.errors import UsageError
from ftrain.comms.protocol.chunk_frames import Head
from ftrain.comms.protocol.ring import Kind


class Codec(Protocol):
    """Of one operation.  ``head`` is that of the chunk that goes out."""

    def wire_bytes(self, nbytes: int) -> int:
        """Of so many bytes of values, at most as many, or 15 where they are fewer."""
        ...

    def send(self, own: memoryview, out: OutLane, head: Head) -> None:
        """Put one's own values into the ring."""

    def keep(self, lane: InLane, target: memoryview, onward: OutLane | None, head: Head) -> None:
        """The result has come; it may have further to go."""

    def add_and_send(self, lane: InLane, own: memoryview, out: OutLane, head: Head) -> None:
        """Add one's own values to what has come, and send that."""

    def add_and_keep(
        self,
        lane: InLane,
        own: memoryview,
        target: memoryview,
        ranks: int,
        onward: OutLane | None,
        head: Head,
    ) -> None:
        """The same at the last of the ranks: make it the result, keep and perhaps send it."""


def codec_for(
    kind: Kind, arithmetic: Arithmetic | None, quantise: Quantisation | None, scratch: Scratch
) -> Codec:
    """The codec of an operation.

    Raises UsageError for what can't be quantised.
    """
    if quantise is None:
        return Plain(arithmetic)
    if kind is not Kind.ALL_REDUCE or arithmetic is None:
        raise UsageError("only an all-reduce can be quantised")
    return Quantised(arithmetic, quantise, scratch)


class Plain:
    """Values travel as they are."""

    def __init__(self, arithmetic: Arithmetic | None) -> None:
        self._arithmetic = arithmetic

    def wire_bytes(self, nbytes: int) -> int:
        """See :class:`Codec`."""
        return nbytes

    def send(self, own: memoryview, out: OutLane, head: Head) -> None:
        """See :class:`Codec`."""
        out.send(head, own)

    def keep(self, lane: InLane, target: memoryview, onward: OutLane | None, head: Head) -> None:
        """See :class:`Codec`."""
        lane.take(target)
        if onward is not None:
            onward.send(head, target)

    def add_and_send(self, lane: InLane, own: memoryview, out: OutLane, head: Head) -> None:
        """See :class:`Codec`."""
        if not own.nbytes:
            out.send(head, own)
            return
        assert self._arithmetic is not None
        came, room = lane.borrow(), out.room()
        self._arithmetic.combine(came, own, room[: own.nbytes])
        lane.give_back()
        out.send_room(head, room)

    def add_and_keep(
        self,
        lane: InLane,
        own: memoryview,
        target: memoryview,
        ranks: int,
        onward: OutLane | None,
        head: Head,
    ) -> None:
        """See :class:`Codec`."""
        assert self._arithmetic is not None
        self._arithmetic.combine(lane.borrow(), own, target)
        lane.give_back()
        self._arithmetic.finish(target, ranks)
        if onward is not None:
            onward.send(head, target)


class Quantised:
    """Values travel quantised, and partial sums are added up in float32.

    The last rank quantises the result once, and keeps what the others will have of it; they pass
    it on as it came.  So all have the same bits.
    """

    def __init__(self, arithmetic: Arithmetic, quantise: Quantisation, scratch: Scratch) -> None:
        if arithmetic.reduction not in (Reduction.SUM, Reduction.AVG):
            raise UsageError(
                f"a quantised reduction is a sum or an average, not {arithmetic.reduction.name}"
            )
        self._arithmetic = arithmetic
        self._quantise = quantise
        self._quantiser = Quantiser(quantise, arithmetic.dtype, scratch)

    def wire_bytes(self, nbytes: int) -> int:
        """See :class:`Codec`."""
        return self._quantise.packed_bytes(nbytes // self._arithmetic.dtype.itemsize)

    def send(self, own: memoryview, out: OutLane, head: Head) -> None:
        """See :class:`Codec`."""
        if not own.nbytes:
            out.send(head, own)
            return
        room = out.room()
        self._quantiser.pack(own, room[: head.nbytes])
        out.send_room(head, room)

    def keep(self, lane: InLane, target: memoryview, onward: OutLane | None, head: Head) -> None:
        """See :class:`Codec`."""
        if not target.nbytes:
            if onward is not None:
                onward.send(head, target)
            return
        came = lane.borrow()
        self._quantiser.unpack(came, target)
        if onward is None:
            lane.give_back()
            return
        room = onward.room()
        room[: came.nbytes] = came
        lane.give_back()
        onward.send_room(head, room)

    def add_and_send(self, lane: InLane, own: memoryview, out: OutLane, head: Head) -> None:
        """See :class:`Codec`."""
        if not own.nbytes:
            out.send(head, own)
            return
        sums = self._quantiser.unpack_add(lane.borrow(), own)
        lane.give_back()
        room = out.room()
        self._quantiser.pack_sums(sums, room[: head.nbytes])
        out.send_room(head, room)

    def add_and_keep(
        self,
        lane: InLane,
        own: memoryview,
        target: memoryview,
        ranks: int,
        onward: OutLane | None,
        head: Head,
    ) -> None:
        """See :class:`Codec`."""
        assert onward is not None  # an all-reduce's result has further to go
        if not own.nbytes:
            onward.send(head, own)
            return
        sums = self._quantiser.unpack_add(lane.borrow(), own)
        lane.give_back()
        if self._arithmetic.reduction is Reduction.AVG:
            np.divide(sums, np.float32(ranks), out=sums)
        room = onward.room()
        self._quantiser.pack_sums(sums, room[: head.nbytes])
        self._quantiser.unpack(room[: head.nbytes], target)
        onward.send_room(head, room)
