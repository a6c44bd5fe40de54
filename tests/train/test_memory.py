"""Too little memory: the ladder, in the loop and before the first step, and that it costs rounding at
most."""

import contextlib
import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from lora_core.backends import onednn
from lora_core.backends.compact import is_offloaded, quantized_bits
from lora_core.backends.onednn import PLAIN, WINOGRAD, is_prepacked
from lora_core.errors import OutOfMemory
from lora_core.models.device import out_of_memory
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.train import autotune, loop, setup
from lora_core.train import autotune as oom
from lora_core.train.autotune import MemoryFallback
from lora_core.train.loop import StepSettings, backward_micro_batch
from lora_core.train.setup import RuntimePlan, enable_checkpointing, prepare
from tests.faults import Fault, Nursery, armed
from tests.train.runs import (
    RANDOM,
    Broken,
    Toy,
    broken_at,
    check_story,
    check_whole,
    notes,
    result,
    trained,
    trouble,
)

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")
BATCH = {"train__batch_size": 4}


@pytest.fixture(autouse=True)
def plain_layout(request: pytest.FixtureRequest) -> Iterator[None]:
    """The base in its plain layout, so that the ladder is one rung shorter; but for the test of that rung."""
    if request.node.get_closest_marker("prepacked"):
        with mock.patch.multiple(onednn, SMALLEST_LINEAR=1, SMALLEST_CONVOLUTION=1, SMALLEST_WINOGRAD=1):
            yield
        return
    with mock.patch.object(setup, "choose_layout", return_value=PLAIN):
        yield


@contextlib.contextmanager
def room_for(pictures: int, error: Exception = CUDA, checkpointed: bool = False) -> Iterator[list[int]]:
    """An allocator that holds so many pictures' activations; none without checkpointing, if asked."""
    real, sizes = loop.diffusion_loss, []

    def picture_losses(base, latents, *more):
        if len(latents) > pictures or (checkpointed and not base.denoiser.is_gradient_checkpointing):
            raise type(error)(str(error))
        sizes.append(len(latents))
        return real(base, latents, *more)

    with mock.patch.object(loop, "diffusion_loss", picture_losses):
        yield sizes


def session_of(toy: Toy, name: str, **changes: object):
    run = toy.run(name, **changes)
    config = run.config()
    return prepare(run, config, RuntimePlan.of(run, config), lambda *_: None), config


@pytest.mark.parametrize("random", [False, True], ids=["plain", "all random"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(own_toy: Toy, random: bool) -> None:
    """Same pictures, captions, noise and dropout masks, those of a trained text encoder too."""
    more = {key.replace(".", "__"): value for key, value in RANDOM.items()} if random else {}
    session, config = session_of(own_toy, "parts", **BATCH, **more, loss__noise_offset=0.05)
    state, plan = session.state, StepSettings(config, 12)
    for layer in state.injected.layers.values():
        torch.nn.init.normal_(layer.up, std=0.05)
    found = []
    for split in (1, 2, 3, 4):
        state.chunks = split
        state.flat_params.zero_grad()
        losses = backward_micro_batch(state, session.batches, session.text, plan, 3)
        grads = torch.cat([p.grad.flatten() for p in state.injected.parameters() if p.grad is not None])
        found.append((losses, grads))
    losses, grads = found[0]
    assert grads.abs().max() > 0
    for other, parts in found[1:]:
        torch.testing.assert_close(other, losses, rtol=1e-5, atol=1e-6)
        assert (parts - grads).norm() <= 1e-5 * grads.norm()


def test_checkpointing_has_the_gradient_of_the_whole(own_toy: Toy) -> None:
    session, config = session_of(own_toy, "twice", **BATCH, adapter__dropout=0.2)
    state, plan = session.state, StepSettings(config, 12)
    found = []
    for _ in range(2):
        state.flat_params.zero_grad()
        backward_micro_batch(state, session.batches, session.text, plan, 3)
        found.append(torch.cat([p.grad.flatten() for p in state.injected.parameters()]))
        enable_checkpointing(state.base)
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError("no memory")], ids=["cuda", "cpu", "python"])
def test_once_and_twice_in_the_loop(
    own_toy: Toy, unbroken: Callable[..., RunFolder], error: Exception
) -> None:
    how = {**BATCH, "train__steps": 3}
    plain, run = unbroken(**how), own_toy.run("short", **how)
    with room_for(2, error) as sizes:
        trained(run)
    assert set(sizes) == {2}
    assert len(sizes) == 2 * 3  # no step twice
    check_story(run)
    told = notes(run)
    assert [note.startswith("Memory ran out, so step 1 is done again.") for note in told] == [True, True]
    assert "about a third longer" in told[0]
    assert "parts of half the size" in told[1]
    assert json.loads(run.plan_file.read_text())["rungs"] == [["checkpointing", 0], ["half", 0]]
    first, other = (one.progress().losses[0].loss for one in (run, plain))
    assert first == pytest.approx(other, rel=1e-5)


