"""Images of another node, over the network: both ends."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from ftrain.comms.channel import Channel, Identity, connect_blocking
from ftrain.comms.errors import RemoteProtocolError, StateError
from ftrain.comms.protocol.messages import VersionId
from ftrain.snapshot.client import OpenedImage
from ftrain.snapshot.protocol.messages import FetchDone, FetchedImage, FetchRequest
from ftrain.snapshot.store import SlotStore, places_of

_IMAGE_BYTES_MAX = 1 << 44
_TIMEOUT_S = 10.0  # without anything moving


async def serve_fetch(store: SlotStore, channel: Channel, request: FetchRequest) -> None:
    """Answer one request; what is sent can't be overwritten meanwhile."""
    images = store.images(request.version, request.ranks)
    missing = sorted(set(request.ranks) - {image.rank for image in images})
    places = places_of(images)
    store.custody.pin(places)
    try:
        for image in images:
            await channel.send(FetchedImage(image.rank, image.whole, image.view.nbytes))
            await channel.send_data(image.view)
        reason = ""
        if not images or missing:
            reason = f"it holds nothing of {request.version} for ranks {missing or 'of any number'}"
        await channel.send(FetchDone(reason))
    finally:
        store.custody.unpin(places)


def fetch_images(
    address: str,
    version: VersionId,
    identity: Identity,
    secret: bytes,
    ranks: Sequence[int] | None = None,
) -> list[OpenedImage]:
    """All images of ``version`` (or those of ``ranks``) from the manager at ``address``.

    They are what that manager holds, damaged or not.  Raises PeerLostError, AuthenticationError,
    RemoteProtocolError, or StateError when it has none or lacks one of ``ranks``.
    """
    images: list[OpenedImage] = []
    with connect_blocking(address, identity, secret, timeout_s=_TIMEOUT_S) as channel:
        channel.send(FetchRequest(version, tuple(ranks or ())))
        while not isinstance(message := channel.receive(), FetchDone):
            if not isinstance(message, FetchedImage) or not 0 < message.nbytes < _IMAGE_BYTES_MAX:
                raise RemoteProtocolError(f"{address} answered with a {type(message).__name__}")
            buffer = memoryview(mmap.mmap(-1, message.nbytes))
            channel.receive_into(buffer)
            images.append(OpenedImage(message.rank, message.whole, buffer.toreadonly()))
    if message.reason:
        raise StateError(f"{address} can't help: {message.reason}")
    return images
