"""From images back into live tensors.

Any image that holds a byte is as good as any other, because ranks under one share key hold the same
bytes.  So a damaged chunk is a gap like any other, filled from the next image that has those bytes.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ftrain.checkpoint.codec import decode_tree
from ftrain.checkpoint.image import ImageReader, Segment
from ftrain.checkpoint.tensors import StateTensor, tensor_bytes
from ftrain.comms.errors import CorruptionError, RestoreError, StateError
from ftrain.runtime.state import TrainingState

_Key = tuple[str, str]  # name of a tensor, share key
_Span = tuple[int, int]  # first byte of a tensor, and the one behind the last


class Restoration:
    """Puts one version together from images, and passes over what is damaged in them.

    Args:
        images: the nearest ones; all of them are looked at. An error stands for one that is there
            and can't be read.
        more: asked for the next ones while something is missing; gives none when there are none.
        verify: compare a chunk with its digest before its bytes are used.
    """

    def __init__(
        self,
        images: Sequence[ImageReader | CorruptionError],
        more: Callable[[], Sequence[ImageReader | CorruptionError]] = tuple,
        *,
        verify: bool = True,
    ) -> None:
        self.damage: list[str] = []  # each damaged image once, in words
        self.sources: list[str] = []  # images that something damaged was repaired from
        self._images: list[ImageReader] = []
        self._more = more
        self._verify = verify
        self._sound: dict[tuple[int, int], bool] = {}  # (image, chunk): matches its digest
        self._damaged: set[int] = set()  # images
        self._unreadable = False  # of what an image held nothing is known
        self._gaps: dict[_Key, list[_Span]] = {}
        self._broken: dict[_Key, list[_Span]] = defaultdict(list)  # found damaged somewhere
        self._nearest = {id(image) for image in self._take(images)}

    def small(self, rank: int) -> dict[str, Any]:
        """The small state of ``rank``, from the first good copy.

        Raises:
            CorruptionError: every copy is damaged.
            RestoreError: there is none.
        """
        repaired = False
        for image in self._each():
            if image.identity.rank != rank:
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

    def fill(self, tensors: Sequence[StateTensor]) -> None:
        """Fill ``tensors``; every byte of every one of them has to be somewhere.

        Raises:
            StateError: a tensor has another shape or type in the images, or is not in them.
            CorruptionError: some bytes are damaged in every image that has them.
            RestoreError: nobody has some part.
        """
        wanted = {(tensor.name, tensor.share): tensor.tensor for tensor in tensors}
        known = {tensor.name for tensor in tensors}
        self._gaps = {
            (tensor.name, tensor.share): [(0, size)]
            for tensor in tensors
            if (size := tensor_bytes(tensor.tensor))
        }
        images: Sequence[ImageReader] = self._images
        while True:
            for image in images:
                self._fill_from(image, wanted, known)
            if not self._gaps:
                return
            self._refuse_foreign(wanted)
            further = self._more()
            if not further:
                share = next(iter(self._gaps))[1]
                raise self._lack(f"no node holds every part of what ranks {share} have in common")
            images = self._take(further)

    def _each(self) -> Iterator[ImageReader]:
        """Every image, those that have to be asked for last."""
        yield from tuple(self._images)
        while further := self._more():
            yield from self._take(further)

    def _take(self, found: Sequence[ImageReader | CorruptionError]) -> list[ImageReader]:
        images = [image for image in found if isinstance(image, ImageReader)]
        errors = [str(error) for error in found if isinstance(error, CorruptionError)]
        self.damage += errors
        self._unreadable = self._unreadable or bool(errors)
        self._images += images
        return images

    def _fill_from(
        self, image: ImageReader, wanted: dict[_Key, torch.Tensor], known: set[str]
    ) -> None:
        if not image.whole:
            return
        shares = {share for _, share in wanted}
        for segment in image.segments:
            key = (segment.name, segment.share)
            if segment.share not in shares:
                continue
            _check_known(segment, known)
            if key not in self._gaps:
                continue
            _check_shape(segment, wanted[key])
            for start, stop in self._pieces(image, segment, key):
                _copy_in(wanted[key], segment, image, start, stop)
                self._filled(image, key, (start, stop))

    def _pieces(self, image: ImageReader, segment: Segment, key: _Key) -> list[_Span]:
        """What of a segment is missing and sound, cut at the bounds of chunks."""
        chunk_bytes = image.header.layout.chunk_bytes
        base = segment.start - segment.offset  # from a place in the image's data to the tensor's
        pieces = []
        for chunk in image.chunks_of(segment):
            first = max(segment.start, base + chunk * chunk_bytes)
            last = min(segment.start + segment.nbytes, base + (chunk + 1) * chunk_bytes)
            missing = [
                (max(first, start), min(last, stop))
                for start, stop in self._gaps[key]
                if max(first, start) < min(last, stop)
            ]
            if missing and self._is_sound(image, chunk):
                pieces += missing
            else:
                self._broken[key] += missing
        return pieces

    def _is_sound(self, image: ImageReader, chunk: int) -> bool:
        if not self._verify:
            return True
        place = (id(image), chunk)
        if place not in self._sound:
            try:
                image.verify_chunk(chunk)
                self._sound[place] = True
            except CorruptionError as error:
                self._note_damage(image, error)
                self._sound[place] = False
        return self._sound[place]

    def _filled(self, image: ImageReader, key: _Key, piece: _Span) -> None:
        start, stop = piece
        rest = []
        for first, last in self._gaps[key]:
            rest += [(first, min(last, start)), (max(first, stop), last)]
        self._gaps[key] = [(first, last) for first, last in rest if first < last]
        if not self._gaps[key]:
            del self._gaps[key]
        repaired = any(first < stop and start < last for first, last in self._broken[key])
        if repaired or self._stands_in(image):
            self._note_source(image)

    def _stands_in(self, image: ImageReader) -> bool:
        """Whether the image may be used only because another one can't be read."""
        return self._unreadable and id(image) not in self._nearest

    def _refuse_foreign(self, wanted: dict[_Key, torch.Tensor]) -> None:
        """StateError for a tensor that is in no image although the share's are all here, sound."""
        for (name, share), gaps in self._gaps.items():
            if self._has_all_parts(share):
                size = tensor_bytes(wanted[name, share])
                have = size - sum(last - first for first, last in gaps)
                raise StateError(
                    f"{name} has {have} of its {size} bytes in the version to restore: "
                    "was the run made by another model or another number of ranks?"
                )

    def _has_all_parts(self, key: str) -> bool:
        parts: dict[tuple[int, int], set[int]] = defaultdict(set)
        for image in self._images:
            if image.whole and id(image) not in self._damaged:
                for share in image.shares:
                    if share.key == key:
                        parts[share.node, share.parts].add(share.part)
        return any(len(found) == count for (_, count), found in parts.items())

    def _note_damage(self, image: ImageReader, error: CorruptionError) -> None:
        if id(image) not in self._damaged:
            self._damaged.add(id(image))
            self.damage.append(str(error))

    def _note_source(self, image: ImageReader) -> None:
        if image.where not in self.sources:
            self.sources.append(image.where)

    def _lack(self, what: str) -> CorruptionError | RestoreError:
        if self.damage:
            return CorruptionError(f"{self.damage[0]} (there is no other)")
        return RestoreError(what)


