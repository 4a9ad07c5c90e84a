"""Copies in an object store as images to restore from."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from remote_samples import save
from s3_server import S3Server
from sending import send

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.remote.place import Place
from ftrain.checkpoint.remote.store import RemoteStore
from ftrain.checkpoint.segment_reader import Scratch, SegmentReader
from ftrain.comms.errors import CorruptionError
from ftrain.runtime.remote_images import RemoteImages


@pytest.mark.slow
def test_a_store_that_went_away_is_waited_for_once(s3: S3Server, tmp_path: Path) -> None:
    version = save(DurableStore(tmp_path / "checkpoints"), 3, 7)
    uri = s3.uri("bucket/run")
    send(RemoteStore(Place(uri)), version)
    images = RemoteImages(uri, version)
    with closing(images):
        found = [image for image in images() if isinstance(image, SegmentReader)]
        assert len(found) == 2
        found[0].read(0, Scratch())
        s3.kill()
        with pytest.raises(CorruptionError, match="can't be reached"):
            found[0].read(1, Scratch())
        s3.start()  # who asked again would be answered
        for image in found:
            with pytest.raises(CorruptionError, match="can't be reached"):
                image.read(1, Scratch())
