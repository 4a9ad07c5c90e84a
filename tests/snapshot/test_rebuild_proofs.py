"""Every loss that parity stands is made good, byte for byte, and damage never gives a wrong byte.

``pytest -m soak tests/snapshot/test_rebuild_proofs.py -s`` draws 10,000 losses with damage.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable
from itertools import combinations

import pytest
import reedsolo
from damage_trials import Trial
from parity_samples import Images, encoded, rebuilt

from ftrain.checkpoint.header import PAGE_BYTES
from ftrain.comms.errors import StateError
from ftrain.snapshot.erasure.engines import engine
from ftrain.snapshot.parity import ParityReader, ParityRecord
from ftrain.snapshot.stripes import Summer

GROUPS = [(nodes, parity) for parity in (1, 2, 3) for nodes in range(parity + 1, 9)]


def unequal(draw: random.Random, nodes: int, data: int) -> Images:
    """Nodes with none to several images; one has none, one has ``data`` pages, as no other has
    more: a chunk is one page."""
    totals = [0, data, *(draw.randint(0, data) for _ in range(nodes - 2))]
    draw.shuffle(totals)
    images: Images = {}
    rank = 0
    for node, total in zip(draw.sample(range(40), nodes), totals, strict=True):
        mine = {}
        while total:
            pages = draw.randint(0, total)
            mine[rank] = draw.randbytes(PAGE_BYTES * pages)
            total -= pages
            rank += 1
        images[node] = mine
    return images


def whole_stripe(images: Images, held: dict[int, ParityReader], stripe: int) -> list[bytes]:
    """All chunks of a stripe, data and parity."""
    record = next(iter(held.values())).record
    group, size = record.group, record.chunk_bytes
    chunks = []
    for node in group.contributors(stripe):
        first = group.stripes_of(node).index(stripe) * size
        joined = b"".join(data for _, data in sorted(images[node].items()))
        chunks.append(joined[first : first + size].ljust(size, b"\0"))
    holders = enumerate(group.holders(stripe))
    return [*chunks, *(bytes(held[node].row(stripe, row)) for row, node in holders)]


def as_reedsolo_decodes(
    record: ParityRecord,
    node: int,
    lost: Iterable[int],
    stripes: list[list[bytes]],
    columns: list[int],
) -> list[bytes]:
    """These bytes of each chunk of a lost node, from what the others have of its stripes."""
    group = record.group
    codec = reedsolo.RSCodec(group.parity, nsize=len(group.nodes))
    found = []
    for stripe in group.stripes_of(node):
        members = (*group.contributors(stripe), *group.holders(stripe))
        gone = [number for number, member in enumerate(members) if member in lost]
        chunk = bytearray()
        for at in columns:
            word = bytearray(whole[at] for whole in stripes[stripe])
            for number in gone:
                word[number] = 0
            chunk.append(codec.decode(word, erase_pos=gone)[1][members.index(node)])
        found.append(bytes(chunk))
    return found


@pytest.mark.parametrize(("nodes", "parity"), GROUPS)
def test_every_loss_is_made_good_as_reedsolo_does(nodes: int, parity: int) -> None:
    draw = random.Random(100 * parity + nodes)
    images = unequal(draw, nodes, nodes - parity)
    held = {node: encoded(images, parity, node) for node in images}
    record = next(iter(held.values())).record
    assert record.chunk_bytes == PAGE_BYTES
    stripes = [whole_stripe(images, held, stripe) for stripe in range(nodes)]
    codec = reedsolo.RSCodec(parity, nsize=nodes)
    for stripe in stripes:
        data = bytes(v for word in zip(*stripe[: record.group.data], strict=True) for v in word)
        words = codec.encode(data)
        assert [words[number::nodes] for number in range(nodes)] == stripe

    summer = Summer(engine().engine)
    patterns = [p for count in range(1, parity + 1) for p in combinations(images, count)]
    for lost in patterns:
        there = [node for node in images if node not in lost]
        for node in lost:
            assert rebuilt(images, held, node, there, summer) == images[node]
    for lost in draw.sample(patterns, min(4, len(patterns))):
        columns = draw.sample(range(PAGE_BYTES), 16)
        for node in lost:
            mine = [
                whole[record.group.contributors(stripe).index(node)]
                for stripe, whole in enumerate(stripes)
                if stripe in record.group.stripes_of(node)
            ]
            decoded = as_reedsolo_decodes(record, node, lost, stripes, columns)
            assert decoded == [bytes(chunk[at] for at in columns) for chunk in mine]
    for lost in combinations(images, parity + 1):
        there = [node for node in images if node not in lost]
        for node in lost:
            if any(images[node].values()):
                with pytest.raises(StateError, match="of a stripe that needs"):
                    rebuilt(images, held, node, there, summer)


def run_trials(count: int, seed: int) -> Counter[str]:
    """How often each came out."""
    counts: Counter[str] = Counter()
    summer = Summer(engine().engine)
    loop = asyncio.new_event_loop()
    try:
        for number in range(count):
            with Trial(random.Random(seed * 1_000_003 + number), loop, summer) as trial:
                try:
                    counts.update(trial.run())
                except Exception as error:
                    raise AssertionError(f"trial {number} of seed {seed}: {trial}") from error
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    return counts


def check_counts(counts: Counter[str], trials: int) -> None:
    """Every way of coming out has to have happened often."""
    print("\n" + "\n".join(f"{count:7} {what}" for what, count in counts.most_common()))
    for what, share in (
        ("rebuilt", 0.1),
        ("rebuilt despite damage", 0.2),
        ("refused: too little is sound", 0.1),
        ("refused: what was rebuilt is wrong", 0.005),
        ("refused: no record is left", 0.005),
    ):
        assert counts[what] >= share * trials, what


def test_damage_on_top_of_a_loss_gives_no_wrong_byte() -> None:
    check_counts(run_trials(500, seed=1), 500)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_damage_on_top_of_10000_losses_gives_no_wrong_byte() -> None:
    check_counts(run_trials(10_000, seed=2), 10_000)
