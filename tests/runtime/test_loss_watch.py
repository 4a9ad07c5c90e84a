"""When a loss speaks against the version that was restored."""

from __future__ import annotations

import math

import pytest

from ftrain.comms.errors import SuspectError
from ftrain.runtime.loss_watch import LossWatch


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_soon_after_a_restore(loss: float) -> None:
    watch = LossWatch(3)
    watch.restored(20, odd=False)
    watch.see(21, 1.0)
    with pytest.raises(SuspectError, match=r"at step 23, 3 steps after step 20 was restored") as it:
        watch.see(23, loss)
    assert it.value.step == 23


def test_later_or_without_a_restore_or_switched_off_it_is_the_scripts_own() -> None:
    late = LossWatch(3)
    late.restored(20, odd=False)
    late.see(24, math.nan)
    LossWatch(3).see(1, math.nan)
    off = LossWatch(0)
    off.restored(20, odd=False)
    off.see(20, math.nan)


def test_a_version_says_whether_the_losses_before_it_were_odd() -> None:
    watch = LossWatch(3)
    assert not watch.odd(0)
    watch.see(5, math.nan)
    assert watch.odd(5)
    watch.see(6, 1.0)
    assert watch.odd(7)
    assert not watch.odd(8)
    watch.see(10, math.inf)
    assert watch.odd(100)  # the script logs seldom: this is still its newest loss


def test_after_odd_losses_nothing_is_suspected() -> None:
    watch = LossWatch(3)
    watch.restored(20, odd=True)
    assert watch.odd(20)
    watch.see(21, math.nan)
    watch.see(22, 1.0)
    assert watch.odd(23)
    assert not watch.odd(24)
