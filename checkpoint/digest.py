"""The one hash that images and durable files use: xxh3-128, against corruption, not forgery."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer

DIGEST_BYTES = 16
NO_DIGEST = bytes(DIGEST_BYTES)


def digest_of(data: Buffer) -> bytes:
    """16-byte digest of ``data``, which is read in place; the GIL is released meanwhile."""
    return xxhash.xxh3_128_digest(data)
