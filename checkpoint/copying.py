"""The copies that make an image out of tensors, looked up once per plan.

A capture runs beside the training thread in the same interpreter: each Python operation here is
time that the training thread can't have.  So what is copied from where is worked out when the plan
is made, and a capture is one call per piece.

What lies on a GPU is copied in the calling thread's current stream there: into page-locked memory
(see pinned.py) behind the caller's back, into other memory before the call returns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterable

import torch

from ftrain.checkpoint.image import ImageWriter
from ftrain.checkpoint.image_plan import ImagePlan, Piece
from ftrain.checkpoint.tensors import Changes, StateTensor

_SMALL_COPY_BYTES = 128 * 1024  # below this, giving up the GIL costs more than the copy

# The same memmove twice: one gives up the GIL while it copies, the other does not.
_memmove_free = ctypes.memmove
_memmove_held = ctypes.PYFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0)


_Move = tuple[Callable[[int, int, int], object], int, int, int]  # function, offset, source, bytes


class CopyProgram:
    """Copies from ``tensors`` to images of ``plan``.

    The addresses are those of now: whoever moves a tensor's memory needs another program.  The
    memory itself is kept alive.
    """

    def __init__(self, plan: ImagePlan, tensors: Iterable[StateTensor]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        found = {tensor.tensor.device for tensor in self._tensors.values()}
        self.gpus = tuple(sorted((d for d in found if d.type == "cuda"), key=str))
        self._moves: dict[tuple[int, Changes], list[_Move]] = {}
        self._others: dict[tuple[int, Changes], list[Piece]] = {}
        self._from_gpus: dict[tuple[int, Changes], list[tuple[int, torch.Tensor]]] = {}
        for chunk in range(plan.layout.chunks):
            for piece in plan.pieces(chunk):
                self._add(chunk, piece)

    def has(self, kinds: Collection[Changes]) -> bool:
        """Whether there is anything of these kinds to copy."""
        return self.has_on_gpu(kinds) or any(
            kind in kinds for _, kind in (*self._moves, *self._others)
        )

    def has_on_gpu(self, kinds: Collection[Changes]) -> bool:
        """Whether anything of these kinds is to be copied from a GPU."""
        return any(kind in kinds for _, kind in self._from_gpus)

    def copy(self, writer: ImageWriter, chunk: int, kinds: Iterable[Changes]) -> None:
        """Copy what lies in ``chunk`` and is of these kinds; from GPUs: launch the copies."""
        data = writer.data
        base = ctypes.addressof(ctypes.c_char.from_buffer(data))
        for kind in kinds:
            for offset, part in self._from_gpus.get((chunk, kind), ()):
                target = torch.frombuffer(data, dtype=torch.uint8, count=len(part), offset=offset)
                target.copy_(part, non_blocking=True)
            for move, offset, source, nbytes in self._moves.get((chunk, kind), ()):
                move(base + offset, source, nbytes)
            for piece in self._others.get((chunk, kind), ()):
                self._copy_piece(piece, base)

    def _add(self, chunk: int, piece: Piece) -> None:
        found = self._tensors[piece.segment.name]
        place = chunk, found.changes
        tensor = found.tensor
        if not tensor.is_contiguous() or tensor.device.type not in ("cpu", "cuda"):
            self._others.setdefault(place, []).append(piece)
            return
        if tensor.is_cuda:
            part = bytes_of(tensor)[piece.start : piece.start + piece.nbytes]
            self._from_gpus.setdefault(place, []).append((piece.offset, part))
            return
        move = _memmove_held if piece.nbytes < _SMALL_COPY_BYTES else _memmove_free
        source = tensor.data_ptr() + piece.start
        self._moves.setdefault(place, []).append((move, piece.offset, source, piece.nbytes))

    def _copy_piece(self, piece: Piece, base: int) -> None:
        """A piece of a tensor that does not lie in memory as in the image."""
        tensor = self._tensors[piece.segment.name].tensor
        part = bytes_of(tensor)[piece.start : piece.start + piece.nbytes].cpu()
        _memmove_free(base + piece.offset, part.data_ptr(), piece.nbytes)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements as they follow each other in an image; in place, if it is contiguous."""
    return tensor.detach().reshape(-1).view(torch.uint8)
