"""Who keeps a rank's versions: the snapshot manager under ``ftrain launch``, else durable files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any, Protocol

from ftrain.checkpoint.capture import CaptureEngine, CaptureStatistics
from ftrain.checkpoint.header import ImageIdentity, ImageState
from ftrain.checkpoint.image import ImageReader
from ftrain.checkpoint.manifest import open_files, read_manifest
from ftrain.checkpoint.pinned import PageLock
from ftrain.checkpoint.tensors import StateTensor
from ftrain.comms.channel import Identity
from ftrain.comms.environment import RankContext, RankEnvironment
from ftrain.comms.errors import (
    CorruptionError,
    PeerLostError,
    RemoteProtocolError,
    RestoreError,
    StateError,
)
from ftrain.comms.protocol.messages import RestorePlan, VersionId
from ftrain.runtime.alone import AloneKeeper
from ftrain.runtime.group import GroupView
from ftrain.runtime.remote_images import RemoteImages
from ftrain.runtime.restore import Found, Restoration, file_readers, restore
from ftrain.runtime.state import TrainingState
from ftrain.snapshot.client import OpenedImage, SnapshotClient
from ftrain.snapshot.fetch import fetch_images

Note = Callable[[str], None]
_LAST_S_MAX = 15.0  # for the run's last version: a manager that hangs is replaced by then
_REBUILD_S_MAX = 600.0  # until what a lost node held is rebuilt here


class Keeper(Protocol):
    """Keeps versions of this rank's state, and knows which one to go on from."""

    run_dir: str
    epoch: int
    events_bytes_max: int
    resumed: bool
    stop_asked: bool  # by a signal to this process
    unsaved: str  # why the run's last version is not durable, if this rank knows

    def restore(self, state: TrainingState) -> dict[str, Any] | None: ...
    def capture(
        self,
        step: int,
        tensors: tuple[StateTensor, ...],
        small: bytes,
        collectives: int,
        *,
        last: bool,
    ) -> bool: ...
    def expect(self, tensors: tuple[StateTensor, ...]) -> None: ...
    def barrier(self) -> None: ...
    def drain(self) -> None: ...
    def finish(self) -> None: ...
    def save(self) -> None: ...
    def stop_here(self, step: int) -> bool: ...
    def stop(self, step: int) -> None: ...
    def statistics(self) -> CaptureStatistics: ...


def open_keeper(environment: RankEnvironment, note: Note) -> Keeper:
    """The keeper that fits how this rank was started."""
    context = environment.context
    if context is not None and context.smp_socket:
        return SnapshotKeeper(environment, context, note)
    return AloneKeeper(environment, note)


