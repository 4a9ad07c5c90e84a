"""Persist, send, perform: in that order, and nothing of it when persisting fails."""

from __future__ import annotations

import pytest

from ftrain.comms.driver import Driver
from ftrain.comms.protocol.ready import Ready


class Counting:
    """Counts its inputs; each count is stored, sent, and its effect answered by one more."""

    def __init__(self, answers: int) -> None:
        self.count = 0
        self.answers = answers
        self._outputs: list[Ready[int]] = []

    def tick(self) -> None:
        self._add()

    def receive(self, message: object) -> None:
        self._add()

    def answer(self) -> None:
        if self.answers:
            self.answers -= 1
            self._add()

    def ready(self) -> Ready[int]:
        return self._outputs.pop(0) if self._outputs else Ready()

    def _add(self) -> None:
        self.count += 1
        self._outputs.append(Ready(self.count, (("peer", self.count),), (self.count,)))


def test_order_and_reentrancy() -> None:
    did: list[tuple[str, object]] = []
    machine = Counting(answers=2)

    def perform(effect: object) -> None:
        did.append(("perform", effect))
        machine.answer()
        driver.pump()  # from within: the outer loop goes on

    driver = Driver(
        machine,
        lambda hard: did.append(("persist", hard)),
        lambda address, message: did.append((f"send to {address}", message)),
        perform,
    )
    driver.tick()
    assert did == [(what, n) for n in (1, 2, 3) for what in ("persist", "send to peer", "perform")]
    driver.receive("anything")
    assert did[-1] == ("perform", 4)


def test_nothing_is_promised_that_was_not_stored() -> None:
    promised: list[object] = []

    def fail(hard: int) -> None:
        raise OSError("no space left")

    driver = Driver(Counting(0), fail, lambda *sent: promised.append(sent), promised.append)
    with pytest.raises(OSError, match="no space left"):
        driver.tick()
    assert promised == []


def test_nothing_ready_is_false() -> None:
    assert not Ready()
    assert Ready(hard_state=0)
    assert Ready(messages=((1, "hello"),))
    assert Ready(effects=("work",))
