"""What a ring that was stopped says is here, is here as a whole."""

from __future__ import annotations

import socket
import threading

import pytest
import torch
import xxhash

from ftrain.comms.collectives.arithmetic import Arithmetic, Reduction
from ftrain.comms.collectives.ring import Ring
from ftrain.comms.collectives.stream_lane import StreamIn, StreamOut
from ftrain.comms.collectives.work import Work
from ftrain.comms.protocol.chunk_frames import Head, HeadSender, Word
from ftrain.comms.protocol.handshake import Identity
from ftrain.comms.protocol.ring import Kind, OpId, Phase

KEY = bytes(32)
OP = OpId(0, 0)
COUNT = 1000


def chunk_head(phase: Phase, segment: int, data: bytes) -> Head:
    value = xxhash.xxh3_64_intdigest(data)
    return Head(Word.CHUNK, OP, 0, 0, phase, segment, nbytes=len(data), value=value)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_a_chunk_that_came_in_half_is_not_held(part: float) -> None:
    peer = Identity("run", "rank", 1, 1)
    (left, sock_in), (sock_out, right) = socket.socketpair(), socket.socketpair()
    lanes = StreamIn(sock_in, KEY, peer, 4096), StreamOut(sock_out, KEY, peer, 2, 4096)
    failed = threading.Event()
    ring = Ring(
        0, 2, lanes[:1], lanes[1:], chunk_bytes=4096, starts=1, failed=lambda _: failed.set()
    )
    tensor = torch.arange(COUNT, dtype=torch.float32)
    memory = memoryview(tensor.view(torch.uint8).numpy())
    backup = memoryview(bytearray(memory.nbytes))
    how = Arithmetic(Reduction.SUM, torch.float32)
    work = Work(Kind.ALL_REDUCE, COUNT, 4, memory, memory, how, backup=backup)
    ring.put(OP, 0, work, last=True, over=lambda: None)
    own, result = bytes(2000), bytes(range(200)) * 10
    sender = HeadSender(KEY)
    with left, right:
        left.sendall(sender.seal(Head(Word.BEGUN, OP, 0, 1)))
        left.sendall(sender.seal(chunk_head(Phase.REDUCE, 0, own)) + own)
        left.sendall(sender.seal(chunk_head(Phase.GATHER, 1, result)))
        left.sendall(result[: int(part * len(result))])
        left.shutdown(socket.SHUT_WR)
        assert failed.wait(5)
        (found,) = ring.halt().values()
        assert found.parts[0].held() == [True, part == 1.0]
        assert found.whole == (part == 1.0)
        found.parts[0].restore()
    assert torch.equal(tensor, torch.arange(COUNT, dtype=torch.float32))