def restore_from(
    state: TrainingState, images: Sequence[ImageReader], rank: int, *, verify: bool
) -> dict[str, Any]:
    """Put a version back from images that are all at hand; returns the small tree.

    Raises as :meth:`Restoration.small` and :meth:`Restoration.fill`.
    """
    return restore(state, Restoration(images, verify=verify), rank)


def restore(state: TrainingState, restoration: Restoration, rank: int) -> dict[str, Any]:
    """Put a version back: small state from the rank's own image, tensors from whoever has them."""
    small = restoration.small(rank)
    state.load_small(small["state"])
    restoration.fill(state.layout().tensors)
    return small


def _check_known(segment: Segment, known: set[str]) -> None:
    if segment.name not in known:
        raise StateError(
            f"the saved run holds {segment.name}, which this script does not have; use another "
            "run directory for another model"
        )


def _check_shape(segment: Segment, tensor: torch.Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if segment.shape != tuple(tensor.shape) or segment.dtype != dtype:
        raise StateError(
            f"{segment.name} is {list(segment.shape)} {segment.dtype} in the saved run and "
            f"{list(tensor.shape)} {dtype} here; use another run directory for another model"
        )


def _copy_in(
    tensor: torch.Tensor, segment: Segment, image: ImageReader, start: int, stop: int
) -> None:
    """Bytes ``[start, stop)`` of the tensor, out of the segment."""
    source = image.segment_bytes(segment)[start - segment.start : stop - segment.start]
    if not tensor.is_cuda and tensor.is_contiguous():
        address = np.frombuffer(source, dtype=np.uint8).ctypes.data
        ctypes.memmove(tensor.data_ptr() + start, address, stop - start)
        return
    with torch.no_grad():
        whole = tensor.contiguous()
        flat = whole.reshape(-1).view(torch.uint8)
        flat[start:stop].copy_(torch.from_numpy(np.frombuffer(source, dtype=np.uint8).copy()))
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
