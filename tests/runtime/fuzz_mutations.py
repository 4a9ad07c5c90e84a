"""What a hostile or broken disk does to a directory of versions, as functions over it.

A mutation that is *forged* puts digests right again, so that the reader gets further than the
comparison; what it reads then may be anything.  After any other the reader may load what was saved,
or refuse.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftrain.checkpoint.digest import digest_of
from ftrain.checkpoint.segment import MAGIC, TRAILER_BYTES

NASTY: list[Any] = [
    *(-1, 0, 1, 2, 3, 7, 63, 64, 4095, 4096, 4097, 8192, 2**26, 2**26 + 4096, 2**31, 2**32, 2**44),
    *(2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, True, False, None),
    *("", "0", "x" * 5000, "../../../etc/passwd", "/etc/passwd", "\0", "\ud83d\ude00", "raw"),
    *("planes1-zstd", "planes4-zstd", "planes8-zstd", "float32", "bfloat16", "bool", "complex128"),
    *([], {}, [0], [[]] * 50, {"a": 1}, json.loads("[" * 300 + "]" * 300)),
]

Chance = random.Random
Mutation = Callable[[Path, Chance], bool]  # changes the directory; whether it forged something


def plain_files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and not p.is_symlink())


def choose(directory: Path, chance: Chance, suffix: str) -> Path:
    return chance.choice([path for path in plain_files(directory) if path.name.endswith(suffix)])


# ---------------------------------------------------------------- bytes


def stir(content: bytes, chance: Chance) -> bytes:
    """The bytes with something done to them."""
    new = bytearray(content)
    at = chance.randrange(len(new) + 1) if chance.random() < 0.7 else max(0, len(new) - 64)
    size = min(chance.choice((1, 4, 16, 64, 512, 4096, 20_000)), len(new) - at)
    match chance.randrange(7):
        case 0 if new:
            new[min(at, len(new) - 1)] ^= 1 << chance.randrange(8)
        case 1:
            new[at : at + size] = chance.randbytes(size)
        case 2:
            new[at : at + size] = bytes(size)
        case 3:
            del new[at:]
        case 4:
            del new[at : at + size]
        case 5:
            new[at:at] = chance.randbytes(chance.choice((1, 64, 4096)))
        case _:
            new[at:at] = new[at : at + size]
    return bytes(new)


def stir_a_file(directory: Path, chance: Chance) -> bool:
    path = chance.choice(plain_files(directory))
    path.write_bytes(stir(path.read_bytes(), chance))
    return False


def exchange_files(directory: Path, chance: Chance) -> bool:
    first, second = chance.sample(plain_files(directory), 2)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return False


def strange_entries(directory: Path, chance: Chance) -> bool:
    """Links, pipes and folders where files are expected, and names that nobody gives."""
    path = chance.choice(plain_files(directory))
    match chance.randrange(6):
        case 0:
            path.unlink()
            path.symlink_to("/etc/passwd")
        case 1:
            path.unlink()
            os.mkfifo(path)
        case 2:
            path.unlink()
            path.mkdir()
        case 3:
            path.rename(directory.parent / "outside" / "moved")
            path.symlink_to(directory.parent / "outside" / "moved")
        case 4:
            folder = choose(directory, chance, ".seg").parent
            moved = folder.rename(directory.parent / "outside" / "folder")
            folder.symlink_to(moved)
        case _:
            name = chance.choice(("9" * 18, "9" * 19, "007", "-1", "1" * 200, "0"))
            place = chance.choice((directory, path.parent))
            (place / name).mkdir(exist_ok=True)
            (place / f"{name}.json").write_bytes(path.read_bytes())
    return False


# ---------------------------------------------------------------- JSON


def change_tree(tree: Any, chance: Chance) -> Any:
    """The same tree but for one place in it."""
    if isinstance(tree, dict | list) and tree and chance.random() < 0.9:
        copy = tree.copy()
        keys = list(copy) if isinstance(copy, dict) else range(len(copy))
        key: Any = chance.choice(list(keys))
        match chance.randrange(12):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, dict):
                copy[chance.choice(("x", "pickle", ""))] = chance.choice(NASTY)
            case 1 if isinstance(copy, list):
                copy.insert(key, copy[key])
            case _:
                copy[key] = change_tree(copy[key], chance)
        return copy
    if isinstance(tree, int) and chance.random() < 0.6:
        return tree + chance.choice((-4096, -64, -4, -1, 1, 4, 64, 4096, tree, -2 * tree))
    return chance.choice(NASTY)


def forge_record(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a manifest or fence record and give it the digest that it then has."""
    fields = change(json.loads(path.read_bytes()))
    if isinstance(fields, dict) and "xxh3" in fields:
        fields["xxh3"] = ""
        fields["xxh3"] = digest_of(json.dumps(fields, separators=(",", ":")).encode()).hex()
    path.write_text(json.dumps(fields, indent=2) + "\n")


