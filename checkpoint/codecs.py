"""How chunks are stored where the place is slower than the codec: byte planes and zstandard.

The bytes of floating-point numbers are put apart by their place in the number: signs and exponents
repeat and shrink, mantissas hardly do (after ZipNN, Hershcovitch et al., arXiv 2411.05239).  A
plane that does not shrink is kept as it is, so that it costs nothing to read.  Level 1, because
higher ones buy nothing on this kind of data.

Stored form of ``planes<w>-zstd``: w little-endian uint32, the stored sizes of the planes, then the
planes; one whose stored size is its full size is not compressed.  NumPy and zstandard are imported
only by who has such chunks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrain.comms.errors import CorruptionError, StateError

if TYPE_CHECKING:
    import numpy as np

RAW = "raw"
_LEVEL = 1
_WIDTHS = (1, 2, 4, 8)
_PIECE_BYTES = 256 * 1024  # that a plane is unpacked in
_WORTH_IT = 0.98  # a plane that shrinks less is kept as it is


@dataclass(frozen=True, slots=True)
class PlaneCodec:
    """Planes of ``width`` bytes per number."""

    width: int

    @property
    def name(self) -> str:
        """What chunks call it."""
        return f"planes{self.width}-zstd"

    def encode(self, raw: memoryview) -> bytes:
        """The stored form; may be longer than ``raw`` by a few bytes when nothing shrinks.

        ``len(raw)`` has to be a multiple of the width.
        """
        import numpy as np
        import zstandard

        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
        planes = np.frombuffer(raw, dtype=np.uint8).reshape(-1, self.width)
        stored = []
        for number in range(self.width):
            plane = np.ascontiguousarray(planes[:, number])
            packed = compressor.compress(plane.data)
            stored.append(packed if len(packed) < _WORTH_IT * plane.nbytes else plane.tobytes())
        return struct.pack(f"<{self.width}I", *map(len, stored)) + b"".join(stored)

    def decode(self, stored: memoryview, raw: memoryview) -> None:
        """Fill ``raw`` from its stored form; some hundred KiB are taken meanwhile.

        Raises:
            CorruptionError: ``stored`` is not the stored form of so many bytes.
        """
        import numpy as np

        head = 4 * self.width
        if len(stored) < head or len(raw) % self.width:
            raise CorruptionError(f"not a chunk of {self.name}")
        sizes = struct.unpack_from(f"<{self.width}I", stored)
        if head + sum(sizes) != len(stored):
            raise CorruptionError(f"the planes of {self.name} do not add up")
        planes = np.frombuffer(raw, dtype=np.uint8).reshape(-1, self.width)
        at = head
        for number, size in enumerate(sizes):
            _fill(planes[:, number], stored[at : at + size])
            at += size


def codec_of(name: str) -> PlaneCodec | None:
    """The codec that a file names; None: the bytes as they are.

    Raises:
        StateError: this version of ftrain does not know it.
    """
    if name == RAW:
        return None
    for width in _WIDTHS:
        if name == f"planes{width}-zstd":
            return PlaneCodec(width)
    raise StateError(f"chunks are stored as {name!r}: use an ftrain that knows this codec")


def _fill(plane: np.ndarray[tuple[int], np.dtype[np.uint8]], stored: memoryview) -> None:
    import numpy as np
    import zstandard

    if len(stored) == len(plane):
        plane[:] = np.frombuffer(stored, dtype=np.uint8)
        return
    piece, done = np.empty(_PIECE_BYTES, dtype=np.uint8), 0
    try:
        if zstandard.get_frame_parameters(stored).content_size != len(plane):
            raise CorruptionError("a plane has another size than its chunk")
        with zstandard.ZstdDecompressor().stream_reader(stored) as frame:
            while nbytes := frame.readinto(piece[: len(plane) - done].data):
                plane[done : done + nbytes] = piece[:nbytes]
                done += nbytes
    except zstandard.ZstdError as error:
        raise CorruptionError(f"a plane can't be decompressed ({error})") from None
    if done < len(plane):
        raise CorruptionError("a plane is cut off")
