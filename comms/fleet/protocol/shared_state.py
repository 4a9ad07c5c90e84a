"""What the peers of a lane agree on when they make their states equal, without moving a byte.

Every peer brings an :class:`Offer`: what it has, as digests of blocks of its tensors.  All get all
offers, and :func:`agree` makes the same :class:`Plan` of them everywhere.

* **Elected** is one whole content.  If somebody is SEND_ONLY, it is theirs, whatever its revision.
  Else those count that are ENFORCE_POPULAR and have the newest revision among these: the content
  that most of them have, of equally popular ones that of the lowest member.  So a member that
  lags behind has no say, and bits that flipped are outvoted by two others.
* **Who fetches what**: of every tensor the blocks that differ, from any peer that has them and may
  send, also one that lags behind.  The next block goes to the donor that has the least to send so
  far, large blocks first; so no two donors of everything differ by more than a block.

Shared state that is elected by its hashes is PCCL's (Keiblinger et al., arXiv:2505.14065), which
compares and sends whole tensors, from one donor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ftrain.comms.errors import StateError

BLOCK_BYTES = 1024 * 1024
_NAMED_MAX = 4  # tensors, in a sentence

BlockId = tuple[int, int]
"""Position of a tensor in its content, number of the block in the tensor."""


class Role(Enum):
    """What a peer's content counts for."""

    ENFORCE_POPULAR = "enforce_popular"  # it votes, and may send
    SEND_ONLY = "send_only"  # it is the truth
    RECEIVE_ONLY = "receive_only"  # for nothing, and nobody gets any of it


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor; ``digests`` (xxh3-128) of its blocks, which are ``BLOCK_BYTES`` long but the
    last one."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    digests: tuple[bytes, ...]

    @property
    def form(self) -> tuple[object, ...]:
        """What has to be equal on all members."""
        return self.dtype, self.shape, self.nbytes, len(self.digests)

    def span(self, block: int) -> tuple[int, int]:
        """The block's first byte, and the one behind its last."""
        return block * BLOCK_BYTES, min(self.nbytes, (block + 1) * BLOCK_BYTES)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


Content = tuple[TensorEntry, ...]
"""Of all tensors, in the order of their keys."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What one peer brings; ``expects``: that everybody has the same already."""

    member: int
    revision: int
    role: Role
    content: Content
    expects: bool = False

    @property
    def sends(self) -> bool:
        """Whether others may get blocks from it."""
        return self.role is not Role.RECEIVE_ONLY

    def has(self, block: BlockId, digest: bytes) -> bool:
        """Whether one of its blocks is this."""
        return self.content[block[0]].digests[block[1]] == digest


@dataclass(frozen=True, slots=True)
class Plan:
    """The same for everybody.

    ``fetches``: for each member that lacks something, for each donor the blocks it gets from there.
    """

    revision: int
    content: Content
    fetches: dict[int, dict[int, tuple[BlockId, ...]]]
    offers: tuple[Offer, ...] = field(repr=False)

    def digest(self, block: BlockId) -> bytes:
        """Of a block of the elected content."""
        return self.content[block[0]].digests[block[1]]

    def holders(self, block: BlockId) -> tuple[int, ...]:
        """Every member that has a block of the elected content and may send it."""
        return _holders(self.offers, block, self.digest(block))

    def lacks(self, member: int) -> tuple[str, ...]:
        """Keys of the tensors of which a member lacks blocks."""
        blocks = {block for part in self.fetches.get(member, {}).values() for block in part}
        return tuple(self.content[n].key for n in sorted({number for number, _ in blocks}))


def agree(offers: Iterable[Offer]) -> Plan:
    """What everybody does; of each member one offer, in any order.

    Raises StateError, with the same words on all of them: their tensors have different keys, dtypes
    or shapes, two that are SEND_ONLY differ, nobody's content counts, or there is something to
    fetch though somebody expected that there is not.
    """
    ordered = tuple(sorted(offers, key=lambda offer: offer.member))
    _check_forms(ordered)
    elected = _elect(ordered)
    _check_drift(ordered, elected)
    return Plan(elected.revision, elected.content, _spread(ordered, elected), ordered)


def lacking(content: Content, elected: Content) -> tuple[BlockId, ...]:
    """The blocks of ``elected`` that ``content``, of the same form, does not have."""
    if content == elected:
        return ()
    return tuple(
        (number, block)
        for number, (mine, wanted) in enumerate(zip(content, elected, strict=True))
        if mine.digests != wanted.digests
        for block, digest in enumerate(wanted.digests)
        if mine.digests[block] != digest
    )


# ------------------------------------------------------------------ the election


def _elect(offers: Sequence[Offer]) -> Offer:
    """One of the offers with the elected content and revision."""
    truths = [offer for offer in offers if offer.role is Role.SEND_ONLY]
    if truths:
        _check_truths(truths)
        return truths[0]
    eligible = _eligible(offers)
    if not eligible:
        members = _members(offer.member for offer in offers)
        raise StateError(
            f"{members} only receive, so there is no state to share: let one that has it vote"
        )
    return _most_popular(eligible)