def forge_a_record(directory: Path, chance: Chance) -> bool:
    forge_record(choose(directory, chance, ".json"), lambda tree: change_tree(tree, chance))
    return True


def footer_of(content: bytes) -> tuple[int, bytes]:
    """Where the footer begins, and the footer."""
    at, size = struct.unpack_from("<QQ", content, len(content) - TRAILER_BYTES)
    return at, content[at : at + size]


def put_footer(path: Path, before: bytes, body: bytes, at: int | None = None) -> None:
    """Write a segment with this footer, and let its manifest name it."""
    pad = bytes(-(len(body) + TRAILER_BYTES) % 4096)
    digest = digest_of(body)
    trailer = struct.pack("<QQ16s24s8s", at or len(before), len(body), digest, b"", MAGIC)
    path.write_bytes(before + body + pad + trailer)
    manifest = path.parent.with_suffix(".json")
    if not manifest.is_file() or manifest.is_symlink():
        return
    rank, nbytes = int(path.stem.removeprefix("rank")), path.stat().st_size

    def name_it(fields: Any) -> Any:
        fields["files"][rank] |= {"nbytes": nbytes, "digest": digest.hex()}
        return fields

    forge_record(manifest, name_it)


def forge_a_footer(directory: Path, chance: Chance) -> bool:
    path = choose(directory, chance, ".seg")
    content = path.read_bytes()
    at, body = footer_of(content)
    if chance.random() < 0.1:
        body = stir(body, chance)
    else:
        tree = json.loads(body)
        for _ in range(chance.randrange(1, 4)):
            tree = change_tree(tree, chance)
        body = json.dumps(tree, separators=(",", ":")).encode()
    put_footer(path, content[:at], body)
    return True


def forge_a_chunk(directory: Path, chance: Chance) -> bool:
    """Another payload, with the digest that it would have as it is stored."""
    path = choose(directory, chance, ".seg")
    content = bytearray(path.read_bytes())
    at, body = footer_of(content)
    footer = json.loads(body)
    row = chance.choice(footer["chunks"])
    place, stored = row[0], row[1]
    part = stir(bytes(content[place : place + stored]), chance)[:stored].ljust(stored, b"\0")
    content[place : place + stored] = part
    if chance.random() < 0.5:
        row[3] = chance.choice(("raw", "planes1-zstd", "planes2-zstd", "planes8-zstd"))
    if chance.random() < 0.5:
        row[4] = digest_of(part).hex()
    put_footer(path, bytes(content[:at]), json.dumps(footer, separators=(",", ":")).encode())
    return True


def forge_a_trailer(directory: Path, chance: Chance) -> bool:
    path = choose(directory, chance, ".seg")
    content = path.read_bytes()
    fields = list(struct.unpack("<QQ16s24s8s", content[-TRAILER_BYTES:]))
    which = chance.randrange(5)
    if which < 2:
        fields[which] = chance.choice(
            (0, 1, 64, 4096, fields[which] + 4096, 2**27, 2**63, 2**64 - 1)
        )
    else:
        fields[which] = stir(fields[which], chance)
    path.write_bytes(content[:-TRAILER_BYTES] + struct.pack("<QQ16s24s8s", *fields))
    return False


MUTATIONS: tuple[Mutation, ...] = (
    stir_a_file,
    exchange_files,
    strange_entries,
    forge_a_record,
    forge_a_footer,
    forge_a_footer,
    forge_a_chunk,
    forge_a_trailer,
)