class SnapshotKeeper:
    """Captures every version into the node's snapshot manager."""

    stop_asked = False  # signals go to the agent, and its wishes come through the telemetry page
    unsaved = ""  # the coordinator sees to that

    def __init__(self, environment: RankEnvironment, context: RankContext, note: Note) -> None:
        self._context = context
        self._config = context.config.snapshot
        self._rank = environment.rank
        self._world_size = environment.world_size
        self.run_dir = context.run_dir
        self.epoch = context.epoch
        self.events_bytes_max = context.config.events.bytes_max
        self.resumed = context.formation.restarts > 0
        first = environment.rank - environment.local_rank
        self._group = GroupView(
            environment.rank,
            environment.world_size,
            context.node,
            tuple(range(first, first + environment.local_world_size)),
        )
        self._topology = ""
        self._newest: tuple[StateTensor, ...] = ()  # of the boundary before
        try:
            self._client = SnapshotClient(
                context.smp_socket,
                rank=environment.rank,
                world_size=environment.world_size,
                epoch=context.epoch,
                node=context.node,
                lock_pages=PageLock,
            )
        except StateError as error:  # this rank's time is over: no mistake of the script
            raise PeerLostError(str(error)) from None
        self._engine = CaptureEngine(
            self._client,
            self._identity,
            self._group.share,
            rank=environment.rank,
            chunk_bytes=self._config.chunk_bytes,
            compare=self._config.rehash,
            on_note=note,
        )
        self._note = note

    def restore(self, state: TrainingState) -> dict[str, Any] | None:
        """Put back what the formation's plan names; returns the small tree, None when fresh.

        Raises:
            RestoreError: this version is damaged or gone; the next formation takes another one.
            StateError: the version is not of this script's model, and no other one will be.
        """
        self._topology = state.topology()
        plan = self._context.formation.restore
        if plan.level == "fresh" or plan.version is None:
            return None
        try:
            if plan.level == "durable":
                return self._restore_from_files(state, plan)
            return self._restore_from_memory(state, plan, plan.version)
        except CorruptionError as error:
            raise RestoreError(f"step {plan.version.step} can't be put back: {error}") from error

    def _restore_from_files(self, state: TrainingState, plan: RestorePlan) -> dict[str, Any]:
        version = read_manifest(plan.path)
        config = self._context.config.checkpoint
        copies = RemoteImages(config.remote, version)
        with open_files(version) as files, closing(copies):
            readers = file_readers(len(self._group.local_ranks))
            restoration = Restoration(files, copies, verify=config.verify, readers=readers)
            small = restore(state, restoration, self._rank, self._topology)
        if restoration.damage:
            self._client.repaired(version.version, restoration.damage, restoration.sources)
        return small

    def _restore_from_memory(
        self, state: TrainingState, plan: RestorePlan, version: VersionId
    ) -> dict[str, Any]:
        held_here = self._context.node in plan.sources  # a node that took another's place has none
        wait_s = _REBUILD_S_MAX if plan.rebuilds else None
        near = _readable(self._context, version, self._open(version, wait_s) if held_here else [])
        sources = _RemoteSources(self._context, plan, version)
        verify = "always" if self._config.verify_restore else "off"
        restoration = Restoration(near, sources, verify=verify)
        try:
            small = restore(state, restoration, self._rank, self._topology)
        except (CorruptionError, RestoreError) as error:
            if sources.lost is not None:  # it may be back soon, and the version is as good as ever
                raise sources.lost from error
            raise
        finally:
            damage, used = restoration.damage, restoration.sources
            del near, restoration
            if held_here:
                self._client.release(version)
        if damage:
            self._client.repaired(version, damage, used)
        return small

    def _open(self, version: VersionId, wait_s: float | None) -> list[OpenedImage]:
        try:
            return self._client.open(version, wait_s)
        except StateError:
            return []  # another node may have it

    def capture(
        self,
        step: int,
        tensors: tuple[StateTensor, ...],
        small: bytes,
        collectives: int,
        *,
        last: bool,
    ) -> bool:
        """Begin to capture the version at boundary ``step``; False: it is not its turn."""
        if step % self._config.every_steps and not last:
            if tensors is not self._newest:  # as after the first step of an optimizer
                self._newest = tensors
                self._engine.expect(tensors)
            return False
        self._newest = tensors
        wait_s = _LAST_S_MAX if last else None
        self._engine.start(VersionId(self.epoch, step), tensors, small, collectives, wait_s=wait_s)
        return True

    def expect(self, tensors: tuple[StateTensor, ...]) -> None:
        """Have room made for versions of these tensors, meanwhile."""
        self._engine.expect(tensors)

    def barrier(self) -> None:
        """To be called before any registered optimizer writes."""
        self._engine.barrier(self._config.barrier_s_max)

    def drain(self) -> None:
        """Wait for the capture under way."""
        self._engine.drain(self._config.barrier_s_max)

    def finish(self) -> None:
        """The loop is over."""
        self.drain()

    def save(self) -> None:
        """The agent reads the wish from the telemetry page."""

    def stop_here(self, step: int) -> bool:
        """Stops are agreed on through the telemetry page."""
        return False

    def stop(self, step: int) -> None:
        """Never called: see :meth:`stop_here`."""

    def statistics(self) -> CaptureStatistics:
        """What capturing cost so far."""
        return self._engine.statistics()

    def _identity(self, version: VersionId, rank: int) -> ImageIdentity:
        return ImageIdentity(
            run_id=self._context.job_id,
            topology=self._topology,
            version=version,
            rank=rank,
            world_size=self._world_size,
            node=self._context.node,
            incarnation=self._context.incarnation,
        )


class _RemoteSources:
    """Images from other nodes' snapshot managers, one node after the other, as needed.

    A node that can't help is passed over; ``lost`` is the last one that could not be reached.
    """

    def __init__(self, context: RankContext, plan: RestorePlan, version: VersionId) -> None:
        self.lost: PeerLostError | None = None
        self._context = context
        self._version = version
        self._places = [
            place
            for place in context.formation.places
            if place.node in plan.sources and place.node != context.node and place.smp_address
        ]

    def __call__(self) -> Found:
        """The images of the next node that has some; empty when there is none left."""
        context, version = self._context, self._version
        identity = Identity(context.job_id, "rank", context.node, context.incarnation)
        secret = bytes.fromhex(context.secret)
        while self._places:
            place = self._places.pop(0)
            try:
                found = fetch_images(place.smp_address, version, identity, secret)
            except PeerLostError as error:
                self.lost = error
            except (StateError, RemoteProtocolError):
                continue
            else:
                return _readable(context, version, found, place.node)
        return []


def _readable(
    context: RankContext, version: VersionId, found: list[OpenedImage], node: int | None = None
) -> list[ImageReader | CorruptionError]:
    """What ``node`` (this one) gave as images of ``version``; an error for what is none."""
    images: list[ImageReader | CorruptionError] = []
    for opened in found:
        where = (
            f"rank {opened.rank}'s share of step {version.step} in the memory of node "
            f"{context.node if node is None else node}"
        )
        try:
            reader = ImageReader(opened.buffer, where=where)
            reader.require(run_id=context.job_id, rank=opened.rank, state=ImageState.SEALED)
            if reader.identity.version != version:
                raise CorruptionError(f"{where} is of {reader.identity.version}")
        except CorruptionError as error:
            images.append(error)
        except StateError as error:
            images.append(CorruptionError(str(error)))
        else:
            images.append(reader)
    return images
