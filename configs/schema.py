"""The configuration as frozen values, resolved once by the launcher.

Every group of ``configs/`` fills one class here.  Sizes are bytes, times are seconds, unless the
name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """``launch``: what is started where. Torchrun's option names set the same fields."""

    nnodes: int = 1
    nproc_per_node: int = 1
    node_rank: int = 0
    local_nodes: int = 0  # > 0: this many nodes on this machine, each with its own agent
    spares: int = 0  # nodes more that wait, and take the place of one that is lost
    rdzv_endpoint: str = ""  # "host:port" of the coordinator, for nnodes > 1
    bind: str = "127.0.0.1"
    host: str = "127.0.0.1"  # address under which other nodes reach this one
    run_id: str = ""  # default: kept in the run directory
    run_dir: str = ""  # default: ./ftrain-runs/<script name>
    log_dir: str = ""  # default: <run_dir>/logs
    log_attempts: int = 20  # newest attempts whose logs are kept, besides the first three
    tee: str = "3"  # torchrun's Std: 0 none, 1 stdout, 2 stderr, 3 both, or "0:1,1:3"
    redirects: str = "0"
    max_restarts: int = 3  # in a row, with no newly committed version in between
    preload: tuple[str, ...] = ()  # modules imported once by the worker server
    stop_grace_s: float = 30.0  # from a stop signal to the durable version
    threads_per_rank: int = 0  # 0: cores / local ranks, at least 1
    join_timeout_s: float = 600.0  # how long another host waits for the coordinator to be there
    rejoin_timeout_s: float = 60.0  # ... and to be there again, once it was


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotConfig:
    """``snapshot``: the in-memory levels, on the node itself (L1) and as parity on others (L2)."""

    enabled: bool = True
    every_steps: int = 1
    slots: int = 3  # newest committed, one in capture, one for a reader
    chunk_bytes: int = 16 * 1024 * 1024
    memory_share_max: float = 0.5  # of the memory available at start
    finish_capture_s: float = 0.2  # survivors' time to finish a dead rank's capture
    barrier_s_max: float = 10.0  # longest wait before optimizer.step; then the version is skipped
    verify_restore: bool = True
    rehash: bool = True  # look for writes outside optimizer.step
    parity: int = 1  # nodes of a group that may be lost at once; 0: no parity
    group: int = 8  # nodes that protect each other, or all if they are fewer
    rack: str = ""  # what fails together with this node; with local nodes one for each: "a,a,b,b"
    parity_bytes_per_s_max: float = 0.0  # of fetching what parity is made of, on each node; 0: any
    scrub_every_s: float = 60.0  # between looks whether what is protected is as it was; 0: none
    node_mtbf_s: float = 3.6e7  # mean time between losses of one node, for what is predicted
    rack_mtbf_s: float = 0.0  # ... of one rack; 0: they are not lost


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """``checkpoint``: the durable levels, local files (L3) and an object store (L4)."""

    enabled: bool = True
    durable_every_s: float = 300.0
    durable_every_steps: int = 0  # > 0: of boundaries that are multiples of it, instead
    keep_last: int = 2
    keep_every: int = 0  # > 0: for good, the first version of every so many steps
    dir: str = ""  # default: <run_dir>/checkpoints
    bytes_per_s_max: float = 0.0  # of each node's writing; 0: no limit
    verify: str = "always"  # what is read: always | sampled | off
    mtbf_s: float = 0.0  # > 0: mean time between failures, for the interval that is proposed
    remote: str = ""  # URI of an object store for copies: s3:// gs:// hdfs:// file://; "": none
    remote_every_s: float = 1800.0
    remote_every_steps: int = 0  # > 0: instead, the first durable version in each so many steps
    remote_keep_last: int = 2
    remote_keep_every: int = 0  # steps; 0: none but the last ones
    remote_bytes_per_s_max: float = 0.0  # of the copying; 0: no limit
    remote_end_s: float = 600.0  # for copying the last version once the run is over; 0: not done


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionConfig:
    """``detection``: what counts as hung, and when."""

    enabled: bool = True
    hang_s: float = 3.0  # limit is max(hang_s, hang_steps x median step)
    hang_steps: float = 10.0
    gil_busy_s: float = 60.0  # holding the GIL while burning CPU
    user_stall_s: float = 600.0  # user code that merely takes long
    user_warn_s: float = 30.0  # when to warn about it, with its stack
    poll_s: float = 0.25
    node_lease_s: float = 5.0
    suspect_steps: int = 10  # after a restore, a loss that is not finite speaks against it; 0: off


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultConfig:
    """One deliberate fault. Exactly one of ``at_step``, ``at_s``, ``mtbf_s`` is set."""

    kind: str  # sigkill sigstop segfault exit exception gil_hang oom node smp worker_server agent
    #            coordinator skip_collective
    at_step: int = -1
    at_s: float = -1.0
    mtbf_s: float = -1.0
    count_max: int = 1  # for mtbf_s
    rank: int = -1  # -1: random
    node: int = -1  # -1: random
    phase: str = "any"  # any | forward_backward | optimizer | boundary | recovery
    delay_s: float = 0.0  # after the step or phase was seen
    resume_s: float = -1.0  # sigstop: SIGCONT after this long; < 0 never
    down_s: float = 0.0  # coordinator: stays down this long


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultsConfig:
    """``faults``: the fault-injection test mode."""

    schedule: tuple[FaultConfig, ...] = ()
    seed: int = 0
    replay: str = ""  # path of a faults.jsonl to replay


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsConfig:
    """``events``: what is written about a run."""

    bytes_max: int = 256 * 1024 * 1024
    progress_every_s: float = 1.0
    progress_piped_every_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """``fleet``: replica groups that train together, and come and go."""

    groups: int = 0  # that are started on this machine (--replica-groups); 0: none
    groups_min: int = 1  # with fewer of them training waits
    coordinator: str = ""  # "host:port" of a fleet that runs already (--join)
    group: int = -1  # number of this replica group in it
    run_id: str = ""  # of the fleet; default: the script's name
    bind: str = "127.0.0.1"  # where its coordinator and ranks listen
    host: str = ""  # address under which others reach these; "": as bind
    port: int = 0  # of the coordinator; 0: any
    gather_s: float = 20.0  # for all groups to be there at the beginning
    silence_s: float = 0.5  # of a rank that stands still in the middle of an average
    patience_s: float = 10.0  # ... while the others wait for it to begin one
    join_timeout_s: float = 600.0  # for a group to be let in


@dataclass(frozen=True, slots=True, kw_only=True)
class FtrainConfig:
    """Everything, as ranks and processes receive it."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    events: EventsConfig = field(default_factory=EventsConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    seed: int = 0