def _eligible(offers: Sequence[Offer]) -> list[Offer]:
    voters = [offer for offer in offers if offer.role is Role.ENFORCE_POPULAR]
    newest = max((voter.revision for voter in voters), default=0)
    return [voter for voter in voters if voter.revision == newest]


def _most_popular(eligible: Sequence[Offer]) -> Offer:
    votes = Counter(offer.content for offer in eligible)
    return max(eligible, key=lambda offer: (votes[offer.content], -offer.member))


def _check_truths(truths: Sequence[Offer]) -> None:
    first = truths[0]
    for other in truths[1:]:
        numbers = dict.fromkeys(number for number, _ in lacking(other.content, first.content))
        keys = [first.content[number].key for number in numbers]
        if keys or other.revision != first.revision:
            what = _named(keys) if keys else f"revisions {first.revision} and {other.revision}"
            raise StateError(
                f"members {first.member} and {other.member} both say that theirs is the truth, and"
                f" differ in {what}: let only one of them be send_only"
            )


def _check_drift(offers: Sequence[Offer], elected: Offer) -> None:
    drifted: dict[int, list[str]] = {}
    for offer in offers:
        if offer.expects:
            for number in dict.fromkeys(n for n, _ in lacking(offer.content, elected.content)):
                drifted.setdefault(offer.member, []).append(elected.content[number].key)
    if drifted:
        where = "; ".join(f"{_named(keys)} on member {m}" for m, keys in drifted.items())
        raise StateError(
            f"the state drifted from what was elected, which was not expected: {where}: look"
            " for what computes them differently, then synchronise without expecting that"
        )


# ------------------------------------------------------------------ who gets what from whom


def _spread(offers: Sequence[Offer], elected: Offer) -> dict[int, dict[int, tuple[BlockId, ...]]]:
    loads = {offer.member: 0 for offer in offers if offer.sends}  # bytes
    known: dict[BlockId, tuple[int, ...]] = {}
    fetches: dict[int, dict[int, tuple[BlockId, ...]]] = {}

    def size(block: BlockId) -> int:
        start, stop = elected.content[block[0]].span(block[1])
        return stop - start

    for offer in offers:
        parts: dict[int, list[BlockId]] = {}
        for block in sorted(lacking(offer.content, elected.content), key=size, reverse=True):
            if block not in known:
                digest = elected.content[block[0]].digests[block[1]]
                known[block] = _holders(offers, block, digest)
            donor = min(known[block], key=lambda member: (loads[member], member))
            loads[donor] += size(block)
            parts.setdefault(donor, []).append(block)
        if parts:
            fetches[offer.member] = {donor: tuple(parts[donor]) for donor in sorted(parts)}
    return fetches


def _holders(offers: Sequence[Offer], block: BlockId, digest: bytes) -> tuple[int, ...]:
    return tuple(offer.member for offer in offers if offer.sends and offer.has(block, digest))


# ------------------------------------------------------------------ tensors that don't fit


def _check_forms(offers: Sequence[Offer]) -> None:
    """Against what most have, so that the odd one is blamed."""
    forms = [tuple((entry.key, entry.form) for entry in offer.content) for offer in offers]
    votes = Counter(forms)
    usual = max(votes, key=lambda form: (votes[form], -forms.index(form)))
    reference = offers[forms.index(usual)]
    for offer, form in zip(offers, forms, strict=True):
        if form != usual:
            raise StateError(
                f"member {offer.member} does not have the same tensors as member"
                f" {reference.member}: {_difference(offer, reference)}: give synchronise tensors of"
                " the same keys, dtypes and shapes on all of them"
            )


def _difference(odd: Offer, usual: Offer) -> str:
    mine = {entry.key: entry for entry in odd.content}
    theirs = {entry.key: entry for entry in usual.content}
    words = []
    if missing := [key for key in theirs if key not in mine]:
        words.append(f"it lacks {_named(missing)}")
    if besides := [key for key in mine if key not in theirs]:
        words.append(f"only it has {_named(besides)}")
    for key, entry in mine.items():
        if key in theirs and entry.form != theirs[key].form:
            words.append(f"{key!r} is {entry} there, not {theirs[key]}")
    return _listed(words)


def _named(keys: Sequence[str]) -> str:
    return _listed([repr(key) for key in keys])


def _members(numbers: Iterable[int]) -> str:
    listed = [str(number) for number in numbers]
    return f"member{'s' * (len(listed) > 1)} {', '.join(listed)}"


def _listed(words: Sequence[str]) -> str:
    more = len(words) - _NAMED_MAX
    listed = ", ".join(words[:_NAMED_MAX])
    return f"{listed} and {more} more" if more > 0 else listed
