"""Hydra overrides in, one frozen configuration out; every mistake is one sentence.

Hydra composes the YAML groups of ``ftrain.configs``; the frozen dataclasses of its ``schema`` say
what is allowed.  Keys and choices are checked against both before Hydra sees them, because only
here is it known what was nearly meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, get_type_hints

import msgspec

from ftrain.checkpoint.remote.filesystems import place_name
from ftrain.comms.errors import ConfigError
from ftrain.configs.schema import FaultConfig, FaultsConfig, FtrainConfig

_CONFIG_PACKAGE = "ftrain.configs"
_OVERRIDE = re.compile(
    r"(?P<mode>\+\+|\+|~)?(?P<key>[A-Za-z_][A-Za-z0-9_./@-]*)=(?P<value>.*)", re.S
)
_CREDENTIALS = re.compile(r"(?<=://)[^\s'\"]*@")
_DEFAULT_AT_STEP = 20  # when a single fault says neither step nor time
_WORDS = {"bool": "true or false", "str": "text", "int": "a whole number", "float": "a number"}
_WORDS |= {"array": "a list [a, b]", "object": "a mapping {key: value}", "null": "null"}
_FAULT_KEYS = tuple(f.name for f in dataclasses.fields(FaultConfig))
_TRIGGERS = ("at_step", "at_s", "mtbf_s")


def is_override(token: str) -> bool:
    """Whether a command-line token reads as ``group=choice`` or ``key=value``."""
    return _OVERRIDE.fullmatch(token) is not None


def resolve(overrides: Sequence[str] = ()) -> FtrainConfig:
    """Compose the configuration from its YAML groups and ``overrides`` (later ones win).

    Raises :class:`ConfigError` naming the key, the place, what is allowed and the nearest right
    key or choice; credentials in a URI are not shown.
    """
    try:
        return _resolved(overrides)
    except ConfigError as error:
        raise ConfigError(_CREDENTIALS.sub("", str(error))) from None


def _resolved(overrides: Sequence[str]) -> FtrainConfig:
    tree = _compose([_checked(override) for override in overrides])
    faults = _with_single_fault(tree["faults"])
    try:
        config = msgspec.convert({**tree, "faults": faults}, FtrainConfig)
    except msgspec.ValidationError as error:
        raise _wrong_type(error, {**tree, "faults": faults}, overrides) from None
    _check_ranges(config)
    return config


def groups() -> dict[str, tuple[str, ...]]:
    """Every Hydra group and its choices, from the YAML files of the package."""
    root = resources.files(_CONFIG_PACKAGE)
    return {
        folder.name: tuple(
            sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))
        )
        for folder in sorted(root.iterdir(), key=lambda entry: entry.name)
        if folder.is_dir() and folder.name in _keys(FtrainConfig)
    }


def to_yaml(config: FtrainConfig) -> str:
    """The resolved configuration as YAML, as ``--cfg job`` prints it."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(msgspec.to_builtins(config)))


def _keys(kind: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind))


def _group_types() -> Mapping[str, Any]:
    hints = get_type_hints(FtrainConfig)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def _known_keys() -> dict[str, Any]:
    """Every key that can be overridden, with its type."""
    known: dict[str, Any] = {"seed": int}
    for group, kind in _group_types().items():
        known |= {f"{group}.{name}": hint for name, hint in get_type_hints(kind).items()}
    return known | {f"faults.{n}": hint for n, hint in get_type_hints(FaultConfig).items()}


