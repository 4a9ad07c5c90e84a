"""Frozen tensors: what is known of their chunks from one version to the next."""

from __future__ import annotations

from collections.abc import Sequence

from ftrain.checkpoint.image import ImageWriter
from ftrain.checkpoint.image_plan import ImagePlan
from ftrain.checkpoint.tensors import Changes, StateTensor


class FrozenChunks:
    """The chunks of frozen tensors, and which digests they had in the version before."""

    def __init__(self, plan: ImagePlan, tensors: Sequence[StateTensor]) -> None:
        frozen = {t.name: t.tensor for t in tensors if t.changes is Changes.NEVER}
        places = [s.offset // plan.chunk_bytes for s in plan.segments if s.name in frozen]
        self._chunks = range(min(places, default=0), plan.layout.chunks if places else 0)
        self._tensors = list(frozen.values())
        self._digests: list[bytes] = []
        self._writes = 0  # that torch counted: not all of them, so this is only a hint
        self._steady = True

    def expect(self, writer: ImageWriter) -> bool:
        """Let the chunks in this image have the digests of before; False: nothing is known."""
        writes = sum(t._version for t in self._tensors if not t.is_inference())
        if writes != self._writes:
            self._digests = []
        self._writes = writes
        if not (self._steady and self._digests):
            return False
        for chunk, digest in zip(self._chunks, self._digests, strict=True):
            writer.expect(chunk, digest)
        return True

    def sealed(self, writer: ImageWriter) -> None:
        """The next version is compared with this one."""
        self._digests = [writer.digest(chunk) for chunk in self._chunks]

    def unsteady(self) -> None:
        """They do change: nothing is expected of them any more."""
        self._steady = False
