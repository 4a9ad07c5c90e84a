"""The YAML groups say the same as the frozen dataclasses that they fill."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib import resources

import msgspec
import pytest
from omegaconf import OmegaConf

from ftrain.configs.schema import FaultConfig, FtrainConfig
from ftrain.launch.resolve import groups, resolve, to_yaml
from ftrain.recovery.faults import check_schedule


def test_yaml_defaults_are_the_dataclass_defaults() -> None:
    assert resolve() == FtrainConfig()


def test_yaml_names_every_key_once() -> None:
    root = resources.files("ftrain.configs")
    defaults = msgspec.to_builtins(FtrainConfig())
    for group in groups():
        name = "none" if group == "faults" else "default"
        text = (root / group / f"{name}.yaml").read_text()
        keys = set(OmegaConf.to_container(OmegaConf.create(text)) or ())
        expected = set(defaults[group])
        if group == "faults":  # and the keys of one single fault
            expected |= {field.name for field in dataclasses.fields(FaultConfig)}
        assert keys == expected, group


def test_every_group_fills_a_field() -> None:
    assert set(groups()) | {"seed"} == {field.name for field in dataclasses.fields(FtrainConfig)}


@pytest.mark.parametrize(
    "override", [f"{group}={choice}" for group, choices in groups().items() for choice in choices]
)
def test_every_choice_resolves(override: str) -> None:
    config = resolve([override])
    check_schedule(config.faults, nodes=2, world_size=4)


def test_off_switches_off() -> None:
    config = resolve(["snapshot=off", "checkpoint=off", "detection=off"])
    assert not config.snapshot.enabled
    assert not config.checkpoint.enabled
    assert not config.detection.enabled
    assert config.snapshot.slots == FtrainConfig().snapshot.slots


def test_printed_configuration_names_every_value() -> None:
    config = resolve(["launch.tee=0:1,1:3", "launch.run_id=007", "faults=kill_rank"])
    printed = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert msgspec.convert(printed, FtrainConfig) == config


def test_resolving_is_quick_and_needs_no_torch() -> None:
    program = (
        "import sys, time\n"
        "from ftrain.launch.resolve import resolve\n"
        "began = time.process_time()\n"
        "resolve(['faults=kill_rank', 'launch.nproc_per_node=2'])\n"
        "assert time.process_time() - began < 0.5, time.process_time() - began\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
