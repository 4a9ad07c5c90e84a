"""Training states that the benchmarks of checkpoints save and load: the example's model, AdamW."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ftrain.checkpoint.capture import CaptureEngine
from ftrain.checkpoint.codec import encode_tree
from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.tensors import StateTensor
from ftrain.comms.protocol.messages import VersionId
from ftrain.configs.schema import SnapshotConfig
from ftrain.runtime.alone import LocalSlots
from ftrain.runtime.group import GroupView
from ftrain.runtime.state import TrainingState

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "llama"))
import train as example

# By GB of parameters and moments in fp32.
SIZES = {
    "tiny": example.LlamaConfig(width=64, layers=2, heads=2, hidden=176),
    "0.3": example.LlamaConfig(width=512, layers=8, heads=8, hidden=1376),
    "1.3": example.LlamaConfig(width=1024, layers=9, heads=16, hidden=2656),
    "4": example.LlamaConfig(width=1536, layers=12, heads=12, hidden=4096),
    "15": example.LlamaConfig(width=2560, layers=16, heads=20, hidden=6912),
}
ON_GPU = ("4", "15")
RUN_ID = "benchmark"


def build(size: str) -> tuple[example.Llama, torch.optim.AdamW]:
    """A model and its optimizer, without moments yet."""
    torch.manual_seed(0)
    with device_of(size):
        model = example.Llama(SIZES[size])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def device_of(size: str) -> torch.device:
    """Where a state of this size lies."""
    return torch.device("cuda", 0) if size in ON_GPU else torch.device("cpu")


def add_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step with made-up gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def tensors_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    """The live tensors by name, as a peer is given them; nothing is copied."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        "model": {name: tensor.detach() for name, tensor in model.named_parameters()},
        "optimizer": {
            f"{names[id(parameter)]}/{key}": value
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        },
    }


def flat(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The same with one level of names."""
    return {f"{part}/{name}": t for part, named in state.items() for name, t in named.items()}


def state_bytes(state: dict[str, dict[str, torch.Tensor]]) -> int:
    """Size of all of it."""
    return sum(tensor.numel() * tensor.element_size() for tensor in flat(state).values())


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """What a Session of one rank registers."""
    return TrainingState({"model": model}, {"optimizer": optimizer}, {}, 0, 1)


def seal_image(state: TrainingState, version: VersionId) -> memoryview:
    """The sealed image of a version, by the product's capture engine."""
    layout = state.layout()
    slots = LocalSlots()
    topology = state.topology()

    def identity(version: VersionId, rank: int) -> ImageIdentity:
        return ImageIdentity(RUN_ID, topology, version, rank, 1, 0, 1)

    engine = CaptureEngine(
        slots,
        identity,
        GroupView(0, 1, 0, (0,)).share,
        rank=0,
        chunk_bytes=SnapshotConfig().chunk_bytes,
        compare=False,
    )
    small = encode_tree({"state": state.small(layout)})
    tensors: tuple[StateTensor, ...] = layout.tensors
    engine.start(version, tensors, small)
    engine.barrier(float("inf"))
    engine.drain(float("inf"))
    engine.close()
    assert slots.image is not None
    assert slots.held is not None, engine.statistics().skip_reason
    return slots.image


def write_version(directory: Path, state: TrainingState, step: int = 1) -> None:
    """Save the state as a published durable version."""
    store, version = DurableStore(directory), VersionId(1, step)
    store.begin_fence(1, RUN_ID, None)
    store.write_image(1, version, 0, seal_image(state, version))
    store.publish_written(1, version, RUN_ID, 1)
