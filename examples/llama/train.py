"""Train a byte-level LLaMA on the source text of Python's standard library.

An ordinary PyTorch script plus one ``ftrain.Session``; the same file runs four ways::

    python examples/llama/train.py --preset 0.5m --steps 200
    torchrun --nproc-per-node 2 examples/llama/train.py --preset 0.5m --steps 200
    ftrain launch --nproc-per-node 2 examples/llama/train.py --preset 0.5m --steps 200
    ftrain launch --replica-groups 3 examples/llama/train.py --preset 0.5m --steps 200

Under ``ftrain launch`` a rank that is killed resumes from memory at the step where it stood; with
replica groups the others go on meanwhile.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import ftrain

# ---------------------------------------------------------------------------------------- model


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes of one model; the vocabulary is the 256 byte values."""

    width: int
    layers: int
    heads: int
    hidden: int  # of the feed-forward network


PRESETS = {
    "0.5m": LlamaConfig(width=128, layers=2, heads=4, hidden=352),
    "10m": LlamaConfig(width=320, layers=8, heads=5, hidden=864),
    "124m": LlamaConfig(width=1024, layers=10, heads=16, hidden=2656),
}


class Linear(nn.Linear):
    """A projection without bias, whose weights are drawn only once: a restart builds them anew."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (RoPE) for queries or keys of shape (batch, heads, length, head width)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(length, device=x.device)[:, None] * frequency  # (length, half)
    sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, head width)
        mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.hidden)
        self.up = Linear(config.width, config.hidden)
        self.down = Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """Next-byte prediction: token windows of shape (batch, length + 1) in, mean loss out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = Linear(config.width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


# ----------------------------------------------------------------------------------------- data


def read_corpus(split: str, cache: Path) -> Tensor:
    """The standard library's source as one uint8 tensor; every tenth file is for validation.

    Joined once into one file, which later starts only map. Ranks may race: each writes a file of
    its own and renames it, so whoever comes last replaces the same bytes.
    """
    joined = cache / f"stdlib-{platform.python_version()}-{split}.bin"
    if not joined.exists():
        library = Path(sysconfig.get_path("stdlib"))
        left_out = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
        sources = sorted(
            path
            for path in library.rglob("*.py")
            if left_out.isdisjoint(path.relative_to(library).parts)
        )
        held_out = split == "validation"
        chosen = [path for i, path in enumerate(sources) if (i % 10 == 9) == held_out]
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            file.writelines(path.read_bytes() for path in chosen)
        Path(file.name).replace(joined)
    return torch.from_file(str(joined), size=joined.stat().st_size, dtype=torch.uint8)


class Windows(Dataset[Tensor]):
    """Consecutive windows of ``length`` inputs and, one byte later, as many targets."""

    def __init__(self, corpus: Tensor, length: int) -> None:
        self.corpus, self.length = corpus, length

    def __len__(self) -> int:
        return (len(self.corpus) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.length
        return self.corpus[start : start + self.length + 1].long()


# ------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class Place:
    """This process among its peers, from torchrun's environment variables; alone without them."""

    rank: int
    world_size: int
    device: torch.device


def join() -> Place:
    """Form the process group, if there is one."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Place(rank, world_size, device)


@torch.no_grad()
def evaluate(model: nn.Module, windows: Windows, batch_size: int, place: Place) -> float:
    """Mean loss over 256 windows spread over the validation text, shared among the ranks."""
    model.eval()
    chosen = range(0, len(windows), max(1, len(windows) // 256))[place.rank :: place.world_size]
    total = torch.zeros(2, device=place.device)  # sum of the windows' losses, their number
    for first in range(0, len(chosen), batch_size):
        batch = torch.stack([windows[i] for i in chosen[first : first + batch_size]])
        total += torch.stack((model(batch.to(place.device)), total.new_ones(()))) * len(batch)
    if place.world_size > 1:
        dist.all_reduce(total)
    model.train()
    return float(total[0] / total[1])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="0.5m", help="model size")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps in all")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per rank and step")
    parser.add_argument("--seq", type=int, default=128, help="bytes per window")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--workers", type=int, default=0, help="DataLoader processes per rank")
    cache = Path(tempfile.gettempdir()) / f"llama-corpus-{os.getuid()}"
    parser.add_argument("--cache", type=Path, default=cache, help="where the joined text is kept")
    return parser.parse_args()


def main() -> None:
    """Train, and print the validation loss at the beginning, now and then, and at the end."""
    args = parse_arguments()
    place = join()
    torch.manual_seed(args.seed)

    training = Windows(read_corpus("training", args.cache), args.seq)
    validation = Windows(read_corpus("validation", args.cache), args.seq)
    sampler = DistributedSampler(
        training, place.world_size, place.rank, seed=args.seed, drop_last=True
    )
    loader = DataLoader(
        training, args.batch_size, sampler=sampler, num_workers=args.workers, drop_last=True
    )

    llama = Llama(PRESETS[args.preset]).to(place.device)
    model = DistributedDataParallel(llama) if place.world_size > 1 else llama
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, fused=True)
    warmup_steps = max(1, args.steps // 20)

    def learning_rate(step: int) -> float:
        """Linear warm-up, then half a cosine down to a tenth."""
        progress = max(0, step - warmup_steps) / max(1, args.steps - warmup_steps)
        return min(1.0, (step + 1) / warmup_steps) * (0.55 + 0.45 * math.cos(math.pi * progress))

    scheduler = LambdaLR(optimizer, learning_rate)
    session = ftrain.Session(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        data=loader,
        total_steps=args.steps,
        replicas="sync",
    )

    def report(step: int) -> None:
        with session.phase("evaluate"):
            loss = evaluate(llama, validation, args.batch_size, place)
        if place.rank == 0:
            print(f"step {step}: validation loss {loss:.4f}", flush=True)

    for step, batch in session.steps():
        if step % args.eval_every == 0:
            report(step)
        with torch.autocast(place.device.type, torch.bfloat16, enabled=place.device.type == "cuda"):
            loss = model(batch.to(place.device, non_blocking=True))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        session.log(loss=loss)
    report(args.steps)
    if place.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
