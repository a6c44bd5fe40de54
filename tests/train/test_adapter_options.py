"""Numbers by block, rsLoRA, presets of blocks, and going on from a LoRA, in whole runs of the embedded
base."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from lora_core.errors import AdapterFileError, ConfigError, RunError
from lora_core.formats.io import load_adapter, read_tensors, save_adapter
from lora_core.lora.inject import adapter_weights, inject
from lora_core.lora.layer import LoraSpec
from lora_core.lora.weights import AdapterWeights, LoadedLora, Merger
from lora_core.model_files.families import FAMILIES, KOHYA
from lora_core.models.encode import encode_prompt
from lora_core.models.load import load_base
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.train.setup import RuntimePlan, prepare
from lora_core.train.trainer import Outcome, train
from tests.formats.odd_files import serialised

STEPS = 4
MIXED = {
    "adapter.rslora": True,
    "adapter.block_ranks": {r"unet\..*attn1": 3, r"layers\.0": 0, "mid_block": 5},
    "adapter.block_alphas": {"down_blocks": 0.7, r"attn2\.to_v": 3.0},
    "optimizer.block_lr": {"up_blocks": 3e-3, "mid_block.*attn2": 0.0},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        image = Image.new("RGB", (64, 64), ("red", "blue", "green")[number])
        ImageDraw.Draw(image).ellipse((10, 10, 30 + number, 50), fill="orange")
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"dot, number {number}")
    return folder


@pytest.fixture
def config(pictures):
    return RunConfig().changed({
        "dataset.path": str(pictures), "adapter.rank": 2, "adapter.alpha": 2.0, "train.steps": STEPS,
        "train.precision": "fp32", "train.resolution": 64, "optimizer.lr": 1e-3, "validation.pictures": 0.0,
        "loss.min_snr": 0.0, "sample.prompts": ["dot"], "sample.every": 0, "sample.steps": 1,
        "save.every": 1, "save.keep_last": 9,
    })  # fmt: skip


def _trained(run: RunFolder, on_event: Callable[[events.Event], None] = lambda event: None) -> Outcome:
    with run.hold():
        run.request("resume")
        return train(run, None, on_event)


def _run(place: Path, config: RunConfig, name: str) -> RunFolder:
    return RunFolder.create(place / "runs" / name, config.changed({"name": name}))


def _session(place: Path, config: RunConfig, name: str = "run"):
    run = _run(place, config, name)
    return prepare(run, config, RuntimePlan.of(run, config), lambda *_: None)


def _told(run: RunFolder) -> list[str]:
    return [e.message for e in events.read_events(run.events_file)[0] if isinstance(e, events.Warned)]


def test_a_resume_with_numbers_by_block_equals_an_unbroken_run_bit_for_bit(tmp_path, config):
    config = config.changed(MIXED)
    whole, broken = _run(tmp_path, config, "whole"), _run(tmp_path, config, "broken")
    assert _trained(whole).status == "done"

    def pause(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step in (1, 3):
            broken.request("pause")

    assert _trained(broken, pause).status == "paused"
    assert _trained(broken, pause).status == "paused"
    assert _trained(broken).status == "done"
    for name in ("factors.safetensors", "optimizer.safetensors", "adapter.safetensors"):
        file = f"step-{STEPS:06d}/{name}"
        mine, theirs = (read_bytes_of_tensors(run.checkpoints / file) for run in (whole, broken))
        assert mine == theirs, name


def read_bytes_of_tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def test_a_checkpoint_of_many_alphas_is_still_one_that_all_tools_read(tmp_path, config):
    """Its own file has one alpha, the exact one beside it each layer's; both mean the same update."""
    run = _run(tmp_path, config.changed(MIXED), "r")
    _trained(run)
    one = load_adapter(run.checkpoint(STEPS) / "adapter.safetensors", FAMILIES["tiny"])
    exact = load_adapter(run.checkpoint(STEPS) / "factors.safetensors", FAMILIES["tiny"])
    assert len({layer.alpha for layer in one.layers.values()}) == 1
    # alpha / sqrt(rank) of each layer, folded into alpha / rank.
    scales = {round(layer.scale, 5) for layer in exact.layers.values()}
    assert scales == {
        round(a / r**0.5, 5) for a, r in ((0.7, 2), (0.7, 3), (3.0, 2), (2.0, 2), (2.0, 3), (2.0, 5))
    }
    for key, layer in exact.layers.items():
        torch.testing.assert_close(one.layers[key].delta(), layer.delta(), rtol=1e-5, atol=1e-8)
    export = load_adapter(run.exports / "r.safetensors", FAMILIES["tiny"])
    assert export.layers.keys() == exact.layers.keys()
    names = [".".join(key) for key in exact.layers]
    assert not [name for name in names if re.search(r"mid_block.*attn2|layers\.0", name)]