@pytest.mark.prepacked
def test_a_second_layout_of_the_base_goes_first(own_toy: Toy) -> None:
    """In the loop, and before the first step, where it equals the plain layout chosen by hand."""
    how = {**BATCH, "train__steps": 4}
    run = own_toy.run("short", **how)
    with armed(Fault("step", nth=2, do="memory")):
        broken_at(run, events.StepDone, 3)
    assert json.loads(run.plan_file.read_text()) | {
        "layout": WINOGRAD,
        "rungs": [["plain layout", 1]],
    } == json.loads(run.plan_file.read_text())
    assert "laid out for the processor" in notes(run)[0]
    trained(run)
    check_story(run)
    losses = [event.loss for event in run.progress().losses]
    tried = own_toy.run("tried", **how)
    with (
        mock.patch.object(autotune, "limited", return_value=True),
        room_beside(lambda unet: not is_prepacked(unet)),
    ):
        trained(tried)
    assert json.loads(tried.plan_file.read_text())["rungs"] == [["plain layout", 0]]
    with mock.patch.object(setup, "choose_layout", return_value=PLAIN):
        plain = own_toy.run("plain", **how)
        trained(plain)
    assert result(tried) == result(plain)
    assert losses == pytest.approx([event.loss for event in plain.progress().losses], rel=1e-3)


def test_always_ends_in_a_sentence(own_toy: Toy) -> None:
    run = own_toy.run("never", **BATCH, train__steps=8)
    broken_at(run, events.StepDone, 6)
    with room_for(0):
        sentence = trouble(run)
    assert sentence.startswith(
        "The device ran out of memory although checkpointing is on, images go through one at a time and"
        " the base waits outside of the device's memory; lower train.resolution"
    )
    # Steps are done beside the base as it is, so that it does not change now.
    taken = [name for name, _ in json.loads(run.plan_file.read_text())["rungs"]]
    assert taken == ["checkpointing", "half", "half", "offload"]
    assert "train.resolution" in sentence
    assert (run.status(), run.progress().cause) == ("failed", "out_of_memory")
    assert run.checkpoint_steps() == [4]
    check_whole(run)
    trained(run)
    check_story(run)


def test_a_broken_run_takes_the_same_rungs_at_the_same_steps(own_toy: Toy) -> None:
    """Memory is short from step 6 on; a run that is resumed from step 4 does step 5 as before."""
    fault = {"on": "step", "nth": 6, "times": 1, "do": "memory"}
    how = {"train__steps": 8, "train__batch_size": 1}
    whole, run = own_toy.run("whole", **how), own_toy.run("broken", **how)
    with armed(Fault(**fault)):
        trained(whole)
    with armed(Fault(**fault)), contextlib.suppress(Broken):
        broken_at(run, events.StepDone, 7)
    assert json.loads(run.plan_file.read_text())["rungs"] == [["checkpointing", 5]]
    seen: dict[int, bool] = {}
    real = loop.optimizer_step

    def look(state, clip, parts, step):
        seen[step] = state.base.denoiser.is_gradient_checkpointing
        return real(state, clip, parts, step)

    with mock.patch.object(loop, "optimizer_step", look):
        trained(run)
    assert seen == {step: step > 5 for step in range(5, 9)}
    assert result(run) == result(whole)
    check_story(run)


