"""Registered objects: captured, put back into fresh ones, equal to the bit; misfits named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftrain.checkpoint.codec import encode_tree
from ftrain.checkpoint.header import ImageIdentity
from ftrain.checkpoint.image import ImageReader, ImageWriter
from ftrain.checkpoint.tensors import Changes, StateTensor, plan_image
from ftrain.comms.errors import CorruptionError, RestoreError, SessionError, StateError
from ftrain.comms.protocol.messages import VersionId
from ftrain.runtime.group import GroupView, key_of, ranks_of
from ftrain.runtime.modules import plain_name
from ftrain.runtime.restore import Restoration, restore
from ftrain.runtime.state import TrainingState, _first_difference, _moved


def make(width: int = 12, optimizer: str = "AdamW") -> tuple[torch.nn.Module, Any, Any]:
    model = torch.nn.Sequential(
        torch.nn.Linear(5, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 3)
    )
    kind: Any = getattr(torch.optim, optimizer)
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    found = kind(model.parameters(), lr=0.01, **options)
    return model, found, torch.optim.lr_scheduler.StepLR(found, 3)


def state_of(parts: tuple[torch.nn.Module, Any, Any]) -> TrainingState:
    model, optimizer, scheduler = parts
    return TrainingState({"model": model}, {"optimizer": optimizer}, {"scheduler": scheduler}, 0)


def train(parts: tuple[torch.nn.Module, Any, Any], steps: int, start: int = 0) -> list[float]:
    model, optimizer, scheduler = parts
    losses = []
    for step in range(start, start + steps):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def image_of(state: TrainingState) -> bytearray:
    """The state as one image, as a capture writes it."""
    layout = state.layout()
    small = encode_tree({"state": state.small(state.layout())})
    plan = plan_image(layout.tensors, GroupView(0, 1, 0, (0,)).share, len(small), 4096)
    buffer = bytearray(plan.total_bytes)
    identity = ImageIdentity(
        run_id="r",
        topology="ab",
        version=VersionId(1, 1),
        rank=0,
        world_size=1,
        node=0,
        incarnation=1,
    )
    writer = ImageWriter(buffer, plan, identity)
    writer.begin(small)
    by_name = {t.name: t.tensor for t in layout.tensors}
    for chunk in range(writer.chunks):
        for piece in plan.pieces(chunk):
            raw = by_name[piece.segment.name].contiguous().reshape(-1).view(torch.uint8)
            data = raw[piece.start : piece.start + piece.nbytes].numpy().tobytes()
            writer.data[piece.offset : piece.offset + piece.nbytes] = data
        writer.finish_chunk(chunk)
    writer.seal()
    return buffer


def put_back(buffer: bytearray, state: TrainingState) -> None:
    restore(state, Restoration([ImageReader(buffer)]), 0)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor", "NAdam", "RMSprop"])
def test_a_restored_run_goes_on_with_the_same_losses(optimizer: str) -> None:
    torch.manual_seed(0)
    parts = make(optimizer=optimizer)
    train(parts, 4)
    buffer = image_of(state_of(parts))
    expected = train(parts, 5, 4)
    torch.manual_seed(77)
    fresh = make(optimizer=optimizer)
    put_back(buffer, state_of(fresh))
    assert train(fresh, 5, 4) == expected


def test_before_the_first_step_there_is_no_optimizer_state() -> None:
    parts = make()
    buffer = image_of(state_of(parts))
    fresh = make()
    put_back(buffer, state_of(fresh))
    assert train(fresh, 3) == train(parts, 3)


def test_the_layout_is_kept_until_something_moves() -> None:
    parts = make()
    state = state_of(parts)
    empty = state.layout()
    train(parts, 1)
    full = state.layout()
    assert len(full.tensors) > len(empty.tensors)
    train(parts, 3)
    assert state.layout() is full
    first = next(iter(parts[0].parameters()))
    first.data = first.data.clone()  # storage exchanged
    moved = state.layout()
    assert moved is not full
    parts[1].state[first]["exp_avg"] = torch.zeros_like(first)  # moment exchanged
    assert state.layout() is not moved


def test_another_model_is_refused_with_the_first_difference() -> None:
    parts = make(12)
    train(parts, 1)
    with pytest.raises(StateError, match=r"is \(12,\) in the saved run|another model|\[12"):
        put_back(image_of(state_of(parts)), state_of(make(13)))


@pytest.mark.parametrize(
    ("mine", "saved", "words"),
    [
        ([["a", "b"]], [["a"]], "'b' is not there"),
        ([["a"]], [["a"], ["b"]], "'b' is not here"),
        ([["a", "c"]], [["a", "b"]], "'c' is only here, 'b' only there"),
        ([["a", "b"]], [["b", "a"]], "in another order"),
        ([["a", "b"]], [["a"], ["b"]], "in other groups"),
    ],
)
def test_the_first_difference_of_two_groupings_is_named(
    mine: list[list[str]], saved: list[list[str]], words: str
) -> None:
    assert words in _first_difference(mine, saved)


def test_another_optimizer_grouping_is_refused() -> None:
    parts = make()
    train(parts, 1)
    model, _, _ = make()
    half = torch.optim.AdamW(list(model.parameters())[:2], lr=0.01)
    with pytest.raises(
        StateError, match=r"holds other parameters .*: 'model/\S+' is not here; use"
    ):
        put_back(
            image_of(state_of(parts)),
            TrainingState(
                {"model": model},
                {"optimizer": half},
                {"scheduler": torch.optim.lr_scheduler.StepLR(half, 3)},
                0,
            ),
        )


def test_objects_need_state() -> None:
    model, optimizer, _ = make()
    with pytest.raises(SessionError, match="which has no state_dict"):
        TrainingState({"model": model}, {"optimizer": optimizer}, {"tokenizer": object()}, 0)


def test_wrapper_prefixes_do_not_change_names() -> None:
    assert plain_name("module._orig_mod.layers.0.module.weight") == "layers.0.weight"
    assert plain_name("submodule.weight") == "submodule.weight"


@pytest.mark.parametrize("ranks", [[0], [1, 3], [0, 1], [0, 1, 2, 3], [2, 4, 6], [5]])
def test_share_keys_name_sets_of_ranks(ranks: list[int]) -> None:
    assert ranks_of(key_of(ranks)) == ranks


def test_parts_are_counted_on_this_node_only() -> None:
    view = GroupView(3, 4, 1, (2, 3))
    share = view.share("0-3")
    assert (share.node, share.part, share.parts) == (1, 1, 2)


def pages_of(reader: ImageReader) -> list[int]:
    """Offset of each data chunk in the image's buffer."""
    start = reader.header.layout.data_offset
    return [start + reader.header.layout.chunk_range(chunk)[0] for chunk in range(reader.chunks)]


