"""Live tensors filled from shards laid out in any other way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from ftrain.checkpoint.boxes import Box, Placement
from ftrain.checkpoint.files import LocalFile, NewFile
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image import ImageReader, ImageWriter
from ftrain.checkpoint.image_plan import ImagePlan
from ftrain.checkpoint.segment_reader import SegmentReader
from ftrain.checkpoint.segment_writer import SegmentStream
from ftrain.checkpoint.tensors import StateTensor, plan_image
from ftrain.comms.errors import CorruptionError, RestoreError, StateError
from ftrain.comms.protocol.messages import Share, VersionId
from ftrain.runtime.group import GroupView
from ftrain.runtime.restore import Restoration

TOPOLOGY = "ab" * 16
CHUNK = 4096
SHAPES = {"a": (37, 19), "b": (64, 8), "scalar": (), "vector": (1031,)}


def whole_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


def cut(shape: tuple[int, ...], dim: int, world: int, rank: int) -> Box:
    """A rank's part of a tensor that is cut along a dimension as torch does it; may be empty."""
    if not shape:
        return Box((), ())
    dim %= len(shape)
    size = -(-shape[dim] // world)
    start = min(rank * size, shape[dim])
    stop = min(start + size, shape[dim])
    origin = tuple(start if d == dim else 0 for d in range(len(shape)))
    return Box(origin, tuple(stop - start if d == dim else n for d, n in enumerate(shape)))


def part(whole: torch.Tensor, box: Box) -> torch.Tensor:
    index = tuple(slice(at, at + n) for at, n in zip(box.origin, box.shape, strict=True))
    return whole[index].clone().contiguous()


def layout(
    tensors: dict[str, torch.Tensor], dim: int | None, world: int, rank: int
) -> list[StateTensor]:
    """A rank's tensors: cut along ``dim``, or all of everything on every rank (None)."""
    found = []
    for name, whole in tensors.items():
        shape = tuple(whole.shape)
        cuts = dim is not None and shape
        box = cut(shape, dim or 0, world, rank) if cuts else Box((0,) * len(shape), shape)
        share = str(rank) if cuts and world > 1 else ",".join(map(str, range(world)))
        place = Placement(shape, box.origin)
        found.append(StateTensor(name, part(whole, box), share, place))
    return found


def image_of(
    tensors: list[StateTensor],
    world: int,
    rank: int,
    small: bytes = b"",
    group: GroupView | None = None,
) -> bytearray:
    group = group or GroupView(rank, world, 0, tuple(range(world)))
    plan: ImagePlan = plan_image(tensors, group.share, 1000, CHUNK)
    identity = ImageIdentity("run", TOPOLOGY, VersionId(1, 5), rank, world, 0, 1)
    buffer = bytearray(plan.total_bytes)
    writer = ImageWriter(buffer, plan, identity)
    writer.begin(small)
    for segment in plan.segments:
        source = next(t.tensor for t in tensors if t.name == segment.name)
        flat = bytes(source.reshape(-1).view(torch.uint8).numpy())
        writer.data[segment.offset : segment.offset + segment.nbytes] = flat[
            segment.start : segment.start + segment.nbytes
        ]
    for chunk in range(writer.chunks):
        writer.finish_chunk(chunk)
    writer.seal()
    return buffer


def images(dtype: torch.dtype, dim: int | None, world: int) -> list[ImageReader]:
    tensors = whole_tensors(dtype)
    return [
        ImageReader(image_of(layout(tensors, dim, world, rank), world, rank), where=f"image {rank}")
        for rank in range(world)
    ]


def blank(tensors: list[StateTensor]) -> list[StateTensor]:
    return [StateTensor(t.name, torch.full_like(t.tensor, -7), t.share, t.place) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_any_layout_is_filled_from_any_other(dtype: torch.dtype) -> None:
    layouts = [(None, 1), (None, 3), (0, 2), (0, 3), (1, 2), (1, 4)]
    tensors = whole_tensors(dtype)
    for dim, world in layouts:
        sources = images(dtype, dim, world)
        for other_dim, other_world in layouts:
            for rank in range(other_world):
                wanted = layout(tensors, other_dim, other_world, rank)
                found = blank(wanted)
                Restoration(sources).fill(found, TOPOLOGY)
                for a, b in zip(found, wanted, strict=True):
                    assert torch.equal(a.tensor, b.tensor), (dim, world, other_dim, other_world)


def test_a_tensor_that_is_not_contiguous_is_filled() -> None:
    sources = images(torch.float32, 0, 3)
    wanted = layout(whole_tensors(torch.float32), None, 1, 0)
    found = []
    for t in wanted:
        turned = torch.empty(t.tensor.shape[::-1]).permute(tuple(reversed(range(t.tensor.dim()))))
        found.append(StateTensor(t.name, turned, t.share, t.place))
    assert not found[0].tensor.is_contiguous()
    Restoration(sources).fill(found)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.tensor, b.tensor)


def as_file(path: Path, image: ImageReader) -> SegmentReader:
    with path.open("wb") as file:
        stream = SegmentStream(file.write, image.identity, image.plan, compress=True)
        for chunk in range(image.chunks):
            stream.add(image.read(chunk))
        stream.finish(image.small)
    return SegmentReader(LocalFile(path))


def test_files_fill_like_images_with_several_readers(tmp_path: Path) -> None:
    sources = images(torch.float32, 0, 3)
    files = [as_file(tmp_path / f"{n}.seg", image) for n, image in enumerate(sources)]
    for rank in range(2):
        wanted = layout(whole_tensors(torch.float32), 1, 2, rank)
        found = blank(wanted)
        Restoration(files, readers=2).fill(found)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a.tensor, b.tensor)
    for file in files:
        file.close()


