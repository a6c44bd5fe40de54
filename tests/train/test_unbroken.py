"""A run that was broken off, paused or gone on with from any checkpoint ends in the bits of an unbroken
one."""

import shutil

import pytest

from lora_core.runs import events
from lora_core.train.checkpoint import load_checkpoint, remove_checkpoint
from lora_core.train.export import export_checkpoint
from tests.train.runs import RANDOM, Toy, asked_at, broken_at, check_story, check_whole, result, trained

WAYS = {
    "accumulation, flips, shuffled tags, dropout": {
        **RANDOM,
        "validation.pictures": 1,
        "validation.every": 5,
    },
    "lion, restarts": {"optimizer.name": "lion", "optimizer.schedule": "cosine_restarts"},
    "prodigy, bf16 base": {"optimizer.name": "prodigy", "optimizer.lr": 1.0, "train.precision": "bf16"},
    "bf16 base": {"train.precision": "bf16"},
    "average": {"save.ema": 0.9},
    "a rate that is found": {"optimizer.lr": "auto", "save.ema": 0.9, "optimizer.lora_plus": 3.0},
    "slider, text encoder": {
        "slider.positive": "a red dot",
        "slider.negative": "a blue dot",
        "optimizer.text_encoder_lr": 5e-4,
        "adapter.dropout": 0.1,
        "validation.pictures": 1,
        "validation.every": 5,
    },
    "average, alphas by block": {"save.ema": 0.9, "adapter.block_alphas": {"mid_block": 1.0}},
    "DoRA, average, factors by themselves": {
        "adapter.kind": "dora",
        "save.ema": 0.9,
        "optimizer.name": "adafactor",
        "adapter.dropout": 0.2,
    },
    "LoHa of convolutions, lion": {
        "adapter.kind": "loha",
        "adapter.targets": "locon",
        "adapter.conv_rank": 1,
        "optimizer.name": "lion",
    },
    "LoKr, average, checkpointing": {
        "adapter.kind": "lokr",
        "save.ema": 0.9,
        "train.gradient_checkpointing": True,
    },
    "OFT of convolutions, average": {
        "adapter.kind": "oft",
        "adapter.targets": "locon",
        "adapter.conv_rank": 2,
        "save.ema": 0.9,
    },
    "checkpointing, captions that vary": {
        "train.gradient_checkpointing": True,
        "adapter.dropout": 0.2,
        "dataset.shuffle_tags": True,
        "dataset.tag_dropout": 0.3,
    },
}


def made(toy: Toy, name: str, changes: dict[str, object]) -> object:
    return toy.run(name, **{key.replace(".", "__"): value for key, value in changes.items()})


@pytest.mark.parametrize("way", list(WAYS))
def test_broken_off_and_paused_equals_unbroken(own_toy: Toy, way: str) -> None:
    whole = made(own_toy, "whole", WAYS[way])
    trained(whole)
    run = made(own_toy, "broken", WAYS[way])
    broken_at(run, events.StepDone, 6)
    check_whole(run)
    assert asked_at(run, "pause", 7).status == "paused"
    assert run.checkpoint_steps()[-1] == 7
    broken_at(run, events.CheckpointDone, 12)
    trained(run)
    assert result(run) == result(whole)
    check_story(run)
    assert run.progress().best_step == whole.progress().best_step


def test_how_often_it_is_saved_changes_no_bit(own_toy: Toy) -> None:
    results = []
    for every, keep in ((4, 2), (1, 1), (5, 3), (0, 1)):
        run = own_toy.run(f"every-{every}", save__every=every, save__keep_last=keep)
        if every == 5:
            broken_at(run, events.StepDone, 11)
        trained(run)
        results.append(result(run))
    assert all(found == results[0] for found in results)


def test_every_checkpoint_that_is_kept_leads_to_the_same_end(own_toy: Toy) -> None:
    run = own_toy.run("kept", save__keep_last=10, save__every=3, save__ema=0.9)
    trained(run)
    wanted, kept = result(run), run.checkpoint_steps()
    assert kept == [3, 6, 9, 12]
    for step in kept[:-1]:
        again = own_toy.run(f"from-{step}", save__every=3, save__ema=0.9)
        shutil.copytree(run.checkpoint(step), again.checkpoint(step))
        trained(again)
        assert [event.step for event in again.progress().losses] == list(range(step + 1, 13))
        assert result(again) == wanted