def copies(count: int, width: int = 300) -> tuple[list[bytearray], list[float]]:
    """The same version several times, and the losses that follow it."""
    torch.manual_seed(0)
    parts = make(width)
    train(parts, 3)
    first = image_of(state_of(parts))
    return [bytearray(first) for _ in range(count)], train(parts, 4, 3)


def test_damaged_chunks_are_taken_from_other_copies() -> None:
    """Each copy has another damaged chunk: no copy is whole, the version is."""
    (one, two, three), expected = copies(3)
    places = pages_of(ImageReader(one))
    assert len(places) > 4
    one[places[1]] ^= 1
    one[places[2]] ^= 1
    two[places[2]] ^= 1
    two[places[3]] ^= 1
    rest = [[ImageReader(two, where="two")], [ImageReader(three, where="three")]]
    fresh = make(300)
    restoration = Restoration([ImageReader(one, where="one")], lambda: rest.pop(0) if rest else [])
    restore(state_of(fresh), restoration, 0)
    assert train(fresh, 4, 3) == expected
    assert [text.split(":")[0] for text in restoration.damage] == ["one", "two"]
    assert restoration.sources == ["two", "three"]


def test_damaged_small_state_is_taken_from_another_copy() -> None:
    (one, two), expected = copies(2)
    one[ImageReader(one).header.layout.small_offset + 9] ^= 1
    fresh = make(300)
    restoration = Restoration([ImageReader(one, where="one"), ImageReader(two, where="two")])
    restore(state_of(fresh), restoration, 0)
    assert train(fresh, 4, 3) == expected
    assert restoration.sources == ["two"]


def test_an_image_that_can_not_be_read_is_replaced() -> None:
    (one,), expected = copies(1)
    found = [[ImageReader(one, where="far away")]]
    restoration = Restoration([CorruptionError("near: torn")], lambda: found.pop() if found else [])
    fresh = make(300)
    restore(state_of(fresh), restoration, 0)
    assert train(fresh, 4, 3) == expected
    assert (restoration.damage, restoration.sources) == (["near: torn"], ["far away"])