@pytest.mark.parametrize("saved", [4, 0])
def test_memory_that_ends_in_the_optimizer_takes_nothing_half_done(own_toy: Toy, saved: int) -> None:
    """Some tensors have stepped and others have not: it goes back to what is whole, and no step counts
    twice."""
    by_hand = own_toy.run("by-hand", save__every=saved, train__gradient_checkpointing=True)
    trained(by_hand)
    run = own_toy.run("half", save__every=saved, train__gradient_checkpointing=True)
    real = torch.optim.AdamW.step
    calls = []

    def half(self, *arguments):
        calls.append(1)
        if len(calls) == 6:
            for parameter in self.param_groups[0]["params"][:3]:
                parameter.data.add_(1.0)
            raise type(CUDA)(str(CUDA))  # one that holds no frames of others
        return real(self, *arguments)

    with mock.patch.object(torch.optim.AdamW, "step", half):
        trained(run)
    assert f"so it continues from step {saved}." in notes(run)[0]
    check_story(run)
    # The rung that was taken, halves of a batch of two, changes roundings from there on.
    for (name, ours), theirs in zip(
        result(run)["adapter.safetensors"].items(),
        result(by_hand)["adapter.safetensors"].values(),
        strict=True,
    ):
        a, b = (torch.frombuffer(bytearray(x), dtype=torch.float32) for x in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("rung", ["checkpointing", "half"])
def test_a_rung_that_the_trial_chose_equals_the_one_chosen_by_hand(own_toy: Toy, rung: str) -> None:
    start = {
        **BATCH, "adapter__dropout": 0.1, "train__steps": 6, "validation__pictures": 1,
        "validation__every": 3,
    }  # fmt: skip
    more = {"train__gradient_checkpointing": True} if rung == "half" else {}
    run = own_toy.run("tried", **start, **more)
    room = room_for(2) if rung == "half" else room_for(4, checkpointed=True)
    with room, mock.patch.object(autotune, "limited", return_value=True):
        broken_at(run, events.StepDone, 4)
        plan = json.loads(run.plan_file.read_text())
        assert (plan["rungs"], plan["tried"]) == ([[rung, 0]], True)
        assert any("heaviest step does not fit into memory as it is" in note for note in notes(run))
        trained(run)
    hand = own_toy.run("hand", **start, **(more or {"train__gradient_checkpointing": True}))
    if rung == "half":
        plan = RuntimePlan.of(hand, hand.config())
        plan.rungs.append(("half", 0))
        plan.write(hand)
    trained(hand)
    assert result(run) == result(hand)
    check_story(run)


@contextlib.contextmanager
def room_beside(kept: Callable[[torch.nn.Module], bool]) -> Iterator[None]:
    """An allocator that has room for a step only where the base is kept in a certain way."""
    real = loop.diffusion_loss

    def picture_losses(base, *more):
        if not kept(base.denoiser):
            raise type(CUDA)(str(CUDA))  # one that holds no frames of others
        return real(base, *more)

    with mock.patch.object(loop, "diffusion_loss", picture_losses):
        yield


@pytest.mark.parametrize(
    ("kept", "by_hand", "rungs"),
    [
        (quantized_bits, {"train__quantize_base": "int8"}, ["int8"]),
        (is_offloaded, {"train__quantize_base": "int8", "train__offload": True}, ["int8", "offload"]),
    ],
    ids=["int8", "int8 and offload"],
)
def test_a_base_that_the_trial_chose_equals_the_one_chosen_by_hand(
    own_toy: Toy, unbroken: Callable[..., RunFolder], kept: Callable[[torch.nn.Module], bool],
    by_hand: dict[str, object], rungs: list[str],
) -> None:  # fmt: skip
    """Also where the run was broken off, with the base read anew and thin from the start."""
    start = {
        "train__batch_size": 1, "train__gradient_checkpointing": True, "adapter__dropout": 0.1,
        "train__steps": 6,
    }  # fmt: skip
    run = own_toy.run("tried", **start)
    with mock.patch.object(autotune, "limited", return_value=True), room_beside(kept):
        broken_at(run, events.StepDone, 5)
        assert json.loads(run.plan_file.read_text())["rungs"] == [[rung, 0] for rung in rungs]
        trained(run)
    assert "off by one or two percent" in notes(run)[0]
    hand = own_toy.run("hand", **start, **by_hand)
    trained(hand)
    assert result(run) == result(hand)
    check_story(run)
    assert result(unbroken(**start)) != result(hand)


def test_within_a_run_the_base_waits_elsewhere_and_stays_the_same(
    own_toy: Toy, unbroken: Callable[..., RunFolder]
) -> None:
    start = {"train__batch_size": 1, "train__gradient_checkpointing": True, "train__steps": 8}
    plain, run = unbroken(**start), own_toy.run("short", **start)
    with armed(Fault("step", nth=6, do="memory")):
        broken_at(run, events.StepDone, 7)
    assert json.loads(run.plan_file.read_text())["rungs"] == [["offload", 5]]
    trained(run)
    assert "the numbers stay the same" in notes(run)[0]
    assert result(run) == result(plain)
    check_story(run)


def test_without_room_aside_a_run_goes_on_in_eight_bits(own_toy: Toy) -> None:
    """A broken run, resumed from step 4, takes them at the same step again."""
    start = {"train__batch_size": 1, "train__gradient_checkpointing": True, "train__steps": 8}
    whole, run = own_toy.run("whole", **start), own_toy.run("short", **start)
    with mock.patch.object(oom, "free_bytes", return_value=2**20):
        with armed(Fault("step", nth=6, do="memory")):
            trained(whole)
        with armed(Fault("step", nth=6, do="memory")):
            broken_at(run, events.StepDone, 7)
    assert json.loads(run.plan_file.read_text())["rungs"] == [["int8", 5]]
    trained(run)
    assert result(run) == result(whole)
    check_story(run)


def test_the_trial_changes_nothing(own_toy: Toy, unbroken: Callable[..., RunFolder]) -> None:
    plain, tried = unbroken(train__steps=4), own_toy.run("tried", train__steps=4)
    with mock.patch.object(autotune, "limited", return_value=True):
        trained(tried)
    assert json.loads(tried.plan_file.read_text()) | {"tried": False} == json.loads(
        plain.plan_file.read_text()
    )
    assert result(tried) == result(plain)


def test_a_trial_that_cannot_fit_ends_before_the_first_step(own_toy: Toy) -> None:
    run = own_toy.run("never")
    with room_for(0), mock.patch.object(autotune, "limited", return_value=True):
        assert "ran out of memory" in trouble(run)
    assert run.status() == "failed"
    assert run.progress().step == 0


def test_samples_and_validation_that_do_not_fit_are_left_out(
    own_toy: Toy, unbroken: Callable[..., RunFolder]
) -> None:
    how = {"sample__every": 2, "validation__pictures": 1, "validation__every": 2, "train__steps": 4}
    plain, run = unbroken(**how), own_toy.run("short", **how)
    with armed(Fault("draw", times=0, do="memory"), Fault("validate", nth=2, times=1, do="memory")):
        trained(run)
    assert not run.progress().previews
    assert [event.step for event in run.progress().validations] == [4]
    assert "The samples of step 0 did not fit into memory and were left out" in notes(run)[0]
    ours, theirs = (load["adapter.safetensors"] for load in (result(run), result(plain)))
    assert ours == theirs


def test_the_eight_bit_optimizer_is_a_rung_where_it_is_installed(own_toy: Toy) -> None:
    session, config = session_of(own_toy, "eight")
    state, batch = session.state, config.train.batch_size
    state.chunks = 8
    enable_checkpointing(state.base)
    MemoryFallback(state, batch, [("int8", 0), ("offload", 0)], session.offload_folder).apply_until(0)
    with pytest.raises(OutOfMemory, match="or install bitsandbytes for an 8-bit optimizer"):
        MemoryFallback(state, batch, []).apply_next(0)

    class AdamW8bit(torch.optim.AdamW):
        pass

    fakes = {
        "bitsandbytes": types.ModuleType("bitsandbytes"),
        "bitsandbytes.optim": types.ModuleType("optim"),
    }
    fakes["bitsandbytes.optim"].AdamW8bit = AdamW8bit
    before = [{k: v for k, v in g.items() if k in ("lr", "initial_lr", "until", "betas", "weight_decay")}
              for g in state.optimizer.param_groups]  # fmt: skip
    with mock.patch.dict(sys.modules, fakes), mock.patch.object(oom.importlib.util, "find_spec"):
        taken: list[tuple[str, int]] = []
        assert "8 bits" in MemoryFallback(state, batch, taken).apply_next(0)
        assert taken == [("8-bit optimizer", 0)]
        assert type(state.optimizer) is AdamW8bit
        after = [{k: g[k] for k in before[0]} for g in state.optimizer.param_groups]
        assert after == before
        # Once there is a state, it is too late for it.
        with pytest.raises(OutOfMemory):
            MemoryFallback(state, batch, []).apply_next(0)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (CUDA, True), (CPU, True), (MemoryError(), True), (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("shape mismatch"), False), (OSError(12, "x"), False),
    ],
)  # fmt: skip
def test_which_errors_are_of_memory(error: Exception, found: bool) -> None:
    assert out_of_memory(error) == found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits on the address space are Linux'")