def _checked(override: str) -> str:
    """``override`` in the form that Hydra takes, its key known."""
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise ConfigError(f"'{override}' is not an override: write group=choice or key=value")
    mode, key, value = match["mode"], match["key"], match["value"]
    if mode in ("+", "~"):
        raise ConfigError(f"'{override}': keys can't be added or removed, write {key}={value}")
    choices = groups().get(key)
    if choices is not None:
        if value not in choices:
            raise ConfigError(
                f"'{override}': group '{key}' has no choice '{value}'"
                f"{_nearest(value, choices)}; it has {', '.join(choices)}"
            )
        return f"{key}={value}"
    known = _known_keys()
    if key not in known:
        raise ConfigError(f"'{override}': there is no key '{key}'{_suggestion(key, known)}")
    if known[key] is str and not (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        # Text is text: launch.tee=0:1,1:3 is no Hydra sweep and launch.run_id=007 no number.
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        value = f'"{escaped}"'
    elif known[key] in (int, float, bool) and not re.fullmatch(r"[\w.+-]*", value):
        wanted = _WORDS[known[key].__name__]
        raise ConfigError(f"{key} must be {wanted}, not '{value}' (in '{override}')")
    return f"{key}={value}"


def _nearest(word: str, among: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(among), n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def _suggestion(key: str, known: Mapping[str, Any]) -> str:
    """The nearest key, or the place's own keys when none is near."""
    group, _, name = key.rpartition(".")
    by_name = [k for k in known if k.rpartition(".")[2] == (name or key)]
    longer = [k for k in (*groups(), *known) if k.startswith(key)]
    near = longer[:1] or difflib.get_close_matches(key, list(known), n=1, cutoff=0.6) or by_name[:1]
    if near:
        return f"; did you mean '{near[0]}'?"
    place = [k for k in known if k.startswith(f"{group}.")] if group else [*groups(), "seed"]
    if not place:
        return f"; the groups are {', '.join(groups())}"
    return f"; {f'{group} has' if group else 'there are'} {', '.join(place)}"


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_module(_CONFIG_PACKAGE, version_base="1.3"):
            tree = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        words = " ".join(str(error).split()).partition(" See https")[0]
        raise ConfigError(f"the overrides {' '.join(overrides)} don't compose: {words}") from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _with_single_fault(faults: dict[str, Any]) -> dict[str, Any]:
    """Fold the single fault's keys into the schedule."""
    single = {key: faults[key] for key in _FAULT_KEYS}
    rest = {key: faults[key] for key in _keys(FaultsConfig)}
    triggers = [key for key in _TRIGGERS if single[key] not in (-1, None)]
    schedule = [_with_trigger(entry) for entry in _schedule(rest["schedule"])]
    if single["kind"]:
        schedule.append(_with_trigger(single))
    elif triggers:
        raise ConfigError(
            f"faults.{triggers[0]} says when, but not what: set faults.kind, for example"
            f" faults.kind=sigkill, or take a preset such as faults=kill_rank"
        )
    return rest | {"schedule": schedule}


def _schedule(entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ConfigError(
            "faults.schedule must be a list of faults such as"
            " 'faults.schedule=[{kind: sigkill, at_step: 5}]'"
        )
    for entry in entries:
        for key in entry:
            if key not in _FAULT_KEYS:
                near = _nearest(str(key), _FAULT_KEYS)
                raise ConfigError(f"faults.schedule: a fault has no key '{key}'{near}")
    return entries


def _with_trigger(fault: dict[str, Any]) -> dict[str, Any]:
    given = [k for k in _TRIGGERS if fault.get(k, -1) not in (-1, None)]
    if len(given) > 1:
        raise ConfigError(
            f"a fault comes at one time: {' and '.join(given)} are both set for"
            f" {fault.get('kind', 'a fault')}; set one of at_step, at_s and mtbf_s"
        )
    return fault if given else {**fault, "at_step": _DEFAULT_AT_STEP}


def _wrong_type(
    error: msgspec.ValidationError, tree: Mapping[str, Any], overrides: Sequence[str]
) -> ConfigError:
    """msgspec's ``Expected `int`, got `str` - at `$.launch.nnodes``` in our words."""
    text = str(error)
    place = re.search(r"at `\$\.?([^`]*)`", text)
    kinds = re.search(r"Expected `([^`]+)`, got `([^`]+)`", text)
    key = place[1] if place else ""
    name = re.sub(r"\[.*?\]", "", key)
    given = next((o for o in reversed(overrides) if o.startswith((f"{key}=", f"{name}="))), "")
    source = f" (in '{given}')" if given else ""
    if kinds is None:
        return ConfigError(f"{key}: {text}{source}")
    value: Any = tree
    for part in re.findall(r"[^.\[\]]+", key):
        value = value[int(part)] if isinstance(value, list) else value[part]
    wanted = " or ".join(_WORDS.get(word.strip(), word) for word in kinds[1].split("|"))
    found = f"'{value}'" if isinstance(value, str) else msgspec.json.encode(value).decode()
    return ConfigError(f"{key} must be {wanted}, not {found}{source}")


_STD = re.compile(r"[0-3]|\d+:[0-3](,\d+:[0-3])*")
_STD_RANGE = (
    lambda value: _STD.fullmatch(value) is not None,
    "0, 1, 2 or 3, or one of them for each local rank, as in 0:1,1:3",
)


_ANYTHING: tuple[Callable[[Any], bool], str] = (lambda value: True, "")


def _at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: bool(value >= least)), f"at least {least}"


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "launch.nnodes": _at_least(1),
    "launch.nproc_per_node": _at_least(1),
    "launch.node_rank": _at_least(0),
    "launch.local_nodes": _at_least(0),
    "launch.spares": _at_least(0),
    "launch.log_attempts": _at_least(1),
    "launch.max_restarts": _at_least(0),
    "launch.tee": _STD_RANGE,
    "launch.redirects": _STD_RANGE,
    "launch.stop_grace_s": _at_least(0),
    "launch.threads_per_rank": _at_least(0),
    "launch.join_timeout_s": (lambda v: v > 0, "more than 0"),
    "launch.rejoin_timeout_s": (lambda v: v > 0, "more than 0"),
    "snapshot.every_steps": _at_least(1),
    "snapshot.slots": _at_least(2),
    "snapshot.chunk_bytes": (
        lambda v: v >= 4096 and v % 4096 == 0,
        "a multiple of 4096 bytes, and at least that",
    ),
    "snapshot.memory_share_max": (lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    "snapshot.finish_capture_s": _at_least(0),
    "snapshot.parity": (lambda v: 0 <= v <= 16, "0 to 16"),
    "snapshot.group": (lambda v: 2 <= v <= 255, "2 to 255"),
    "snapshot.parity_bytes_per_s_max": (
        lambda v: v == 0 or v >= 4e6,
        "0, or at least 4000000: slower, a round never ends",
    ),
    "snapshot.scrub_every_s": _at_least(0),
    "snapshot.node_mtbf_s": (lambda v: v > 0, "more than 0"),
    "snapshot.rack_mtbf_s": _at_least(0),
    "snapshot.barrier_s_max": _at_least(0),
    "checkpoint.durable_every_s": (lambda v: v > 0, "more than 0"),
    "checkpoint.durable_every_steps": _at_least(0),
    "checkpoint.keep_last": _at_least(1),
    "checkpoint.keep_every": _at_least(0),
    "checkpoint.bytes_per_s_max": _at_least(0),
    "checkpoint.verify": (
        lambda v: v in ("always", "sampled", "off"),
        "always, sampled or off",
    ),
    "checkpoint.mtbf_s": _at_least(0),
    "checkpoint.remote_every_s": (lambda v: v > 0, "more than 0"),
    "checkpoint.remote_every_steps": _at_least(0),
    "checkpoint.remote_keep_last": _at_least(1),
    "checkpoint.remote_keep_every": _at_least(0),
    "checkpoint.remote_bytes_per_s_max": _at_least(0),
    "checkpoint.remote_end_s": _at_least(0),
    "detection.hang_s": (lambda v: v > 0, "more than 0"),
    "detection.hang_steps": _at_least(0),
    "detection.poll_s": (lambda v: v > 0, "more than 0"),
    "detection.node_lease_s": (lambda v: v > 0, "more than 0"),
    "detection.gil_busy_s": (lambda v: v > 0, "more than 0"),
    "detection.user_stall_s": (lambda v: v > 0, "more than 0"),
    "detection.user_warn_s": (lambda v: v > 0, "more than 0"),
    "detection.suspect_steps": _at_least(0),
    "fleet.groups": (lambda v: 0 <= v <= 256, "0 to 256"),
    "fleet.groups_min": _at_least(1),
    "fleet.group": _at_least(-1),
    "fleet.port": (lambda v: 0 <= v < 65536, "0 to 65535"),
    "fleet.gather_s": _at_least(0),
    "fleet.silence_s": (lambda v: v > 0, "more than 0"),
    "fleet.patience_s": (lambda v: v > 0, "more than 0"),
    "fleet.join_timeout_s": (lambda v: v > 0, "more than 0"),
    "events.bytes_max": _at_least(4096),
    "events.progress_every_s": (lambda v: v > 0, "more than 0"),
    "events.progress_piped_every_s": (lambda v: v > 0, "more than 0"),
}


def _check_ranges(config: FtrainConfig) -> None:
    for group in ("launch", "snapshot", "checkpoint", "detection", "events", "fleet"):
        for name, value in dataclasses.asdict(getattr(config, group)).items():
            key = f"{group}.{name}"
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{key} must be a finite number, not '{value}'")
            allowed, words = _RANGES.get(key, _ANYTHING)
            if not allowed(value):
                raise ConfigError(f"{key} must be {words}, not '{value}'")
    if config.checkpoint.remote:
        if not config.checkpoint.enabled:
            raise ConfigError("checkpoint.remote copies durable versions: leave checkpoint=off out")
        try:
            place_name(config.checkpoint.remote)
        except ConfigError as error:
            raise ConfigError(f"checkpoint.remote: {error}") from None
    fleet = config.fleet
    if fleet.groups and fleet.coordinator:
        raise ConfigError(
            "--replica-groups starts a fleet and --join goes to one that runs: leave one out"
        )
    if fleet.coordinator and fleet.group < 0:
        raise ConfigError(
            f"--join {fleet.coordinator} needs fleet.group=K, a number that no other replica group"
            " of the fleet has"
        )
    if fleet.bind in ("0.0.0.0", "::") and not fleet.host:
        raise ConfigError(
            f"fleet.bind={fleet.bind} needs fleet.host=ADDRESS, under which others reach this host"
        )
    if fleet.groups and fleet.groups_min > fleet.groups:
        raise ConfigError(
            f"fleet.groups_min={fleet.groups_min} is more than the fleet.groups={fleet.groups} that"
            " are started: training would never begin"
        )
    snapshot, launch = config.snapshot, config.launch
    if snapshot.parity >= snapshot.group:
        raise ConfigError(
            f"snapshot.group={snapshot.group} nodes can't stand the loss of "
            f"snapshot.parity={snapshot.parity}: make the group larger or the parity smaller"
        )
    if launch.local_nodes and launch.nnodes not in (1, launch.local_nodes):
        raise ConfigError(
            f"launch.local_nodes={launch.local_nodes} puts every node on this machine, so"
            f" launch.nnodes={launch.nnodes} can't hold as well: leave one of them out"
        )
    if launch.node_rank >= (1 if launch.local_nodes else launch.nnodes + launch.spares):
        spares = f" + launch.spares={launch.spares}" if launch.spares else ""
        raise ConfigError(
            f"launch.node_rank={launch.node_rank} must be below launch.nnodes={launch.nnodes}"
            f"{spares}: it tells apart nodes on several machines (--nnodes)"
        )
