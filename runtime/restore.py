"""From images and files back into live tensors.

Any image that holds a byte is as good as any other, because ranks under one share key hold the same
bytes.  So a damaged chunk is a gap like any other, filled from the next image that has those bytes.
Nothing here cares how the job was laid out over ranks when it was saved (placing.py).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import randrange
from threading import Lock
from typing import Any, Protocol

import torch

from ftrain.checkpoint.boxes import Box, Copy
from ftrain.checkpoint.codec import decode_tree
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image_plan import ImagePlan, Piece, Segment
from ftrain.checkpoint.scatter import Home
from ftrain.checkpoint.segment_reader import Scratch
from ftrain.checkpoint.tensors import StateTensor, tensor_bytes
from ftrain.comms.errors import CorruptionError, RestoreError, StateError
from ftrain.comms.protocol.messages import Share
from ftrain.runtime.imported import IMPORTED, take_model
from ftrain.runtime.placing import Span, Target
from ftrain.runtime.state import TrainingState

_SAMPLED = 16
_READERS = 2  # of one file: while one thread waits for the disk, the other compares and copies


class Source(Protocol):
    """One rank's share of a version, in memory or in a file."""

    where: str

    @property
    def whole(self) -> bool: ...
    @property
    def packed(self) -> bool: ...
    @property
    def identity(self) -> ImageIdentity: ...
    @property
    def plan(self) -> ImagePlan: ...
    @property
    def shares(self) -> tuple[Share, ...]: ...
    @property
    def chunks(self) -> int: ...
    @property
    def small(self) -> bytes: ...
    def read_into(
        self, chunk: int, homes: Sequence[Home], scratch: Scratch, *, verify: bool = True
    ) -> memoryview: ...


Found = Sequence["Source | CorruptionError"]


_Wanted = tuple[Target, Piece, Span]
_Done = tuple[list[_Wanted], "CorruptionError | None"]