def test_what_is_damaged_everywhere_is_not_restored() -> None:
    (one, two), _ = copies(2)
    place = pages_of(ImageReader(one))[2]
    one[place] ^= 1
    two[place + 1] ^= 1
    images = [ImageReader(one, where="one"), ImageReader(two, where="two")]
    with pytest.raises(CorruptionError, match="one: chunk 2 does not match"):
        restore(state_of(make(300)), Restoration(images), 0)


def test_what_nobody_holds_is_told_from_another_model() -> None:
    parts = make()
    train(parts, 1)
    reader = ImageReader(image_of(state_of(parts)))
    tensors = state_of(parts).layout().tensors
    more = StateTensor.whole("model/further", torch.zeros(3), "0")
    with pytest.raises(StateError, match=r"0 of its 12 bytes.*another model") as caught:
        Restoration([reader]).fill([*tensors, more])
    assert not isinstance(caught.value, RestoreError)


def test_what_no_optimizer_owns_may_change_at_any_time() -> None:
    model, teacher = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False)
    ema = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW([model.weight])
    state = TrainingState(
        {"model": model, "ema": ema, "teacher": teacher}, {"optimizer": optimizer}, {}, 0
    )
    model.weight.grad = torch.ones(3, 3)
    optimizer.step()
    kinds = {tensor.name: tensor.changes for tensor in state.layout().tensors}
    assert kinds == {
        "model/weight": Changes.IN_STEP,
        "model/bias": Changes.ANYTIME,
        "ema/weight": Changes.ANYTIME,
        "ema/bias": Changes.ANYTIME,
        "teacher/weight": Changes.NEVER,
        "teacher/bias": Changes.NEVER,
        "optimizer/model/weight/step": Changes.IN_STEP,
        "optimizer/model/weight/exp_avg": Changes.IN_STEP,
        "optimizer/model/weight/exp_avg_sq": Changes.IN_STEP,
    }


def grown(model: torch.nn.Module) -> tuple[TrainingState, Any]:
    """An optimizer of the first layer, which may get more later."""
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.01)  # type: ignore[index]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return TrainingState(
        {"model": model}, {"optimizer": optimizer}, {"scheduler": scheduler}, 0
    ), optimizer


def test_a_parameter_group_may_be_added_on_the_way() -> None:
    parts = make()
    model = parts[0]
    state, optimizer = grown(model)
    before = state.layout()
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})  # type: ignore[index]
    assert state.layout() is not before
    train((model, optimizer, state.objects["scheduler"]), 3)
    kinds = {t.name: t.changes for t in state.layout().tensors if t.name.startswith("model/2")}
    assert kinds == {"model/2.weight": Changes.IN_STEP, "model/2.bias": Changes.IN_STEP}
    buffer = image_of(state)
    expected = train((model, optimizer, state.objects["scheduler"]), 3, 3)
    fresh = make()[0]
    again, second = grown(fresh)  # the script adds the group later; the version had it
    put_back(buffer, again)
    assert [group["lr"] for group in second.param_groups] == [
        pytest.approx(0.001),
        pytest.approx(0.05),
    ]
    assert train((fresh, second, again.objects["scheduler"]), 3, 3) == expected


def test_a_new_tensor_in_a_new_group_is_captured_too() -> None:
    model = make()[0]
    state, optimizer = grown(model)
    state.layout()
    extra = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra]})
    (tensor,) = [t for t in state.layout().tensors if t.name == "optimizer/1.0"]
    assert tensor.tensor.data_ptr() == extra.data_ptr()
    with pytest.raises(StateError, match="holds other parameters here"):
        put_back(image_of(state), grown(make()[0])[0])  # nobody can make it anew


def test_a_replaced_parameter_takes_the_place_of_the_old_one() -> None:
    model = make()[0]
    state, optimizer = grown(model)
    old = model[0]  # type: ignore[index]
    model[0] = torch.nn.Linear(old.in_features, old.out_features)  # type: ignore[operator]
    optimizer.add_param_group({"params": list(model[0].parameters())})  # type: ignore[index]
    model[0].weight.grad = torch.ones_like(model[0].weight)  # type: ignore[index]
    old.weight.grad = torch.ones_like(old.weight)
    optimizer.step()
    with pytest.raises(SessionError, match=r"two tensors are called optimizer/model/0\.weight/"):
        state.layout()
    del optimizer.param_groups[0]
    del optimizer.state[old.weight]
    (tensor,) = [t for t in state.layout().tensors if t.name == "model/0.weight"]
    assert tensor.tensor.data_ptr() == model[0].weight.data_ptr()  # type: ignore[index]