def test_a_damaged_chunk_is_repaired_across_layouts() -> None:
    """Rank by rank another copy of each shard: what is damaged in one is taken from the next."""
    chance = random.Random(5)
    tensors = whole_tensors(torch.float32)
    copies = [images(torch.float32, 0, 2), images(torch.float32, 0, 2)]
    damaged = []
    for number, image in enumerate(copies[0]):
        raw = bytearray(image.raw)
        raw[-chance.randrange(1, 3000)] ^= 1
        damaged.append(ImageReader(raw, where=f"damaged {number}"))
    wanted = layout(tensors, None, 1, 0)
    found = blank(wanted)
    restoration = Restoration([*damaged, *copies[1]])
    restoration.fill(found)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.tensor, b.tensor)
    assert len(restoration.damage) == 2
    assert restoration.sources == ["image 0", "image 1"]
    with pytest.raises(CorruptionError, match="there is no other"):
        Restoration(damaged).fill(blank(wanted))


def test_the_first_tensor_that_differs_is_named_with_both_shapes() -> None:
    sources = images(torch.float32, 0, 2)
    wanted = layout(whole_tensors(torch.float32), None, 1, 0)
    wider = StateTensor("b", torch.empty(64, 9), "0", Placement.whole((64, 9)))
    with pytest.raises(StateError, match=r"b is \[64, 8\] float32 in the saved run and \[64, 9\]"):
        Restoration(sources).fill([wanted[0], wider])
    fewer = [t for t in wanted if t.name != "a"]
    with pytest.raises(StateError, match="holds a, which this script does not have"):
        Restoration(sources).fill(fewer, "cd" * 16)
    more = [*wanted, StateTensor("c", torch.empty(3), "0", Placement.whole((3,)))]
    with pytest.raises(StateError, match="c has 0 of its 12 bytes"):
        Restoration(sources).fill(more)


def own(name: str, value: float, rank: int) -> StateTensor:
    """A tensor of this rank's own."""
    place = Placement.whole((8,), str(rank))
    return StateTensor(name, torch.full((8,), float(value)), str(rank), place)


def test_what_is_each_ranks_own_is_not_mixed_up() -> None:
    saved = [
        ImageReader(image_of([own("w", 10.0 + r, r), own(f"stage{r}", r, r)], 2, r), where=str(r))
        for r in range(2)
    ]
    found = [own("w", 0, 1), own("stage1", 0, 1)]
    Restoration(saved).fill(found)
    assert [t.tensor[0].item() for t in found] == [11, 1]
    alone = [StateTensor("stage0", torch.empty(8), "0", Placement.whole((8,)))]
    Restoration(saved).fill(alone)  # only one rank has a tensor of this name
    assert alone[0].tensor[0].item() == 0
    with pytest.raises(StateError, match=r"each rank's own.*launch with 2 ranks"):
        Restoration(saved).fill([StateTensor("w", torch.empty(8), "0", Placement.whole((8,)))])


def test_each_ranks_own_is_one_tensor_if_all_have_the_same() -> None:
    """As norms are that tensor parallelism leaves whole on every rank."""
    saved = [ImageReader(image_of([own("w", 5, r)], 2, r), where=str(r)) for r in range(2)]
    found = [StateTensor.whole("w", torch.empty(8), "0")]
    Restoration(saved).fill(found)
    assert found[0].tensor.tolist() == [5] * 8


def test_another_ranks_own_is_not_taken_for_what_is_lost() -> None:
    """The node of rank 1 is gone: what rank 0 has of that name is something else."""
    alone = ImageReader(image_of([own("w", 10, 0)], 2, 0))
    with pytest.raises(RestoreError, match="no node holds every part of what ranks 1 have"):
        Restoration([alone]).fill([own("w", 0, 1)])


def test_half_of_what_two_ranks_have_in_common_is_not_enough() -> None:
    half = images(torch.float32, None, 2)[0]
    with pytest.raises(RestoreError, match="every part of what ranks 0,1 have"):
        Restoration([half]).fill(blank(layout(whole_tensors(torch.float32), None, 2, 0)))


def test_no_element_is_cut_in_two() -> None:
    """The bound between two ranks' parts lies anywhere; elements of 8 bytes behind odd ones."""
    odd = StateTensor("odd", torch.zeros(4093, dtype=torch.uint8), "0,1", Placement.whole((4093,)))
    wide = StateTensor("wide", torch.arange(4001), "0,1", Placement.whole((4001,)))
    ends = []
    for rank in range(2):
        plan = plan_image([odd, wide], lambda key, r=rank: Share(key, 0, r, 2), 10, CHUNK)
        ends += [(s.start, s.start + s.nbytes) for s in plan.segments if s.name == "wide"]
    assert all(start % 8 == stop % 8 == 0 for start, stop in ends)
    assert ends[0][1] == ends[1][0]
    assert ends[1][1] == 4001 * 8


def test_a_file_can_be_made_around_the_page_cache(tmp_path: Path) -> None:
    with NewFile(tmp_path / "x", 8192) as file:
        assert file.is_direct, "the tests' folder refuses direct I/O"


def test_damage_under_another_layout_is_damage_and_not_another_model() -> None:
    """So that the next older version is tried: rank 1's own share is whole in rank 1's image, and
    what it wants of rank 2's is not."""
    sources = [bytearray(image.raw) for image in images(torch.float32, 0, 3)]
    torn = ImageReader(sources[2])
    sources[2][torn.total_bytes - torn.header.layout.data_bytes] ^= 1
    readers = [ImageReader(data, where=f"image {rank}") for rank, data in enumerate(sources)]
    found = blank(layout(whole_tensors(torch.float32), 0, 2, 1))
    with pytest.raises(CorruptionError, match="image 2"):
        Restoration(readers).fill(found, TOPOLOGY)