class Restoration:
    """Puts one version together from images, and passes over what is damaged in them.

    Args:
        images: the nearest ones; all of them are looked at. An error stands for one that is there
            and can't be read.
        more: asked for the next ones while something is missing; gives none when there are none.
        verify: which chunks are compared with their digests before their bytes are used: "always",
            "sampled" (one in 16) or "off".
        readers: threads that read and copy.
    """

    def __init__(
        self,
        images: Found,
        more: Callable[[], Found] = tuple,
        *,
        verify: str = "always",
        readers: int = 1,
    ) -> None:
        self.damage: list[str] = []  # each damaged image once, in words
        self.sources: list[str] = []  # images that something damaged was repaired from
        self._images: list[Source] = []
        self._more = more
        self._verify = verify
        self._first_sample = randrange(_SAMPLED)
        self._readers = readers
        self._claiming = Lock()
        self._damaged: set[int] = set()  # images
        self._unreadable = False  # of what an image held nothing is known
        self._targets: dict[tuple[str, str], Target] = {}  # not filled yet, by name and owner
        self._topology = ""
        self._nearest = {id(image) for image in self._take(images)}

    @property
    def world_size(self) -> int:
        """Number of ranks that the version is of; 0: nothing is known."""
        return max((image.identity.world_size for image in self._images), default=0)

    @property
    def names(self) -> frozenset[str]:
        """Of the tensors that the images hold something of, as far as they are known."""
        return frozenset(s.name for image in self._images for s in image.plan.segments)

    def small(self, rank: int) -> dict[str, Any]:
        """The small state of ``rank``, from the first good copy; of the rank in its place, if the
        version is of fewer ranks.

        Raises:
            CorruptionError: every copy is damaged.
            RestoreError: there is none.
        """
        repaired = False
        for image in self._each():
            if image.identity.rank != rank % image.identity.world_size:
                continue
            try:
                tree = decode_tree(image.small)
                if not isinstance(tree, dict):
                    raise CorruptionError(f"{image.where} holds no training state")
            except CorruptionError as error:
                self._note_damage(image, error)
                repaired = True
                continue
            if repaired or self._stands_in(image):
                self._note_source(image)
            return tree
        raise self._lack(f"no copy of rank {rank}'s own state is left for this version")

    def fill(self, tensors: Sequence[StateTensor], topology: str = "") -> None:
        """Fill ``tensors``; every byte of every one of them has to be somewhere.

        ``topology``: of the model they belong to; "": any.

        Raises:
            StateError: a tensor has another shape or type in the images, or is not in them.
            CorruptionError: some bytes are damaged in every image that has them.
            RestoreError: nobody has some part.
        """
        self._topology = topology
        known = {tensor.name: tensor for tensor in tensors}
        every = [Target.of(tensor) for tensor in tensors]
        self._targets = {
            (t.tensor.name, t.tensor.place.owner): t for t in every if tensor_bytes(t.live)
        }
        images: Sequence[Source] = self._images
        while self._targets:
            for image in images:
                self._fill_from(image, known)
            if not self._targets:
                break
            further = self._more()
            if not further and not self._adopt():
                self._refuse_foreign()
                share = next(iter(self._targets.values())).tensor.share
                raise self._lack(f"no node holds every part of what ranks {share} have in common")
            images = self._take(further) if further else self._images
        for target in every:
            target.finish()

    def _each(self) -> Iterator[Source]:
        """Every image, those that have to be asked for last."""
        yield from tuple(self._images)
        while further := self._more():
            yield from self._take(further)

    def _take(self, found: Found) -> list[Source]:
        images = [image for image in found if not isinstance(image, CorruptionError)]
        errors = [str(error) for error in found if isinstance(error, CorruptionError)]
        self.damage += errors
        self._unreadable = self._unreadable or bool(errors)
        self._images += images
        return images

    # ---- one image

    def _fill_from(self, image: Source, known: dict[str, StateTensor]) -> None:
        if not image.whole or not self._targets:
            return
        if self._topology and image.identity.topology != self._topology:
            _refuse_model(image, known)
        chunks: set[int] = set()
        for segment in image.plan.segments:
            target = self._targets.get((segment.name, segment.place.owner))
            if target is not None:
                _check_shape(segment, target.tensor)
                chunks.update(image.plan.chunks_of(segment))
        for work, error in self._tried(image, sorted(chunks)):
            if error is not None:
                self._note_damage(image, error)
            for target, piece, span in work:
                self._account(image, target, piece.segment.box, span, error)
        self._targets = {key: t for key, t in self._targets.items() if not t.whole}

    def _tried(self, image: Source, chunks: Sequence[int]) -> list[_Done]:
        """What was wanted of each chunk, once that was tried; this thread is one of the readers."""
        remaining = iter(chunks)
        tried: list[_Done] = []

        def read() -> None:
            scratch = Scratch()
            try:
                while (chunk := next(remaining, None)) is not None:  # whoever comes first
                    tried.append(self._do(image, chunk, scratch))
            finally:  # if it failed, nobody need read on
                deque(remaining, maxlen=0)

        # A packed one takes two chunks of memory for each thread.
        helpers = 0 if image.packed else min(self._readers, len(chunks)) - 1
        if helpers < 1:
            read()
            return tried
        with ThreadPoolExecutor(helpers, "ftrain-restore") as pool:
            others = [pool.submit(read) for _ in range(helpers)]
            read()
            for other in others:
                other.result()
        return tried

    def _wanted(self, image: Source, chunk: int) -> list[_Wanted]:
        """What is missing and lies in a chunk; it is given to nobody else."""
        wanted = []
        with self._claiming:
            for piece in image.plan.pieces(chunk):
                segment = piece.segment
                target = self._targets.get((segment.name, segment.place.owner))
                if target is not None:
                    wanted += [(target, piece, span) for span in target.claim(piece)]
        return wanted

    def _do(self, image: Source, chunk: int, scratch: Scratch) -> _Done:
        """Put what is missing and lies in a chunk where it belongs; runs in any thread.

        If the chunk is damaged, what was wanted of it may hold anything, and stays a gap.
        """
        wanted = self._wanted(image, chunk)
        if not wanted:
            return wanted, None
        begins = chunk * image.plan.chunk_bytes
        homes: list[Home] = []
        homeless: list[tuple[Target, int, Copy]] = []
        for target, piece, span in wanted:
            first = piece.start - (piece.offset - begins)
            for copy in target.copies(piece.segment.box, span):
                home = target.home(copy, first)
                if home is not None:
                    homes.append(home)
                else:
                    homeless.append((target, first, copy))
        verify = self._verifies(chunk)
        try:
            data = image.read_into(chunk, homes, scratch, verify=verify)
        except CorruptionError as error:
            return wanted, error
        for target, first, copy in homeless:
            target.put(data, first, copy)
        return wanted, None

    def _verifies(self, chunk: int) -> bool:
        sampled = self._verify == "sampled" and (chunk + self._first_sample) % _SAMPLED == 0
        return sampled or self._verify == "always"

    def _account(
        self, image: Source, target: Target, box: Box, span: Span, error: CorruptionError | None
    ) -> None:
        if error is not None:
            target.give_back(box, span)
        elif target.was_broken(box, span) or self._stands_in(image):
            self._note_source(image)

    def _stands_in(self, image: Source) -> bool:
        """Whether the image may be used only because another one can't be read."""
        return self._unreadable and id(image) not in self._nearest

    # ---- what is missing in the end

    def _adopt(self) -> bool:
        """Take for a tensor that nobody has under its owner the only one of its name, as when a
        run goes on with another number of ranks; whether there is one.

        Only once every rank's image was seen: what is missing may be the very tensor.
        """
        if not self._has_all_ranks():
            return False
        owners: dict[str, set[str]] = defaultdict(set)
        for image in self._images:
            for segment in image.plan.segments:
                owners[segment.name].add(segment.place.owner)
        adopted: dict[tuple[str, str], Target] = {}
        for (name, owner), target in self._targets.items():
            found = owners[name]
            if owner in found or not found:
                adopted[name, owner] = target
            elif len(found) == 1 or self._all_equal(target, found):
                adopted[name, min(found)] = target
            else:
                raise StateError(
                    f"{name} is each rank's own in the saved run, and the ranks' may differ: "
                    f"launch with {self.world_size} ranks, as it was saved"
                )
        changed = adopted.keys() != self._targets.keys()
        self._targets = adopted
        return changed

    def _all_equal(self, target: Target, owners: Collection[str]) -> bool:
        """Whether what several owners have is the same, bit for bit, as what was not sharded is on
        the ranks of tensor parallelism."""
        first: bytes | None = None
        for owner in owners:
            tensor = target.tensor
            place = replace(tensor.place, owner=owner)
            trial = replace(
                tensor, tensor=torch.empty_like(tensor.tensor, device="cpu"), place=place
            )
            Restoration(self._images, verify=self._verify).fill([trial])
            found = bytes(trial.tensor.reshape(-1).view(torch.uint8).numpy())
            if first is not None and found != first:
                return False
            first = found
        return True

    def _refuse_foreign(self) -> None:
        """StateError for a tensor that is in no image although the share's are all here, sound."""
        if self.damage:  # under another layout that may be where the rest of it is
            return
        for target in self._targets.values():
            if self._has_all_parts(target.tensor.share):
                size = tensor_bytes(target.live)
                raise StateError(
                    f"{target.tensor.name} has {size - target.missing_bytes} of its {size} bytes "
                    "in the version to restore: was the run made by another model?"
                )

    def _has_all_parts(self, key: str) -> bool:
        parts: dict[tuple[int, int], set[int]] = defaultdict(set)
        sound = [image for image in self._images if image.whole and id(image) not in self._damaged]
        if self._has_all_ranks() and len(sound) == len(self._images):
            return True
        for image in sound:
            for share in image.shares:
                if share.key == key:
                    parts[share.node, share.parts].add(share.part)
        return any(len(found) == count for (_, count), found in parts.items())

    def _has_all_ranks(self) -> bool:
        ranks = {image.identity.rank for image in self._images if image.whole}
        return ranks == set(range(self.world_size))

    def _note_damage(self, image: Source, error: CorruptionError) -> None:
        if id(image) not in self._damaged:
            self._damaged.add(id(image))
            self.damage.append(str(error))

    def _note_source(self, image: Source) -> None:
        if image.where not in self.sources:
            self.sources.append(image.where)

    def _lack(self, what: str) -> CorruptionError | RestoreError:
        if self.damage:
            return CorruptionError(f"{self.damage[0]} (there is no other)")
        return RestoreError(what)