def test_whatever_was_exchanged_is_captured_as_it_is() -> None:
    """Also what no optimizer owns, and however often: a new one may lie where an old one lay."""
    ema = torch.nn.Linear(3, 3)
    state = TrainingState({"ema": ema}, {}, {}, 0)

    def captured() -> dict[str, int]:
        return {t.name: t.tensor.data_ptr() for t in state.layout().tensors}

    for _ in range(50):
        assert captured() == {f"ema/{n}": p.data_ptr() for n, p in ema.named_parameters()}
        ema.weight = torch.nn.Parameter(torch.randn(3, 3))
    ema.load_state_dict(torch.nn.Linear(3, 3).state_dict(), assign=True)
    assert captured() == {f"ema/{n}": p.data_ptr() for n, p in ema.named_parameters()}
    ema.register_parameter("scale", torch.nn.Parameter(torch.ones(1), requires_grad=False))
    assert captured().keys() == {"ema/weight", "ema/bias", "ema/scale"}


def test_a_version_that_could_not_be_put_back_leaves_no_group_behind() -> None:
    parts = make()
    state, optimizer = grown(parts[0])
    before = image_of(state)
    optimizer.add_param_group({"params": list(parts[0][2].parameters())})  # type: ignore[index]
    after = image_of(state)
    after[-4000:-3900] = bytes(100)
    again, second = grown(make()[0])
    with pytest.raises(CorruptionError):
        put_back(after, again)
    put_back(before, again)
    assert len(second.param_groups) == 1


class Scaled(torch.nn.Linear):
    """Keeps something that is no tensor of its own, as layers with scales in eight bits do."""

    def __init__(self, scale: float) -> None:
        super().__init__(2, 2)
        self.scale = scale

    def get_extra_state(self) -> Any:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]


def test_what_modules_keep_besides_is_put_back() -> None:
    def made(scale: float) -> tuple[torch.nn.Sequential, TrainingState]:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), Scaled(scale))
        return model, TrainingState({"model": model}, {}, {}, 0)

    fresh, again = made(1.0)
    put_back(image_of(made(7.5)[1]), again)
    assert fresh[1].scale == 7.5
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(StateError, match="extra state of model's module '1' is only on one side"):
        put_back(image_of(made(1.0)[1]), TrainingState({"model": plain}, {}, {}, 0))


def test_what_modules_keep_is_put_back_into_another_wrapping() -> None:
    def made(scale: float) -> Scaled:
        return Scaled(scale)

    class Wrapper(torch.nn.Module):
        """As DistributedDataParallel, and compiled modules, do."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapped = TrainingState({"model": Wrapper(made(7.5))}, {}, {}, 0)
    bare = made(1.0)
    put_back(image_of(wrapped), TrainingState({"model": bare}, {}, {}, 0))
    assert bare.scale == 7.5
    again = made(2.0)
    saved = image_of(TrainingState({"model": torch.nn.Sequential(Wrapper(made(3.5)))}, {}, {}, 0))
    put_back(saved, TrainingState({"model": torch.nn.Sequential(again)}, {}, {}, 0))
    assert again.scale == 3.5


def test_buffers_of_one_plain_name_are_refused() -> None:
    outer, inner = torch.nn.Module(), torch.nn.Module()
    inner.register_buffer("mean", torch.zeros(2))
    outer.register_buffer("mean", torch.ones(2))
    outer.module = inner
    with pytest.raises(SessionError, match="two buffers are called mean once"):
        TrainingState({"model": outer}, {}, {}, 0).layout()


def test_state_of_no_parameter_is_refused() -> None:
    parts = make()
    train(parts, 1)
    state = state_of(parts)
    for value in (3, {"shared": torch.ones(2)}):
        parts[1].state["global"] = value
        with pytest.raises(SessionError, match="keeps state for 'global', which is none of its"):
            state.layout()
    del parts[1].state["global"]
    state.layout()


def test_lists_of_tensors_go_where_their_parameter_is() -> None:
    values = {"dirs": [torch.ones(2), (torch.ones(3), 1)], "step": torch.tensor(3.0), "n": 4}
    moved = _moved(values, torch.device("meta"))
    assert [moved["dirs"][0].is_meta, moved["dirs"][1][0].is_meta] == [True, True]
    assert (moved["step"].item(), moved["n"], moved["dirs"][1][1]) == (3.0, 4, 1)
