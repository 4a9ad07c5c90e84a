"""What a peer or a coordinator of a fleet can't say, whatever happens.

Who says such a thing holds the secret, so it is broken rather than a stranger; what it says must
not get further than to whoever hears it first.  Numbers are bounded by what a frame of the ring has
room for (:mod:`ftrain.comms.protocol.chunk_frames`), lists by what an honest peer says at most.
"""

from __future__ import annotations

from collections.abc import Sequence

from ftrain.comms.fleet.protocol.messages import (
    AHEAD_MAX,
    LOST_MAX,
    OPS_MAX,
    TAGS_MAX,
    WHY_CHARS_MAX,
    Counts,
    Decision,
    FleetDirective,
    Order,
    PeerStatus,
    Verdict,
)
from ftrain.comms.protocol.place import Place

NUMBER_MAX = 2**31 - 1  # of a view; one a second lasts for 68 years
_COUNT_MAX = 2**32 - 1
_COUNTER_MAX = 2**62  # of what is counted in messages or pings
_TEXT_CHARS_MAX = 512


def fault_of_status(status: PeerStatus) -> str:
    """What is impossible about a peer's word, in words; empty: nothing."""
    numbers = (status.view, status.number, *(lost.number for lost in status.lost))
    if not all(0 <= number <= NUMBER_MAX for number in numbers):
        return "a view has an impossible number"
    if not (0 <= status.sequence <= _COUNTER_MAX and 0 <= status.pong <= _COUNTER_MAX):
        return "a sequence or an answer has an impossible number"
    if (status.place.node, status.place.incarnation) != (status.peer, status.incarnation):
        return "the place is another peer's"
    if why := _fault_of_places((status.place,)) or _fault_of_counts(status.counts):
        return why
    if len(status.lost) > LOST_MAX or len(status.ops) > OPS_MAX:
        return f"{len(status.lost)} neighbours lost and {len(status.ops)} operations are too many"
    if any(len(lost.why) > WHY_CHARS_MAX for lost in status.lost):
        return "a reason is too long"
    if len({state.op for state in status.ops}) != len(status.ops):
        return "an operation is under way twice"
    return _fault_of_counts(tuple({state.op.tag: state.op.number for state in status.ops}.items()))


def fault_of_directive(directive: FleetDirective) -> str:
    """What is impossible about a coordinator's word, in words; empty: nothing."""
    if not 0 <= directive.view <= directive.number <= NUMBER_MAX:
        return "a view has an impossible number"
    if not (0 <= directive.ping <= _COUNTER_MAX and 0 <= directive.heard <= _COUNTER_MAX):
        return "a sequence or a ping has an impossible number"
    nodes = set(directive.ring)
    if len(nodes) != len(directive.ring) or len(nodes) not in (0, len(directive.members)):
        return f"{len(directive.ring)} peers in a ring of {len(directive.members)} members"
    given, peer, ring = [one.node for one in directive.places], directive.peer, directive.ring
    if given not in (needed(peer, ring, new=False), needed(peer, ring, new=True)):
        return "the places are not those that the peer needs"
    if why := _fault_of_places(directive.places) or _fault_of_counts(directive.first):
        return why
    if directive.decisions and directive.order is not Order.RUN:
        return "decisions without a view"
    return next(filter(None, (_fault_of_decision(one, nodes) for one in directive.decisions)), "")


def needed(peer: int, ring: Sequence[int], *, new: bool) -> list[int]:
    """Those whose places a peer needs, rising: its own and its neighbours' in the ring; those of
    all if it is ``new``, to get the fleet's state from."""
    if peer not in ring:
        return []
    if new:
        return sorted(ring)
    at = ring.index(peer)
    return sorted({ring[at - 1], peer, ring[(at + 1) % len(ring)]})


def ahead(holders: Sequence[PeerStatus]) -> list[PeerStatus]:
    """Those that claim to be further ahead than a ring lets anybody be, the middle one as the
    measure."""
    found: list[PeerStatus] = []
    counts = [(holder, dict(holder.counts)) for holder in holders]
    for tag in sorted({tag for _, mine in counts for tag in mine}):
        sorted_counts = sorted(mine.get(tag, 0) for _, mine in counts)
        limit = sorted_counts[(len(sorted_counts) - 1) // 2] + AHEAD_MAX
        found += [holder for holder, mine in counts if mine.get(tag, 0) > limit]
    return found


def _fault_of_decision(decision: Decision, nodes: set[int]) -> str:
    if decision.verdict is not Verdict.MEND:
        return ""
    if not {peer for peer, _ in decision.held} <= nodes:
        return "others hold a result than are in the view"
    bitmaps = [bits for _, bits in decision.held]
    together = 0
    for bits in bitmaps:
        together |= int.from_bytes(bits, "little")
    whole = together == (1 << 8 * len(bitmaps[0])) - 1 if bitmaps else False
    if len({len(bits) for bits in bitmaps}) != 1 or not whole:
        return "a result is to be mended that is not there"
    return ""


def _fault_of_places(places: Sequence[Place]) -> str:
    for place in places:
        if max(map(len, (place.address, place.host, place.local))) > _TEXT_CHARS_MAX:
            return "a place's text is too long"
        if not (0 <= place.node < 2**31 and -(2**63) <= place.incarnation < 2**63):
            return "a place has an impossible number"
        host, _, port = place.address.rpartition(":")
        if place.address and not (host and port.isdecimal() and int(port) < 65536):
            return "an address is none"
    return ""


def _fault_of_counts(counts: Counts) -> str:
    if len(counts) > TAGS_MAX or len(dict(counts)) != len(counts):
        return f"{len(counts)} tags are too many, or one is named twice"
    if not all(0 <= tag < TAGS_MAX and 0 <= number <= _COUNT_MAX for tag, number in counts):
        return "a tag or the number of an operation is impossible"
    return ""
