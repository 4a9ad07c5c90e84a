"""What a helper process said before it died is not lost."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from last_words import COUNT

from ftrain.comms.protocol.messages import VersionId
from ftrain.launch.helper import HelperProcess
from ftrain.launch.reaper import Reaper
from ftrain.snapshot.protocol.messages import Flush


@pytest.mark.parametrize("post_after_death", [False, True])
def test_descriptors_are_kept_of_a_process_that_died_after_sending_them(
    post_after_death: bool,
) -> None:
    async def scenario() -> list[object]:
        news: list[object] = []
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def received(message: Any, fds: list[int]) -> None:
            news.append(message.slot)
            for fd in fds:
                os.close(fd)

        def down(how: str) -> None:
            news.append(how)
            helper.close()
            over.set_result(None)

        def wait_for_end() -> None:
            os.waitid(os.P_PID, helper.pid, os.WEXITED | os.WNOWAIT)

        reaper = Reaper()
        helper = HelperProcess(
            "last_words",
            {**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            reaper,
            on_start=lambda: helper.post(Flush(VersionId(1, 1), 1)),  # never read
            on_message=received,
            on_down=down,
            on_refused=news.append,
        )
        helper.start()
        # Another child's end is seen by the loop; before it is handled, the loop stands still until
        # this process is gone too.  So its end is handled before its words are read.
        with subprocess.Popen(["true"]) as other:
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        asyncio.get_running_loop().call_soon(wait_for_end)
        await asyncio.sleep(0)
        if post_after_death:
            helper.post(Flush(VersionId(1, 2), 1))
        await asyncio.wait_for(over, 10)
        assert await reaper.kill_all()
        return news

    assert asyncio.run(scenario()) == [*range(COUNT), "exit code 1"]
