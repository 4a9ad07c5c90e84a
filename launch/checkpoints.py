"""``ftrain checkpoints``: look at a run's durable versions, verify, move and delete them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ftrain.launch.interrupting import ending_at_once
from ftrain.launch.options import Parser
from ftrain.launch.place import is_address
from ftrain.runtime.interop.target import discard

_EXAMPLES = """\
RUN is a run's directory (ftrain-runs/train), a directory of versions (what checkpoint.dir names) or
the address of copies (what checkpoint.remote names: s3://, gs://, hdfs:// or file:///).

  ftrain checkpoints list RUN                      which versions there are
  ftrain checkpoints show RUN --step 400           what is in one: tensors, layout, files
  ftrain checkpoints verify RUN                    read every byte of every version
  ftrain checkpoints export --to safetensors RUN weights/
  ftrain checkpoints import --from safetensors weights/ NEW_RUN
  ftrain checkpoints prune RUN --keep-last 3 --keep-every 1000 --dry-run
  ftrain checkpoints list RUN --remote             and which copies there are in checkpoint.remote
  ftrain checkpoints verify "s3://bucket/prefix?region=eu-central-1"

Each takes --json for programs, and explains itself: ftrain checkpoints export --help
"""
_PLACE = "a run's directory, one of versions, or an address such as s3://bucket/prefix"
_EXPORT = """\
  ftrain checkpoints export --to safetensors RUN weights/
        a folder that Hugging Face's loaders read: shards of at most --shard-size, and their index
  ftrain checkpoints export --to torch RUN model.pt
        one file: model.load_state_dict(torch.load("model.pt", weights_only=True))
  ftrain checkpoints export --to dcp --all --step 400 RUN dcp/
        a directory for torch.distributed.checkpoint.load, with the optimizer's state

  ftrain checkpoints export --to torch s3://bucket/prefix model.pt
        from a copy in an object store, without one of it here

Without --all it is one model: its parameters and buffers, named as in model.state_dict().
OUT must not exist: it appears when everything is in it.
"""
_IMPORT = """\
  ftrain checkpoints import --from safetensors weights/ ftrain-runs/finetune
  ftrain checkpoints import --from torch model.pt ftrain-runs/finetune
  ftrain checkpoints import --from dcp dcp/ ftrain-runs/finetune
  ftrain launch --run-dir ftrain-runs/finetune train.py

The run begins at step 0 with these weights. It is the model only: optimizer, scheduler, data and
random numbers begin anew. Names and shapes have to be those of the script's model.
"""
_PRUNE = """\
  ftrain checkpoints prune RUN --keep-last 3 --dry-run      say what would go
  ftrain checkpoints prune RUN --keep-last 3                delete all but the newest three
  ftrain checkpoints prune RUN --keep-last 1 --keep-every 1000
        and keep the first version of every 1000 steps
  ftrain checkpoints prune RUN --pin 400                    never delete step 400
  ftrain checkpoints prune RUN --unpin 400

The newest version always stays.
"""


def checkpoints(tokens: Sequence[str]) -> int:
    """Run one of the subcommands; returns its exit code.

    Raises:
        FtrainError: one sentence for the user.
    """
    found = _parser().parse_args(tokens)
    run: Callable[[argparse.Namespace], int] = found.run
    if not (is_address(found.place) or found.remote):
        return run(found)
    return ending_at_once(partial(run, found), partial(_tidy, found.out))


def _tidy(out: str) -> None:
    if out:
        discard(Path(out))


def _parser() -> Parser:
    parser = Parser(
        prog="ftrain checkpoints",
        usage="ftrain checkpoints {list,show,verify,export,import,prune} ...",
        description="Durable versions of a run: look at them, verify, move and delete them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog=parser.prog
    )

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = "") -> Any:
        command = commands.add_parser(
            name,
            help=text,
            description=text[:1].upper() + text[1:] + ".",
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run, remote=False, out="")
        command.add_argument("--json", action="store_true", help="one JSON object")
        return command

    of_step = {"type": int, "metavar": "N", "help": "the version of this step"}
    listing = add("list", _list, "which versions there are")
    listing.add_argument("--verify", action="store_true", help="read every byte of each")
    listing.add_argument("--remote", action="store_true", help="and those in checkpoint.remote")
    showing = add("show", _show, "what is in a version (the newest)")
    showing.add_argument("--step", **of_step)
    verifying = add("verify", _verify, "read and compare every byte of every version")
    verifying.add_argument("--step", **of_step)
    pruning = add("prune", _prune, "delete versions that are not to be kept", _PRUNE)
    pruning.add_argument("--keep-last", type=int, metavar="N", help="keep the newest N")
    pruning.add_argument(
        "--keep-every", type=int, default=0, metavar="N", help="and one in N steps"
    )
    pruning.add_argument("--dry-run", action="store_true", help="only say what would go")
    for name, text in (("--pin", "never delete this step"), ("--unpin", "as any other again")):
        pruning.add_argument(name, type=int, action="append", default=[], metavar="STEP", help=text)
    for command in (listing, showing, verifying, pruning):
        command.add_argument("place", metavar="RUN_OR_URI", help=_PLACE)
    _add_transfers(add, of_step)
    return parser


def _add_transfers(add: Callable[..., Any], of_step: dict[str, Any]) -> None:
    kinds = ("safetensors", "dcp", "torch")
    exporting = add("export", _export, "write a version in another format", _EXPORT)
    exporting.add_argument("--to", required=True, choices=kinds, help="the format")
    exporting.add_argument("--step", **of_step)
    what = exporting.add_mutually_exclusive_group()
    what.add_argument("--model-only", action="store_true", help="one model (the default)")
    what.add_argument("--all", action="store_true", help="all models and optimizers")
    what.add_argument("--model", default="", metavar="NAME", help="another model than 'model'")
    exporting.add_argument("--shard-size", default="5GB", metavar="SIZE", help="(5GB) safetensors")
    exporting.add_argument("place", metavar="RUN_OR_URI", help=_PLACE)
    exporting.add_argument("out", metavar="OUT", help="a new file (torch) or directory here")
    importing = add("import", _import, "begin a run with a model from another format", _IMPORT)
    importing.add_argument("--from", dest="kind", required=True, choices=kinds, help="its format")
    importing.add_argument("--model", default="model", metavar="NAME", help="as Session calls it")
    importing.add_argument(
        "--dtype", default="", metavar="TYPE", help="of floating-point tensors, such as float32"
    )
    importing.add_argument("path", metavar="PATH", help="what to import: a file or a directory")
    importing.add_argument("place", metavar="RUN", help="a run directory without versions")


def _list(found: argparse.Namespace) -> int:
    from ftrain.launch.versions import list_versions

    return list_versions(found.place, remote=found.remote, verify=found.verify, as_json=found.json)


def _show(found: argparse.Namespace) -> int:
    from ftrain.launch.versions import show_version

    return show_version(found.place, found.step, as_json=found.json)


def _verify(found: argparse.Namespace) -> int:
    from ftrain.launch.versions import verify_versions

    return verify_versions(found.place, found.step, as_json=found.json)


def _prune(found: argparse.Namespace) -> int:
    from ftrain.launch.prune import PruneRequest, prune

    request = PruneRequest(
        found.keep_last,
        found.keep_every,
        found.dry_run,
        tuple(found.pin),
        tuple(found.unpin),
    )
    return prune(found.place, request, as_json=found.json)


def _export(found: argparse.Namespace) -> int:
    from ftrain.launch.transfer import export_version

    told = export_version(
        found.place,
        found.out,
        found.to,
        step=found.step,
        everything=found.all,
        model=found.model,
        shard_size=found.shard_size,
    )
    _tell(told, as_json=found.json)
    return 0


def _import(found: argparse.Namespace) -> int:
    from ftrain.launch.transfer import import_version

    told = import_version(found.path, found.place, found.kind, model=found.model, dtype=found.dtype)
    _tell(told, as_json=found.json)
    return 0


def _tell(told: dict[str, Any], *, as_json: bool) -> None:
    """Print what was done: an object, or the lines in its ``text``."""
    print(json.dumps(told, indent=2) if as_json else "\n".join(told["text"]))
