"""Memory of a card: offloading, what is known before a base is read, and memory that others hold."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from lora_core.backends import compact
from lora_core.backends.compact import WeightPolicy, quantize_int8
from lora_core.errors import OutOfMemory
from lora_core.model_files.sizes import CARD_SPARE, OFFLOAD_BUFFERS
from lora_core.models.device import cap_memory, out_of_memory
from lora_core.models.load import BaseModel, open_base
from lora_core.runs import events
from lora_core.train import loop, trainer
from lora_core.train.setup import RuntimePlan
from tests.simulated.device import GIB, SimulatedDevice
from tests.tiny import tiny_folder, tiny_unet
from tests.train.runs import broken_at, notes, result, toy, trained

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def gradient(unet: torch.nn.Module, device: str) -> torch.Tensor:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    context = torch.ones(1, 7, unet.config.cross_attention_dim, device=device)
    unet(x, torch.ones(1, device=device), context, return_dict=False)[0].square().mean().backward()
    assert x.grad is not None
    return x.grad.cpu()


@pytest.mark.parametrize("pinnable", [None, 0], ids=["pinned", "pageable"])
def test_offloading_takes_fixed_memory_and_has_the_same_bits(
    pinnable: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "SLAB", 2**20)
    unet = tiny_unet().requires_grad_(False)
    weights = sum(p.nbytes for p in unet.parameters())
    wanted = gradient(unet, "cpu")
    with SimulatedDevice() as card:
        card.pinnable = pinnable
        unet.to("cuda")
        kept = compact.PinnedStore(CUDA)
        WeightPolicy(None, kept).apply_to(unet)
        found = [gradient(unet, "cuda") for _ in range(2)]
        assert card.pinned <= (0 if pinnable == 0 else weights * 1.1 + compact.SLAB)
        assert all(torch.equal(one, wanted) for one in found)


def test_fetching_allocates_nothing_once_buffers_are_there() -> None:
    with SimulatedDevice() as card:
        kept = compact.PinnedStore(CUDA)
        weights = [torch.full((64, size), float(size)) for size in (8, 32, 16, 24, 8)]
        fetch = [kept.put(weight) for weight in weights]
        for one in fetch:
            one()
        before = card.allocations
        for _ in range(2):
            for one, weight in zip(fetch, weights, strict=True):
                assert torch.equal(one().cpu(), weight)
        assert card.allocations == before
        assert card.live == OFFLOAD_BUFFERS * 64 * 32 * 4


@pytest.mark.parametrize("how", [None, quantize_int8], ids=["whole", "int8"])
def test_a_base_that_is_too_large_is_refused_before_it_is_read(how, tmp_path: Path) -> None:
    folder = str(tiny_folder(tmp_path / "base"))
    policy = WeightPolicy(how)
    with SimulatedDevice() as card:
        base = open_base(folder, CUDA, BF16, policy=policy)
        need = policy.resident_bytes(base.denoiser, BF16)
        before = card.live
        base.load("unet")
        # Blocks of 512 bytes for each tensor, and the scales of 8 bits.
        assert need <= card.live - before <= need * 1.1 + 512 * len(list(base.denoiser.modules())) * 2
        card.others = card.total - CARD_SPARE - card.live - need + 1
        with pytest.raises(OutOfMemory, match="does not fit into the graphics memory"):
            open_base(folder, CUDA, BF16, policy=policy)
        card.others -= 1
        open_base(folder, CUDA, BF16, policy=policy)


@pytest.mark.parametrize(("others", "full"), [(11.7, True), (6.0, False)])
def test_errors_of_libraries_on_a_full_card_mean_its_memory(others: float, full: bool) -> None:
    with SimulatedDevice(gib=12, others=int(others * GIB)):
        for words in ("CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_INTERNAL_ERROR"):
            assert out_of_memory(RuntimeError(f"CUDA error: {words} when calling")) == full
        assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(("times", "rungs"), [(1, []), (2, [["vae aside", 0]])])
def test_memory_that_was_short_for_a_moment_costs_no_rung(
    times: int, rungs: list[object], tmp_path: Path
) -> None:
    run = toy(tmp_path).run("passing", train__steps=3)
    real, calls = loop.diffusion_loss, []

    def picture_losses(*given):
        calls.append(1)
        # The first call is the trial's.
        if 1 < len(calls) <= 1 + times:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*given)

    with SimulatedDevice(), mock.patch.object(loop, "diffusion_loss", picture_losses):
        trained(run)
    assert json.loads(run.plan_file.read_text())["rungs"] == rungs
    assert run.status() == "done"


def test_a_hog_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = toy(tmp_path).run("hog", train__steps=2)
    waited: list[float] = []
    real, failed = loop.diffusion_loss, []

    with SimulatedDevice() as card:

        def picture_losses(*given):
            if not failed and run.progress().step:
                failed.append(1)
                card.others = 10 * GIB
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(*given)

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 3:
                card.others = 0

        monkeypatch.setattr(loop, "diffusion_loss", picture_losses)
        monkeypatch.setattr(trainer.time, "sleep", sleep)
        trained(run)
    assert len(waited) == 3
    assert json.loads(run.plan_file.read_text())["rungs"] == []


def test_text_encoders_wait_on_the_processor_where_captions_vary(tmp_path: Path) -> None:
    """They come to the card once for many captions, and the numbers stay those of a run with them on it."""
    place = toy(tmp_path)
    settings = {"train__steps": 2, "dataset__shuffle_tags": True, "train__batch_size": 1}
    runs = [place.run(name, **settings) for name in ("beside", "aside")]
    moved: list[str] = []
    put = BaseModel.put

    def recorded(base: BaseModel, part: str, device: torch.device) -> None:
        moved.append(f"{part} {device.type}")
        put(base, part, device)

    with SimulatedDevice(), mock.patch.object(BaseModel, "put", recorded):
        trained(runs[0])
        plan = json.loads(runs[0].plan_file.read_text())
        runs[1].plan_file.write_text(
            json.dumps({**plan, "rungs": [["vae aside", 0], ["text encoders aside", 0]]})
        )
        moved.clear()
        trained(runs[1])
    # Away for the UNet to be read, then there and back for all of the captions.
    assert [one for one in moved if one.startswith("text")] == [
        "text_encoder cpu", "text_encoder cuda", "text_encoder cpu",
    ]  # fmt: skip
    assert result(runs[0]) == result(runs[1])


def test_what_does_not_fit_beside_the_unet_stays_on_the_processor(tmp_path: Path) -> None:
    run = toy(tmp_path).run("beside", train__steps=2, dataset__shuffle_tags=True)
    put, failed = BaseModel.put, []

    def full(base: BaseModel, part: str, device: torch.device) -> None:
        if device.type == "cuda" and "unet" not in base.waiting and len(failed) < 2:
            failed.append(part)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        put(base, part, device)

    with SimulatedDevice(), mock.patch.object(BaseModel, "put", full):
        trained(run)
    assert failed == ["vae", "text_encoder"]
    assert json.loads(run.plan_file.read_text())["rungs"] == [["vae aside", 0], ["text encoders aside", 0]]
    assert len([note for note in notes(run) if note.startswith("The base does not fit into memory")]) == 2
    assert run.status() == "done"


def test_rungs_are_taken_back_where_more_memory_is_free(tmp_path: Path) -> None:
    run = toy(tmp_path).run("roomier", train__steps=4, train__precision="bf16")
    with SimulatedDevice():
        broken_at(run, events.CheckpointDone, 4)
        plan = json.loads(run.plan_file.read_text())
        assert plan["cap"] == cap_memory(CUDA)
        rungs = [["vae aside", 0], ["checkpointing", 0], ["int8", 1]]
        for share, left in ((1.0, rungs), (0.5, rungs[2:])):
            run.plan_file.write_text(json.dumps({**plan, "rungs": rungs, "cap": int(plan["cap"] * share)}))
            found = RuntimePlan.of(run, run.config()).within(cap_memory(CUDA))
            assert [list(rung) for rung in found.rungs] == left
            assert found.tried == (left == rungs)
        trained(run)
    assert [note for note in notes(run) if note.startswith("More memory is free than before")]
    assert json.loads(run.plan_file.read_text())["rungs"] == [["int8", 1]]
    assert json.loads(run.plan_file.read_text())["tried"]