def test_a_run_under_a_real_limit_completes_by_itself(own_toy: Toy, tmp_path: Path) -> None:
    """Eight pictures at once need some 150 MB of address space beyond what is held before the first step.

    How many exactly differs from machine to machine: the limit is lowered until something has to be done.
    """
    pictures = shutil.copytree(own_toy.pictures, tmp_path / "larger")
    for path in pictures.glob("*.png"):
        with Image.open(path) as image:
            larger = image.resize((64, 64))
        larger.save(path)
    toy = Toy(own_toy.base, pictures, own_toy.home)
    how = {
        "train__batch_size": 8,
        "train__resolution": 64,
        "train__steps": 2,
        "save__every": 0,
        "dataset__repeats": 2,
    }
    # Several arenas reserve address space in advance, and the usual one keeps what is freed.
    nursery = Nursery(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536")
    try:
        for megabytes in (96, 72, 54, 40, 30):
            run = toy.run(f"limited-{megabytes}", **how)
            assert nursery.train(run.path, memory=megabytes * 2**20) == (0, "")
            plan = json.loads(run.plan_file.read_text())
            assert plan["tried"]
            if plan["rungs"]:
                break
        hand = toy.run("hand", **how, train__gradient_checkpointing=True)
        later = RuntimePlan.of(hand, hand.config())
        later.rungs.extend((name, 0) for name, _ in plan["rungs"] if name != "checkpointing")
        later.write(hand)
        assert nursery.train(hand.path) == (0, "")
    finally:
        nursery.close()
    assert ["checkpointing", 0] in plan["rungs"]
    assert run.status() == "done"
    assert result(run) == result(hand)
    check_story(run)
