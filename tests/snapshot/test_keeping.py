"""What a node keeps of its rounds of parity, one rule at a time."""

from __future__ import annotations

from ftrain.comms.protocol.messages import RoundId, VersionId
from ftrain.snapshot.protocol.keeping import Keeping
from ftrain.snapshot.protocol.protection import Begin, Protect, Protection


def v(step: int, epoch: int = 1) -> VersionId:
    return VersionId(epoch, step)


def keeping(*rounds: tuple[int, VersionId], epoch: int = 2) -> Keeping:
    """One that started anew, and found these whole rounds of this epoch."""
    made = Keeping()
    for number, version in rounds:
        made.found(RoundId(epoch, number), version)
    made.new_group(epoch, None)
    return made


def test_a_round_is_kept_until_a_later_one_is_over_everywhere() -> None:
    made = keeping((1000, v(5)))
    assert made.begin(1001, v(7), 1000, 1000) == []
    assert made.over(1001) == [], "it is not whole here"
    made.whole(1001)
    assert made.over(1001) == [RoundId(2, 1000)]


def test_a_later_round_of_an_older_version_replaces_nothing_newer() -> None:
    """A leader that starts again may protect what its ranks were restored from once more."""
    made = keeping((1000, v(5)), (1001, v(3)))
    made.begin(2000, v(4), 2000, 0)
    made.whole(2000)
    assert made.over(2000) == [RoundId(2, 1001)]
    assert made.begin(2001, v(6), 2000, 2000) == []
    made.whole(2001)
    assert made.over(2001) == [RoundId(2, 1000), RoundId(2, 2000)]


def test_a_round_that_is_long_past_gives_up_nothing_that_came_after_it() -> None:
    made = keeping((1000, v(5)), (1002, v(7)))
    assert made.begin(1001, v(6), 1000, 1000) == []
    assert RoundId(2, 1002) in made.rounds


def test_what_its_leader_gave_up_is_given_up_but_not_what_another_leader_opened() -> None:
    made = keeping((1000, v(5)), (2000, v(6)), (2001, v(7)))
    assert made.begin(2002, v(8), 2000, 2000) == [RoundId(2, 1000), RoundId(2, 2001)]
    assert made.begin(3000, v(9), 3000, 0) == [RoundId(2, 2002)], "it never was whole"
    assert RoundId(2, 2000) in made.rounds


def test_nothing_changes_between_the_last_word_and_the_next_group() -> None:
    made = keeping((1000, v(5)))
    made.begin(1001, v(7), 1000, 1000)
    made.whole(1001)
    made.freeze()
    assert made.over(1001) == []
    made.new_group(2, None)
    assert made.frozen, "the same group told again ends nothing"
    assert made.new_group(3, RoundId(2, 1000)) == [RoundId(2, 1001)]
    assert not made.frozen


def leader() -> Protection:
    """Of a group of two, whose other node is number 1."""
    made = Protection(0, 1000)
    made.new_group(2, [0, 1], 0, v(5))
    made.ready()
    return made


def said(made: Protection, ticks: int) -> list[int]:
    """Rounds that the leader speaks of meanwhile."""
    for _ in range(ticks):
        made.tick()
    ready = made.ready()
    return [message.round for _, message in ready.messages if isinstance(message, Protect)]


def test_a_leader_says_again_which_round_was_over() -> None:
    made, other = leader(), Protection(1, 1000)
    other.new_group(2, [0, 1], 0, None)
    other.receive(Protect(2, 1000, v(5), 1000, 0))
    made.done(1000)
    other.done(1000)
    for _, message in other.ready().messages:
        made.receive(message)
    made.ready()
    assert set(said(made, 50)) == {1000}
    other = Protection(1, 2000)  # it starts again, and knows nothing
    other.new_group(2, [0, 1], 0, None)
    other.receive(Protect(2, 1000, v(5), 1000, 1000))
    assert other.ready().effects == (Begin(1000, v(5), 1000, 1000),)


def test_what_was_given_up_is_tried_again_while_there_is_nothing_newer() -> None:
    made = leader()
    made.unable(1000)
    assert 1001 in said(made, 50)
