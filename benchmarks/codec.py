"""How much smaller a trained state becomes, and how fast: ours, zstandard alone, ZipNN.

::

    python benchmarks/codec.py [--preset 10m] [--steps 200]

Trains the example's model for a while, then packs weights and moments in chunks as they are stored.
One thread.  Every chunk is unpacked again and compared.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import states
import torch
import zstandard
from common import Record, print_table, write_results
from torch import nn
from torch.utils.data import DataLoader

from ftrain.checkpoint.codecs import PlaneCodec
from ftrain.configs.schema import SnapshotConfig

Pack = Callable[[memoryview, int], bytes]
Unpack = Callable[[bytes, int, int], bytes]


def trained(preset: str, steps: int, cache: Path) -> dict[str, torch.Tensor]:
    """Weights and moments, each as one flat tensor by name."""
    example = states.example
    torch.manual_seed(0)
    windows = example.Windows(example.read_corpus("training", cache), 128)
    batches = iter(DataLoader(windows, 8, shuffle=True, drop_last=True))
    model = example.Llama(example.PRESETS[preset])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        loss = model(next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {steps} steps of preset {preset} to loss {loss.item():.3f}", flush=True)
    parameters = list(model.parameters())

    def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    weights = joined(parameters)
    moments = {
        key: joined([optimizer.state[p][key] for p in parameters])
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {"weights fp32": weights, "weights bf16": weights.bfloat16(), **moments}


def unpack_planes(packed: bytes, nbytes: int, width: int) -> bytes:
    """By our codec."""
    raw = bytearray(nbytes)
    PlaneCodec(width).decode(memoryview(packed), memoryview(raw))
    return bytes(raw)


def codecs() -> dict[str, tuple[Pack, Unpack]]:
    """By name: pack and unpack, which are also told bytes per number."""
    found: dict[str, tuple[Pack, Unpack]] = {
        "ours": (lambda raw, width: PlaneCodec(width).encode(raw), unpack_planes),
    }
    for level in (1, 3):
        pack = zstandard.ZstdCompressor(level=level).compress
        unpack = zstandard.ZstdDecompressor().decompress
        found[f"zstd-{level}"] = (
            lambda raw, _, pack=pack: pack(raw),
            lambda packed, *_, unpack=unpack: unpack(packed),
        )
    try:
        from zipnn import ZipNN
    except ImportError:
        print("ZipNN is left out: it is not installed", flush=True)
        return found
    by_width = {
        width: ZipNN(bytearray_dtype=dtype, input_format="byte", threads=1)
        for width, dtype in ((2, "bfloat16"), (4, "float32"))
    }
    # It writes into what it is given: a copy, which is not a part of its time.
    found["ZipNN"] = (
        lambda raw, width: by_width[width].compress(raw),
        lambda packed, _, width: by_width[width].decompress(packed),
    )
    return found


def measure(tensors: dict[str, torch.Tensor], rounds: int) -> Record:
    """By data and codec: ratio, GB/s to pack and to unpack."""
    torch.set_num_threads(1)
    size = SnapshotConfig().chunk_bytes
    times: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    every = codecs()
    for _ in range(rounds):
        for data, tensor in tensors.items():
            raw = memoryview(tensor.view(torch.uint8).numpy())
            chunks = [raw[at : at + size] for at in range(0, len(raw), size)]
            for name in random.sample(list(every), len(every)):
                found = one(every[name], chunks, tensor.element_size(), f"{name} of {data}")
                times.setdefault((data, name), []).append(found)
    results: Record = {}
    for (data, name), found in times.items():
        figures = zip(("ratio", "pack", "unpack"), zip(*found, strict=True), strict=True)
        results.setdefault(data, {})[name] = {key: median(values) for key, values in figures}
    return results


def one(
    codec: tuple[Pack, Unpack], chunks: list[memoryview], width: int, what: str
) -> tuple[float, float, float]:
    """Ratio, GB/s in, GB/s out."""
    pack, unpack = codec
    inputs = [memoryview(bytearray(chunk)) for chunk in chunks]
    began = time.monotonic()
    packed = [pack(chunk, width) for chunk in inputs]
    middle = time.monotonic()
    unpacked = [unpack(p, len(c), width) for p, c in zip(packed, chunks, strict=True)]
    ended = time.monotonic()
    if any(bytes(u) != c for u, c in zip(unpacked, chunks, strict=True)):
        raise RuntimeError(f"{what} does not come back as it was")
    gb = sum(map(len, chunks)) / 1e9
    return gb * 1e9 / sum(map(len, packed)), gb / (middle - began), gb / (ended - middle)


def main() -> None:
    """Train, measure, then the table and the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=states.example.PRESETS, default="10m")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    cache = Path(tempfile.gettempdir()) / f"llama-corpus-{os.getuid()}"
    parser.add_argument("--cache", type=Path, default=cache)
    args = parser.parse_args()
    tensors = trained(args.preset, args.steps, args.cache)
    found = measure(tensors, args.rounds)
    rows = [
        (data, name, figures["ratio"], figures["pack"], figures["unpack"])
        for data, by_codec in found.items()
        for name, figures in sorted(by_codec.items())
    ]
    title = f"codec, preset {args.preset} after {args.steps} steps, one thread"
    print_table(title, ("data", "codec", "ratio", "pack GB/s", "unpack GB/s"), rows)
    write_results("codec", {"preset": args.preset, "steps": args.steps, "data": found})


if __name__ == "__main__":
    main()