def test_what_a_stop_left_undone_is_made_up_for(own_toy: Toy) -> None:
    """Stopped while it validates: the checkpoint is of a step whose validation and samples are missing."""
    how = {"validation__pictures": 1, "validation__every": 6, "sample__every": 6}
    whole = own_toy.run("whole", **how)
    trained(whole)
    run = own_toy.run("stopped", **how)
    asked = []

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == 6 and not asked:
            asked.append(run.request("pause"))

    assert trained(run, on_event).status == "paused"
    assert run.progress().step == 6
    assert not run.progress().validations
    trained(run)
    seen, wanted = run.progress(), whole.progress()
    assert [(e.step, e.gain, e.best) for e in seen.validations] == [
        (e.step, e.gain, e.best) for e in wanted.validations
    ]
    assert [(e.step, e.files) for e in seen.previews] == [(e.step, e.files) for e in wanted.previews]
    assert load_checkpoint(run.checkpoint(12))[1].best == load_checkpoint(whole.checkpoint(12))[1].best
    for event in wanted.previews:
        for file in event.files:
            assert (run.path / file).read_bytes()
    assert result(run) == result(whole)


def test_a_checkpoint_that_was_asked_for_stays(own_toy: Toy) -> None:
    run = own_toy.run("marked", save__every=2, save__keep_last=1, save__keep_best=False)
    asked_at(run, "save", 3)
    assert run.checkpoint_steps() == [3, 12]
    remove_checkpoint(run.checkpoint(3))
    assert run.checkpoint_steps() == [12]


def test_average_and_raw_adapter_are_both_sampled_measured_and_exported(own_toy: Toy) -> None:
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    how = {"sample__every": 12, "validation__pictures": 1, "validation__every": 6, "sample__steps": 12}
    plain, averaged = own_toy.run("plain", **how), own_toy.run("avg", **how, save__ema=0.5)
    for run in (plain, averaged):
        last_line = trained(run).export
    assert last_line == averaged.exports / "avg.safetensors"
    last = averaged.checkpoint(12)
    # The factors that are trained are those of the run without an average: it changes nothing about training.
    raw, other = (
        load_file(last / "factors.safetensors"),
        load_file(plain.checkpoint(12) / "adapter.safetensors"),
    )
    assert all(torch.equal(raw[name], tensor) for name, tensor in other.items())
    mean = load_file(last / "adapter.safetensors")
    export = load_file(averaged.exports / "avg.safetensors")
    ups = [name for name in mean if name.endswith("up.weight")]
    assert ups
    assert all(torch.equal(export[name], mean[name].half()) for name in ups)
    assert not any(torch.equal(mean[name], raw[name]) for name in ups)
    # So everything raw is what the run without an average gives.
    exported = load_file(averaged.exports / "avg-raw.safetensors")
    same = load_file(plain.exports / "plain.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in same.items())
    by_hand = export_checkpoint(averaged, "last", "mine", ("kohya", "fp16"))
    assert by_hand["raw"] == str(averaged.exports / "mine-raw.safetensors")
    again = load_file(by_hand["raw"])
    assert all(torch.equal(again[name], tensor) for name, tensor in same.items())
    assert export_checkpoint(plain, "last", "mine", ("kohya", "fp16"))["raw"] == ""
    names = ("step-000012-0.png", "step-000012-raw-0.png")
    with (
        Image.open(plain.previews / names[0]) as alone,
        Image.open(averaged.previews / names[0]) as smooth,
        Image.open(averaged.previews / names[1]) as rough,
    ):
        assert rough.tobytes() == alone.tobytes() != smooth.tobytes()
        assert "<lora:avg-raw:1>" in rough.info["parameters"]
    progress = averaged.progress()
    assert progress.previews[-1].files == [f"previews/{names[0]}"]
    assert progress.previews[-1].raw_files == [f"previews/{names[1]}"]
    assert progress.previews[0].raw_files == []
    for one, without in zip(progress.validations, plain.progress().validations, strict=True):
        assert one.raw_gain == without.gain != one.gain
        assert one.raw_against == pytest.approx(one.raw_gain - one.gain)
    said = [note for note in progress.warnings if "avg-raw.safetensors the raw one" in note]
    assert len(said) == 1
    assert "gain" in said[0]


def test_the_average_follows_its_formula(own_toy: Toy) -> None:
    import torch

    from lora_core.lora.inject import EMA, Injected
    from lora_core.lora.layer import DropoutState, FlatParams, LoraLayer, LoraSpec

    layer = LoraLayer(torch.nn.Linear(3, 3), "x", LoraSpec(1, 1.0), DropoutState(), 0)
    average = EMA(Injected({("unet", "x"): layer}, DropoutState()), FlatParams([[layer]]), 0.5)
    with torch.no_grad():
        layer.up.fill_(1.0)
    mean = 0.0
    for step in (1, 2, 30):
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay)
        assert average.weights().layers["unet", "x"].up.flatten().tolist() == pytest.approx([mean] * 3)
    assert layer.up.flatten().tolist() == [1.0] * 3
