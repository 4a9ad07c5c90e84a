"""``ftrain checkpoints``: what it shows, does and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import small_disk
from showing import Shown
from small_versions import flip, save, weights

from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.durable import DurableStore
from ftrain.launch.cli import main
from ftrain.launch.place import open_place
from ftrain.launch.versions import _rows, _verify
from ftrain.launch.words import age_text, parse_size, size_text


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Shown:
    return Shown(capsys)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with the versions of steps 10 to 60."""
    store = DurableStore(tmp_path / "run" / "checkpoints")
    for step in range(10, 61, 10):
        save(store, 1, step)
    return tmp_path / "run"


def steps(run: Path) -> list[int]:
    return [version.step for version in DurableStore(run / "checkpoints").versions()]


def test_list_is_a_table_of_the_versions(shown: Shown, run: Path) -> None:
    code, text = shown("list", run)
    lines = text.splitlines()
    assert code == 0
    assert lines[0].split() == ["step", "age", "level", "ranks", "size", "complete", "verified"]
    assert [line.split()[0] for line in lines[1:]] == ["60", "50", "40", "30", "20", "10"]
    assert lines[1].split()[3:5] == ["L3", "2"]
    told = shown.told("list", run / "checkpoints", "--verify")
    assert [v["step"] for v in told["versions"]] == [60, 50, 40, 30, 20, 10]
    assert all(v["verified"] and v["complete"] and v["counts"] for v in told["versions"])
    assert told["problems"] == []


def test_what_is_incomplete_or_hidden_is_listed_as_such(shown: Shown, run: Path) -> None:
    store = DurableStore(run / "checkpoints")
    (run / "checkpoints/1/30/rank1.seg").unlink()
    store.begin_fence(2, "run", store.versions()[0].version)
    save(store, 1, 70)  # by a process whose epoch is over
    code, text = shown("list", run)
    assert code == 1
    rows = {line.split()[0]: line for line in text.splitlines()[1:8]}
    assert "not of the run's history" in rows["70"]
    assert rows["30"].split()[-1] == "no"
    assert "rank1.seg is missing" in text.splitlines()[-1]


def test_verify_names_every_damage_and_fails(shown: Shown, run: Path) -> None:
    code, text = shown("verify", run)
    assert (code, text.split(" are sound")[0]) == (0, "6 of 6 versions")
    folder = run / "checkpoints/1"
    flip(folder / "20/rank0.seg", 4096)
    flip(folder / "20/rank0.seg", 8192 + 17)
    flip(folder / "40/rank1.seg", 9)
    flip(folder / "50/rank0.seg", (folder / "50/rank0.seg").stat().st_size - 100)
    code, text = shown("verify", run)
    lines = text.splitlines()
    assert code == 1
    assert len(lines) == 5
    assert "50/rank0.seg has a damaged footer" in lines[0]
    assert "40/rank1.seg has a damaged header" in lines[1]
    assert "20/rank0.seg: chunk 0 does not match its digest" in lines[2]
    assert "20/rank0.seg: chunk 1 does not match its digest" in lines[3]
    assert lines[4].startswith("3 of 6 versions are sound")
    told = shown.told("verify", run, "--step", "20", code=1)
    assert len(told["damage"]) == 2
    assert shown.told("verify", run, "--step", "30")["damage"] == []