def restore(
    state: TrainingState, restoration: Restoration, rank: int, topology: str = ""
) -> dict[str, Any]:
    """Put a version back: small state from the rank's own image, tensors from whoever has them.

    ``topology``: of the model as the script made it; "": any.  Raises as :meth:`Restoration.small`
    and :meth:`Restoration.fill`.
    """
    small = restoration.small(rank)
    if IMPORTED in small:
        take_model(state, restoration.fill, restoration.names, small[IMPORTED])
        return small
    if "state" not in small:
        raise StateError(
            "this version was saved through torch's DCP, not by a Session: load it with "
            "ftrain.runtime.dcp.FtrainReader, or use another run directory"
        )
    state.load_small(small["state"])
    restoration.fill(state.layout().tensors, topology)
    return small


def file_readers(world_size: int) -> int:
    """Threads that read one rank's files, when so many ranks read theirs."""
    return _READERS if world_size == 1 else 1


def _refuse_model(image: Source, known: dict[str, StateTensor]) -> None:
    """StateError for a version of another model, which names the first difference."""
    segments = {segment.name: segment for segment in image.plan.segments}
    for name, segment in segments.items():
        if name in known:
            _check_shape(segment, known[name])
    odd = next((name for name in segments if name not in known), None)
    raise StateError(
        f"the saved run holds {odd or 'another model'}, which this script does not have; use "
        "another run directory for another model"
    )


def _check_shape(segment: Segment, tensor: StateTensor) -> None:
    if segment.place.shape != tensor.place.shape or segment.dtype != tensor.dtype:
        raise StateError(
            f"{segment.name} is {list(segment.place.shape)} {segment.dtype} in the saved run and "
            f"{list(tensor.place.shape)} {tensor.dtype} here; use another run directory for "
            "another model"
        )