def test_one_alpha_needs_no_second_file(tmp_path, config):
    run = _run(tmp_path, config.changed({"adapter.rslora": True, "train.steps": 1}), "r")
    _trained(run)
    assert not (run.checkpoint(1) / "factors.safetensors").exists()
    weights = load_adapter(run.checkpoint(1) / "adapter.safetensors")
    (alpha,) = {layer.alpha for layer in weights.layers.values()}
    assert alpha == pytest.approx(2.0 * 2**0.5)


def test_groups_of_the_optimizer_follow_the_rates(tmp_path, config):
    session = _session(tmp_path, config.changed(MIXED))
    groups = session.state.optimizer.param_groups
    # The part's own rate first, so that it is the one that is shown.
    assert [group["initial_lr"] for group in groups] == [1e-3, 3e-3, 5e-5]
    layers = session.state.injected.layers
    sizes = [sum(tensor.numel() for tensor in group["params"]) for group in groups]
    up = [layer for (_, name), layer in layers.items() if "up_blocks" in name]
    assert sizes[1] == sum(layer.down.numel() + layer.up.numel() for layer in up)
    assert sum(sizes) == sum(tensor.numel() for tensor in session.state.injected.parameters())


def test_one_rate_for_all_is_asked_of_optimizers_that_find_their_own(tmp_path, config):
    rates = {"optimizer.text_encoder_lr": 0.0, "optimizer.block_lr": {"mid_block": 5e-4}}
    with pytest.raises(ConfigError, match=r"Prodigy works with one learning rate.*optimizer\.block_lr"):
        _session(tmp_path, config.changed({"optimizer.name": "prodigy", **rates}))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_lora_plus_trains_the_second_matrix_at_a_multiple_of_the_rate(tmp_path, config, optimizer):
    changes = {
        "optimizer.name": optimizer,
        "train.steps": 1,
        "optimizer.warmup": 0.0,
        "optimizer.max_grad_norm": 0.0,
    }
    changes |= {"optimizer.lr": 1e-2, "optimizer.text_encoder_lr": 1e-3}
    ups = []
    for number, ratio in enumerate((1.0, 8.0)):
        run = _run(tmp_path, config.changed({**changes, "optimizer.lora_plus": ratio}), f"r{number}")
        _trained(run)
        kept = load_adapter(run.checkpoint(1) / "adapter.safetensors", FAMILIES["tiny"])
        ups.append([layer.up for layer in kept.layers.values()])
    # The first matrix has no gradient at the start, where the second is zero.
    for one, eight in zip(*ups, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(eight, 8 * one, rtol=1e-4, atol=1e-9)


def test_lora_plus_goes_on_as_if_unbroken(tmp_path, config):
    config = config.changed({"optimizer.lora_plus": 4.0})
    whole, broken = (_run(tmp_path, config, name) for name in ("whole", "broken"))
    _trained(whole)

    def stop(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == 2:
            broken.request("stop")

    _trained(broken, stop)
    assert broken.checkpoint_steps() == [1, 2]
    _trained(broken)
    for name in ("adapter", "optimizer"):
        files = [load_file(run.checkpoint(STEPS) / f"{name}.safetensors") for run in (whole, broken)]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@pytest.mark.parametrize("targets", ["style", "subject"])
def test_presets_of_blocks_train_the_unet_alone_and_say_so(tmp_path, config, targets):
    run = _run(tmp_path, config.changed({"adapter.targets": targets, "train.steps": 1}), "r")
    _trained(run)
    weights = load_adapter(run.exports / "r.safetensors", FAMILIES["tiny"])
    pattern = re.compile(getattr(FAMILIES["tiny"], f"{targets}_blocks"))
    assert weights.parts() == ["unet"]
    assert all(pattern.fullmatch(name) for _, name in weights.layers)
    assert any("ff.net" in name for _, name in weights.layers)
    assert any(
        f"adapter.targets = {targets} names no layer of the text encoder" in note for note in _told(run)
    )


def test_a_rate_for_an_encoder_that_is_not_there_is_told(tmp_path, config):
    session = _session(tmp_path, config.changed({"optimizer.text_encoder_2_lr": 1e-4}))
    assert session.notes == [
        "optimizer.text_encoder_2_lr has no effect: the Embedded tiny base has one text encoder."
    ]


def test_convolutions_are_trained(tmp_path, config):
    run = _run(tmp_path, config.changed({"adapter.targets": "locon", "train.steps": 1}), "r")
    _trained(run)
    layers = load_adapter(run.exports / "r.safetensors", FAMILIES["tiny"]).layers
    convolutions = {key: w for key, w in layers.items() if w.down.dim() == 4 and w.down.shape[-1] == 3}
    assert any("downsamplers" in name for _, name in convolutions)
    assert all(layer.up.abs().max() > 0 for layer in convolutions.values())


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """A LoRA of rank 3 for the embedded base, as another tool might have written it."""
    base = load_base("demo", torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    injected = inject(base.modules, ["unet", "text_encoder"], KOHYA, LoraSpec(3, 1.5), 0)
    with torch.no_grad():
        for tensor in injected.parameters():
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    layers = adapter_weights(injected).layers
    path = tmp_path_factory.mktemp("earlier") / "earlier.safetensors"
    save_adapter(AdapterWeights(layers), path, FAMILIES["tiny"])
    return path


def _outputs(base, text) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        context = text.context
        return context, base.denoiser(latents, torch.tensor([300]), context).sample


@pytest.mark.parametrize("rank", [3, 6])
def test_a_run_starts_as_the_file_that_it_continues(tmp_path, config, earlier, rank):
    changes = {"adapter.init": str(earlier), "adapter.targets": "kohya", "adapter.rank": rank}
    session = _session(tmp_path, config.changed(changes))
    assert session.notes == []
    base = session.state.base
    for module in base.modules.values():
        module.eval()
    with torch.no_grad():
        mine = _outputs(base, encode_prompt(base, ["dot"]))
    merged = load_base("demo", torch.device("cpu"), torch.float32)
    with torch.no_grad():
        plain = _outputs(merged, encode_prompt(merged, ["dot"]))
    Merger(merged.modules).apply([LoadedLora(load_adapter(earlier, merged.family))])
    with torch.no_grad():
        theirs = _outputs(merged, encode_prompt(merged, ["dot"]))
    for one, other, without in zip(mine, theirs, plain, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5
        assert float((one - without).norm() / without.norm()) > 1e-3


def test_the_first_sample_of_a_continued_run_is_still_the_bases(tmp_path, config, earlier):
    config = config.changed({"sample.every": 1, "train.steps": 1, "adapter.targets": "kohya"})
    fresh = _run(tmp_path, config, "fresh")
    continued = _run(tmp_path, config.changed({"adapter.init": str(earlier)}), "continued")
    seen = []
    for run in (fresh, continued):
        _trained(run)
        pictures = []
        for step in (0, 1):
            with Image.open(run.previews / f"step-{step:06d}-0.png") as image:
                pictures.append(np.asarray(image).copy())
        seen.append(pictures)
    assert np.array_equal(seen[0][0], seen[1][0])
    assert not np.array_equal(seen[0][1], seen[1][1])


def test_what_is_not_continued_is_told(tmp_path, config, earlier):
    file = tmp_path / "earlier.safetensors"
    tensors, metadata = read_tensors(earlier)
    file.write_bytes(serialised(tensors | {"bundle_emb.cat.clip_l": torch.ones(1, 4)}, metadata))
    run = _run(tmp_path, config.changed({"adapter.init": str(file), "train.steps": 1}), "r")
    _trained(run)
    notes = _told(run)
    told = "earlier.safetensors has new tokens that are not continued"
    assert f"{told}, as adapter.new_tokens does not name them: cat." in notes
    assert any("layers of earlier.safetensors have a higher rank than this run" in note for note in notes)
    assert any(re.match(r"\d+ of the \d+ layers of earlier\.safetensors are not continued", n) for n in notes)


def test_layers_with_a_rate_of_zero_stay_as_in_the_file(tmp_path, config, earlier):
    changes = {
        "adapter.init": str(earlier),
        "adapter.targets": "kohya",
        "adapter.rank": 3,
        "adapter.alpha": 1.5,
        "optimizer.block_lr": {"mid_block": 0.0},
        "train.steps": 2,
    }
    run = _run(tmp_path, config.changed(changes), "r")
    _trained(run)
    before, after = load_adapter(earlier), load_adapter(run.checkpoint(2) / "adapter.safetensors")
    assert before.layers.keys() == after.layers.keys()
    for key, layer in after.layers.items():
        assert torch.equal(layer.up, before.layers[key].up) == ("mid_block" in key[1])


def test_a_file_that_has_changed_since_the_start_is_named(tmp_path, config, earlier):
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(earlier.read_bytes())
    config = config.changed({"adapter.init": str(copy), "adapter.targets": "kohya"})
    run = _run(tmp_path, config, "r")
    plan = RuntimePlan.of(run, config)
    prepare(run, config, plan, lambda *_: None)
    weights = load_adapter(copy)
    for layer in weights.layers.values():
        layer.up.mul_(2)
    save_adapter(weights, copy, FAMILIES["tiny"])
    with pytest.raises(RunError, match=r"the LoRA mine\.safetensors that it continues"):
        prepare(run, config, plan, lambda *_: None)
    prepare(run, config, plan, lambda *_: None, accept_changes=True)
    copy.unlink()
    with pytest.raises(RunError, match=r"the LoRA mine\.safetensors that it continues"):
        prepare(run, config, plan, lambda *_: None)


def test_a_file_that_cannot_be_continued_is_a_sentence(tmp_path, config, earlier):
    other = tmp_path / "other.safetensors"
    save_adapter(load_adapter(earlier), other, FAMILIES["sd15"])
    for number, (file, named) in enumerate(
        ((other, "Stable Diffusion 1.x"), (tmp_path / "no.safetensors", "does not exist"))
    ):
        with pytest.raises(AdapterFileError, match=named):
            _session(tmp_path, config.changed({"adapter.init": str(file)}), f"r{number}")