def test_verify_finds_a_tensor_that_lacks_a_part(shown: Shown, run: Path, tmp_path: Path) -> None:
    """Every file is as it was written, and yet they do not make up the model."""
    save(DurableStore(run / "checkpoints"), 1, 70, left_out="layer.bias")
    code, text = shown("verify", run, "--step", "70")
    assert code == 1
    assert "70.json: 400 bytes of model/layer.bias are in no file" in text
    shown.refused("export", "--to", "torch", "--step", "70", run, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_show_tells_tensors_and_layout(shown: Shown, run: Path) -> None:
    code, text = shown("show", run, "--step", "40")
    assert code == 0
    assert "step 40 of run run" in text
    assert "2 shards along dimension 0" in text
    told = shown.told("show", run)
    assert told["step"] == 60
    tensors = {t["name"]: t for t in told["tensors"]}
    assert tensors["model/layer.weight"]["shape"] == [400, 8]
    assert tensors["model/layer.bias"]["dtype"] == "bfloat16"
    assert tensors["model/layer.weight"]["boxes"] == [[[0, 0], [200, 8]], [[200, 0], [200, 8]]]
    assert [file["rank"] for file in told["files"]] == [0, 1]


def test_prune_keeps_what_it_is_told_and_the_newest(shown: Shown, run: Path) -> None:
    code, text = shown("prune", run, "--keep-last", "2", "--keep-every", "30", "--dry-run")
    assert code == 0
    assert "would be deleted" in text
    assert steps(run) == [60, 50, 40, 30, 20, 10]
    assert "step 10 would be pinned" in shown("prune", run, "--pin", "10", "--dry-run")[1]
    assert "step 20 is pinned" in shown("prune", run, "--pin", "20")[1]
    told = shown.told("prune", run, "--keep-last", "1", "--keep-every", "30")
    assert told["kept"] == [60, 30, 20, 10]
    assert [v["step"] for v in told["removed"]] == [50, 40]
    assert steps(run) == [60, 30, 20, 10]
    assert not (run / "checkpoints/1/40").exists()
    assert [v["pinned"] for v in shown.told("list", run)["versions"]] == [False, False, True, False]
    shown("prune", run, "--unpin", "20", "--keep-last", "1")
    assert steps(run) == [60]
    assert "0 versions of 0 B deleted; kept: 60" in shown("prune", run, "--keep-last", "1")[1]
    save(DurableStore(run / "checkpoints"), 1, 70)
    assert "\n1 version of " in shown("prune", run, "--keep-last", "1")[1]
    assert "at least the newest" in shown.refused("prune", run, "--keep-last", "0")
    assert "say how many" in shown.refused("prune", run)
    assert "no version of step 5" in shown.refused("prune", run, "--pin", "5")
    assert "no version of step 5 is pinned" in shown.refused("prune", run, "--unpin", "5")
    DurableStore(run / "checkpoints").pin((1, 60))  # whose version is swept, or of no history now
    shown("prune", run, "--unpin", "60")
    assert not list(run.glob("checkpoints/*/*.pin"))


@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp"])
def test_export_and_import_say_what_they_did(
    shown: Shown, run: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    told = shown.told("export", "--to", kind, "--step", "30", run, out)
    assert (told["step"], told["tensors"]) == (30, 4)
    code, text = shown("import", "--from", kind, out, tmp_path / "new")
    assert code == 0
    assert "The model only" in text
    shown("export", "--to", "torch", tmp_path / "new", tmp_path / "again.pt")
    found = torch.load(tmp_path / "again.pt", weights_only=True)
    expected = {**weights(30), "seen": torch.tensor(30)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "holds versions already" in shown.refused("import", "--from", kind, out, run)
    assert "exists already" in shown.refused("export", "--to", kind, run, out)


def test_what_is_not_there_is_said_in_a_sentence(shown: Shown, run: Path, tmp_path: Path) -> None:
    for command in (("list",), ("verify",), ("show",), ("export", "--to", "torch")):
        more = ("x",) if command[0] == "export" else ()
        assert "does not exist" in shown.refused(*command, tmp_path / "gone", *more)
    (tmp_path / "other").mkdir()
    assert "neither a run directory" in shown.refused("list", tmp_path / "other")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    assert "there is no complete version" in shown.refused("show", tmp_path / "empty")
    assert "there is no complete version" in shown.refused("verify", tmp_path / "empty")
    sentence = shown.refused("show", run, "--step", "11")
    assert "no version of step 11" in sentence
    assert "60, 50" in sentence
    assert "invalid int value" in shown.refused("show", run, "--step", "last")
    assert "no model 'ema'" in shown.refused(
        "export", "--to", "torch", "--model", "ema", run, tmp_path / "x"
    )
    assert "is a size such as 5GB" in shown.refused(
        "export", "--to", "safetensors", "--shard-size", "big", run, tmp_path / "x"
    )
    assert "there is no directory" in shown.refused(
        "export", "--to", "torch", run, tmp_path / "no/x"
    )
    assert "there is no file" in shown.refused("import", "--from", "torch", "gone", tmp_path / "n")
    for dtype in ("int8", "flout32"):
        assert f"--dtype {dtype} is no floating-point type: it is one of" in shown.refused(
            "import", "--from", "torch", "--dtype", dtype, "gone", tmp_path / "n"
        )
    assert shown.refused("show").endswith("; see ftrain checkpoints show --help\n")
    assert not (tmp_path / "x").exists()


def test_a_damaged_version_is_not_exported(shown: Shown, run: Path, tmp_path: Path) -> None:
    flip(run / "checkpoints/1/60/rank1.seg", 4097)
    for kind in ("safetensors", "torch", "dcp"):
        out, named = tmp_path / "out", ("--step", "60")
        sentence = shown.refused("export", "--to", kind, *named, run, out, code=1)
        assert "does not match its digest" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_newest_version_that_is_sound_is_exported(
    shown: Shown, run: Path, tmp_path: Path
) -> None:
    """However the newer ones are damaged, as a launch would go on from it."""
    folder = run / "checkpoints/1"
    flip(folder / "60/rank1.seg", 4097)
    flip(folder / "50/rank0.seg", (folder / "50/rank0.seg").stat().st_size - 100)
    (folder / "40/rank1.seg").unlink()
    (folder / "30.json").write_text("{")
    for kind in ("safetensors", "torch", "dcp"):
        code, text = shown("export", "--to", kind, run, tmp_path / kind)
        lines = text.splitlines()
        assert code == 0
        assert lines[-1].startswith("step 20: ")
        assert all(line.startswith("not used: ") for line in lines[:-1])
        for damage in ("60/rank1.seg", "50/rank0.seg", "40/rank1.seg", "30.json"):
            assert sum(damage in line for line in lines) == 1
    code, text = shown("show", run)
    assert "not used: " in text
    assert "40/rank1.seg is missing" in text
    code, text = shown("verify", run)
    assert text.splitlines()[-1].startswith("2 of 5 versions whose manifests can be read are sound")


def test_a_newer_format_is_refused_by_name(shown: Shown, run: Path) -> None:
    path = run / "checkpoints/1/60.json"
    content = json.loads(path.read_text()) | {"format": 3, "xxh3": ""}
    digest = digest_of(json.dumps(content, separators=(",", ":")).encode()).hex()
    path.write_text(json.dumps(content | {"xxh3": digest}))
    for command in ("list", "verify", "show"):
        assert "is in format 3" in shown.refused(command, run)


def test_a_full_disk_leaves_nothing_behind(shown: Shown, run: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as fill:
        save(DurableStore(run / "checkpoints"), 1, 70, rows=4000)
        for kind in ("safetensors", "torch", "dcp"):
            sentence = shown.refused("export", "--to", kind, run, tmp_path / "disk/out")
            assert "No space left on device" in sentence
        shown("export", "--to", "torch", run, tmp_path / "model.pt")
        sentence = shown.refused(
            "import", "--from", "torch", tmp_path / "model.pt", tmp_path / "disk/new"
        )
        assert "No space left on device" in sentence
        left = [path.name for path in (tmp_path / "disk").rglob("*") if path.is_file()]
        assert left == ["lock"]
        fill(True)


def test_nothing_is_exported_to_what_is_read_only(shown: Shown, run: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k"):
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        for kind in ("safetensors", "torch", "dcp"):
            sentence = shown.refused("export", "--to", kind, run, tmp_path / "disk/out")
            assert f"out can't be written: {tmp_path / 'disk'} is read-only for you" in sentence


LIMITED = """
import resource, signal, sys
from ftrain.launch.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp"])
def test_a_write_that_fails_in_the_middle_is_a_sentence(
    run: Path, tmp_path: Path, kind: str
) -> None:
    save(DurableStore(run / "checkpoints"), 1, 70, rows=4000)
    command = ["checkpoints", "export", "--to", kind, str(run), str(tmp_path / "out")]
    program = [sys.executable, "-c", LIMITED, *command]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"ftrain: {tmp_path / 'out'} can't be written (")
    assert done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    for tokens, example in (
        ((), "ftrain checkpoints prune RUN --keep-last 3"),
        (("export",), "--to safetensors RUN weights/"),
        (("import",), "ftrain launch --run-dir ftrain-runs/finetune train.py"),
        (("prune",), "--keep-last 3 --dry-run"),
    ):
        with pytest.raises(SystemExit):
            main(["checkpoints", *tokens, "--help"])
        assert example in capsys.readouterr().out


def test_looking_at_versions_needs_no_torch(run: Path) -> None:
    for command in ("list", "verify", "show"):
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from ftrain.launch.cli import main; "
                f"main(['checkpoints', '{command}', '{run}']); "
                "assert not {'torch', 'pyarrow'} & set(sys.modules)",
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )


def test_sizes_and_ages_are_written_for_people() -> None:
    assert [size_text(n) for n in (0, 999, 1_300_000_000)] == ["0 B", "999 B", "1.3 GB"]
    assert [age_text(s) for s in (-1, 59, 90, 7200, 200_000)] == [
        "0 s",
        "59 s",
        "1.5 min",
        "2.0 h",
        "2.3 d",
    ]
    assert [parse_size("", t) for t in ("5GB", "500 MB", "2GiB", "4096")] == [
        5_000_000_000,
        500_000_000,
        2 << 30,
        4096,
    ]


def test_what_a_run_deletes_while_it_is_verified_is_no_damage(run: Path) -> None:
    with open_place(str(run)) as store:
        rows, _ = _rows(store)
        count = len(rows)
        store.remove([rows[-1].version])
        assert _verify(rows) == []
        assert len(rows) == count - 1
        assert all(row.found == [] for row in rows)
