"""Pre-flight: each problem alone, all at once, and none where all is well."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_core.data.dataset import open_dataset
from lora_core.errors import RunError
from lora_core.model_files import sizes
from lora_core.model_files.detect import read_base_facts
from lora_core.model_files.sizes import count_base_parameters
from lora_core.model_files.starting_settings import preset, preset_names
from lora_core.runs.costs import num_rounds, seconds_between_steps
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.runs.preflight import (
    RunProblem,
    caption_bytes,
    preflight,
    rate_problems,
    require_none_blocking,
)
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import OPTIMIZERS
from lora_core.system import files as disk_space
from lora_core.system.files import DEMO_BASE

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"optimizer.text_encoder_lr": 1e-4}
LATE = {"optimizer.stop_text_encoder_at": 0.5, "optimizer.text_encoder_lr": 0.0}
ZWX = {"adapter.new_tokens": ["square = dot"]}
EPOCH = {"validation.every_epochs": 1}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"square number {number}", encoding="utf-8")
    return RunConfig().changed(preset("demo") | {"dataset.path": str(folder), "name": "mine"})


def found(config: RunConfig, home: Path, card: int | None = None, **changes: object) -> list[RunProblem]:
    changed = config.changed({name.replace("__", "."): value for name, value in changes.items()})
    return preflight(changed, home, card=lambda: card)


def kinds(problems: list[RunProblem]) -> list[tuple[str, bool]]:
    return [(problem.kind, problem.blocking) for problem in problems]


def adapter_file(path: Path, version: str) -> Path:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, path, {"ss_base_model_version": version})
    return path


def test_nothing_is_wrong_with_the_demo_and_the_presets(config: RunConfig, tmp_path: Path) -> None:
    assert found(config, tmp_path) == []
    assert preflight(RunConfig().changed(preset("demo")), tmp_path, card=lambda: None) == []
    for name in preset_names():
        assert rate_problems(RunConfig().changed(preset(name)), None) == []
        slider = {"slider.positive": "old", "slider.negative": "young"} if "slider" in name else {}
        said = preflight(RunConfig().changed(preset(name) | slider), tmp_path, card=lambda: None)
        assert "unused" not in [one.kind for one in said]


def test_it_needs_no_torch() -> None:
    code = "import sys, lora_core.runs.preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_all_problems_at_once_those_that_block_first(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "0.png").write_bytes(b"no image")
    (tmp_path / "pictures" / "1.txt").write_text("very " * 200, encoding="utf-8")
    problems = found(
        config, tmp_path, validation__pictures=2, optimizer__lr=2.0, model__vae=str(tmp_path / "none"),
        adapter__init=str(tmp_path / "none.safetensors"), adapter__targets="style",
        optimizer__text_encoder_lr=0.0,
    )  # fmt: skip
    assert kinds(problems) == [
        ("picture", True),
        ("validation", True),
        ("vae", True),
        ("adapter", True),
        ("caption", False),
        ("rate", False),
    ]
    with pytest.raises(RunError) as refused:
        require_none_blocking(problems)
    assert all(problem.sentence in str(refused.value) for problem in problems if problem.blocking)
    assert not any(problem.sentence in str(refused.value) for problem in problems if not problem.blocking)
    assert all(problem.sentence.endswith((".", "!")) for problem in problems)


def test_base(config: RunConfig, tmp_path: Path) -> None:
    (missing,) = found(config, tmp_path, model__base=str(tmp_path / "no-base"))
    assert (missing.kind, missing.blocking) == ("base", True)
    assert "no-base" in missing.sentence
    # What the hub holds is fetched by the run.
    (away,) = found(config, tmp_path, model__base="nobody/no-such-model")
    assert (away.kind, away.blocking) == ("base", False)
    assert "downloaded when the run starts" in away.sentence


@pytest.mark.skipif(os.name == "nt", reason="no pipes there")
@pytest.mark.parametrize("setting", ["model.base", "model.vae", "adapter.init"])
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a"])
def test_pipes_are_named_and_never_opened(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, name: str
) -> None:
    (tmp_path / "models").mkdir()
    os.mkfifo(tmp_path / "models" / name)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "models" / name), f"models/{name}"):
        changed = config.changed({setting: path})
        stops = [one.sentence for one in preflight(changed, tmp_path, card=lambda: None) if one.blocking]
        assert len(stops) == 1
        assert "is not a regular file" in stops[0]
        assert "does not exist" not in stops[0]


@pytest.mark.skipif(os.name == "nt", reason="no pipes there")
def test_a_pipe_in_the_folder_of_a_base(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "base" / "unet").mkdir(parents=True)
    os.mkfifo(tmp_path / "base" / "unet" / "config.json")
    (problem,) = found(config, tmp_path, model__base=str(tmp_path / "base"))
    assert "not a regular file" in problem.sentence


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "lacks vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder/model.safetensors", "lacks text_encoder/model.safetensors"),
        ("text_encoder/config.json", "lacks text_encoder/config.json"),
        ("unet/config.json", "unet/config.json"),
    ],
)
def test_a_base_that_is_not_whole(config: RunConfig, tmp_path: Path, file: str, words: str) -> None:
    base = tmp_path / "base"
    for path in DEMO_BASE.rglob("*"):
        if path.is_file() and path != DEMO_BASE / file and "make" not in path.parts:
            (base / path.relative_to(DEMO_BASE)).parent.mkdir(parents=True, exist_ok=True)
            (base / path.relative_to(DEMO_BASE)).symlink_to(path)
    (problem,) = found(config, tmp_path, model__base=str(base))
    assert problem.blocking
    assert words in problem.sentence


def test_how_many_numbers_a_base_is() -> None:
    """Against torch, which counts the tensors themselves."""
    from safetensors.torch import load_file

    facts = read_base_facts("demo")
    files = list(DEMO_BASE.glob("*/*.safetensors"))
    assert len(files) == 3
    assert count_base_parameters(facts) == sum(t.numel() for file in files for t in load_file(file).values())


def test_the_lora_to_go_on_with_is_for_this_family(config: RunConfig, tmp_path: Path) -> None:
    other = adapter_file(tmp_path / "other.safetensors", "sd_v1")
    (problem,) = found(config, tmp_path, adapter__init=str(other))
    assert (problem.kind, problem.blocking) == ("adapter", True)
    assert "is for Stable Diffusion 1.x, and the base is Embedded tiny base" in problem.sentence
    for version in ("easel_tiny", "", "of a tool that nobody knows"):
        fitting = adapter_file(tmp_path / "fitting.safetensors", version)
        assert found(config, tmp_path, adapter__init=str(fitting)) == []
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(other.read_bytes()[:-2])
    assert "cut short" in found(config, tmp_path, adapter__init=str(cut))[0].sentence


@pytest.mark.parametrize(
    ("change", "module", "package"),
    [
        ({"optimizer__name": "lion"}, "lion_pytorch", "lion-pytorch"),
        ({"optimizer__name": "prodigy"}, "prodigyopt", "prodigyopt"),
        ({"save__tensorboard": True}, "tensorboard", "tensorboard"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    change: dict[str, object],
    module: str,
    package: str,
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "package" not in [kind for kind, _ in kinds(found(config, tmp_path, **change))]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == module else find(name, *more)
    )
    (missing,) = [one for one in found(config, tmp_path, **change) if one.kind == "package"]
    assert missing.blocking
    assert f"{sys.executable} -m pip install {package}" in missing.sentence


def test_vae(config: RunConfig, tmp_path: Path) -> None:
    assert found(config, tmp_path, model__vae=str(DEMO_BASE / "vae")) == []
    page = tmp_path / "vae.safetensors"
    page.write_text("<!DOCTYPE html><html>Not found</html>")
    assert "web page" in found(config, tmp_path, model__vae=str(page))[0].sentence
    assert "lacks its config.json" in found(config, tmp_path, model__vae=str(tmp_path))[0].sentence


def test_captions(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "2.txt").write_text("a cat, " * 30 + "the end of it", encoding="utf-8")
    (problem,) = found(config, tmp_path)
    assert (problem.kind, problem.blocking) == ("caption", False)
    assert problem.sentence.startswith("1 caption is longer than the 75 tokens that are read; of 2.png, “")
    assert found(config, tmp_path, train__max_token_length=150) == []
    # The trigger takes tokens too: 72 of the caption's own fit, and 4 more do not.
    (tmp_path / "pictures" / "2.txt").write_text("cat " * 72, encoding="utf-8")
    assert found(config, tmp_path) == []
    assert kinds(found(config, tmp_path, dataset__trigger="a red big dog and fish")) == [("caption", False)]


def test_rates(config: RunConfig, tmp_path: Path) -> None:
    assert all(row.rates[0] < row.rates[1] for row in OPTIMIZERS.values())
    (high,) = found(config, tmp_path, optimizer__lr=0.02, adapter__alpha=4.0, adapter__rank=8)
    assert "optimizer.lr x alpha / rank = 0.01 is much for AdamW" in high.sentence
    (low,) = found(config, tmp_path, optimizer__lr=1e-4, adapter__alpha=0.01, optimizer__text_encoder_lr=0.0)
    assert "is little for AdamW" in low.sentence
    # rsLoRA divides by the root of the rank: 0.02 x 1 / 4.
    (root,) = found(
        config, tmp_path, optimizer__lr=0.02, adapter__alpha=1.0, adapter__rank=16, adapter__rslora=True
    )
    assert "= 0.005 is much" in root.sentence
    assert found(config, tmp_path, optimizer__lr=0.02, adapter__alpha=1.0, adapter__rank=16) == []
    same = {"optimizer__name": "prodigy", "optimizer__lr": 1.0}
    assert found(config, tmp_path, optimizer__text_encoder_lr=1.0, **same) == []
    for other in ({"optimizer__text_encoder_lr": 0.5}, {"optimizer__block_lr": {"mid": 0.5}}):
        (two,) = found(config, tmp_path, **{"optimizer__text_encoder_lr": 0.0, **same, **other})
        assert (two.kind, two.blocking) == ("rate", True)
        assert "Prodigy works with one learning rate" in two.sentence
    assert (
        found(config, tmp_path, optimizer__block_lr={"mid": 0.0}, optimizer__text_encoder_lr=0.0, **same)
        == []
    )
    # One that finds its own rate is not scaled by alpha / rank.
    (tiny,) = found(
        config, tmp_path, optimizer__name="prodigy", optimizer__lr=1e-4, optimizer__text_encoder_lr=1e-4
    )[:1]
    assert "optimizer.lr = 0.0001 is little for Prodigy" in tiny.sentence
    (none,) = found(config, tmp_path, optimizer__lr=0.0, optimizer__text_encoder_lr=0.0)
    assert none.blocking
    assert (
        found(
            config,
            tmp_path,
            optimizer__lr=0.0,
            optimizer__text_encoder_lr=0.0,
            optimizer__block_lr={"mid": 1e-4},
        )
        == []
    )


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("adamw", {"weight_decay": 0.1, "betas": [0.9, 0.99], "amsgrad": True}, ""),
        (
            "adamw",
            {"weight_decays": 0.1},
            "'weight_decays', which AdamW does not take; did you mean weight_decay",
        ),
        ("adamw", {"rate": 1}, "which AdamW does not take; it takes betas, eps, weight_decay, amsgrad"),
        ("adamw", {"betas": 0.9}, "betas = 0.9, which should be a list of 2 numbers"),
        ("adamw", {"betas": [0.9, "x"]}, "should be a list of 2 numbers"),
        ("adamw", {"amsgrad": 1}, "amsgrad = 1, which should be true or false"),
        ("adamw", {"eps": True}, "eps = True, which should be a number"),
        ("sgd", {"lr": 1.0}, "cannot have lr: it is set by optimizer.lr"),
        ("sgd", {"maximize": True}, "cannot have maximize: it would train away from the images"),
        ("adamw", {"differentiable": True}, "cannot have differentiable"),
        ("adamw", {"maximize": False, "differentiable": False}, ""),
        ("adamw", {"betas": [0.9, 1.0]}, "betas = [0.9, 1.0], which should be from 0 to below 1"),
        ("adafactor", {"weight_decay": -1}, "weight_decay = -1, which should be 0 or more"),
        ("adafactor", {"eps": [1e-30, 1e-3]}, ""),
        ("prodigy", {"d_coef": 2.0}, ""),
        ("lion", {"d_coef": 2.0}, "which Lion does not take"),
        ("torch.optim:Adamax", {"betas": [0.9, 0.99]}, ""),
        ("torch.optim:Adamax", {"momentum": 0.9}, "which torch.optim:Adamax does not take"),
        ("torch.optim:Adamaxx", {}, "torch.optim has no Adamaxx; did you mean torch.optim:Adamax?"),
        ("torch.optim.adamax:Unheard", {}, "torch.optim.adamax has no Unheard."),
        ("pytorch_optimizer:Ranger", {}, ""),
    ],
)
def test_arguments_of_the_optimizer_are_checked_by_its_signature(
    name: str, args: dict[str, object], words: str, config: RunConfig, tmp_path: Path
) -> None:
    problems = found(config, tmp_path, optimizer__name=name, optimizer__args=args)
    problems = [one for one in problems if one.kind == "package"]
    assert bool(problems) == bool(words)
    assert all(one.blocking and words in one.sentence for one in problems)


def test_what_does_not_go_with_schedule_free(config: RunConfig, tmp_path: Path) -> None:
    own = {"optimizer__name": "adamw_schedule_free"}
    problems = found(config, tmp_path, **own, save__ema=0.9)
    assert any("averages the adapter itself; set save.ema to 0" in one.sentence for one in problems)
    problems = found(config, tmp_path, **own, optimizer__schedule="cosine")
    (note,) = [one for one in problems if one.kind == "rate"]
    assert "optimizer.schedule is cosine; set optimizer.schedule to constant" in note.sentence


def test_name_and_neighbours(config: RunConfig, tmp_path: Path) -> None:
    taken = RunFolder.create(runs_folder(tmp_path) / "mine", config)
    (problem,) = found(config, tmp_path)
    assert (problem.kind, problem.blocking) == ("name", True)
    assert "mine already exists" in problem.sentence
    with taken.hold():
        assert kinds(found(config, tmp_path, name="other")) == [("busy", False)]
    assert found(config, tmp_path, name="") == []
    assert kinds(found(config, tmp_path, name="a/b")) == [("name", True)]


Usage = namedtuple("Usage", "total used free")


def test_room_on_the_disk(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(size: int) -> None:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: Usage(10**12, 0, size))

    free(10**12)
    assert found(config, tmp_path) == []
    free(10**5)
    (full,) = found(config, tmp_path)
    assert (full.kind, full.blocking) == ("disk", True)
    assert "0.1 MB are free" in full.sentence
    # Rank 8 of the tiny base trains about a quarter of a million numbers, 12 bytes each in a checkpoint: some
    # checkpoints fit into 12 MB, but not all of the run.
    free(12 * 10**6)
    (short,) = found(config, tmp_path, save__keep_last=20)
    assert (short.kind, short.blocking) == ("disk", False)
    assert "save.keep_last" in short.sentence


def test_memory_is_a_note_and_says_that_it_is_rough(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=10**6))
    (problem,) = found(config, tmp_path)
    assert (problem.kind, problem.blocking) == ("memory", False)
    assert "a rough figure" in problem.sentence
    assert "bf16" in problem.sentence
    # The card counts where there is one, and in half precision no advice is left.
    assert found(config, tmp_path, card=10**10) == []
    (small,) = found(config, tmp_path, card=10**6, train__precision="auto")
    assert "of graphics memory" in small.sentence
    assert "bf16" not in small.sentence


def test_a_dataset_that_was_read_is_not_read_again(config: RunConfig, tmp_path: Path) -> None:
    from lora_core.data.dataset import scan

    dataset = scan(tmp_path / "pictures")
    nowhere = config.changed({"dataset.path": str(tmp_path / "gone")})
    assert preflight(nowhere, tmp_path, dataset, card=lambda: None) == []
    assert kinds(preflight(nowhere, tmp_path, card=lambda: None)) == [("dataset", True)]
    chosen = [dataclasses.replace(r, held_out=number > 0) for number, r in enumerate(dataset.records)]
    by_hand = preflight(nowhere, tmp_path, dataclasses.replace(dataset, records=chosen), card=lambda: None)
    assert kinds(by_hand) == [("validation", True)]
    assert "choose fewer of them by hand" in by_hand[0].sentence
    empty = dataclasses.replace(dataset, records=[])
    assert kinds(preflight(nowhere, tmp_path, empty, card=lambda: None)) == [("dataset", True)]


def test_captions_that_vary_are_counted_up_to_their_limit(config: RunConfig, tmp_path: Path) -> None:
    records, facts = open_dataset(config.dataset.path, tmp_path).records, read_base_facts("demo")
    # A file of the embedded base: 77 tokens, 128 channels, fp32; a block of the file system more.
    one = 77 * 128 * 4 + 4096

    def counted(**changes: object) -> tuple[int, int]:
        own = {name.replace("__", "."): value for name, value in changes.items()}
        frozen = {"optimizer.text_encoder_lr": 0.0, "train.batch_size": 2, "train.steps": 10}
        return caption_bytes(records, config.changed({**frozen, **own}), facts)

    assert counted()[1] == 0
    assert len(records) * one <= counted()[0] <= 4 * len(records) * one
    assert counted(dataset__shuffle_tags=True)[1] == 20 * one
    assert counted(dataset__shuffle_tags=True, train__gradient_accumulation_steps=3)[1] == 60 * one
    assert counted(dataset__tag_dropout=0.1, train__steps=10**6) == (counted()[0], sizes.DRAWN_CAPTIONS_BYTES)
    assert counted(dataset__shuffle_tags=True, optimizer__text_encoder_lr=1e-4) == (0, 0)


def test_captions_in_memory_count_on_a_processor(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffled = {"optimizer__text_encoder_lr": 0.0, "dataset__shuffle_tags": True, "train__steps": 10**5}
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=200 * 2**20))
    assert "memory" not in [kind for kind, _ in kinds(found(config, tmp_path))]
    assert "memory" in [kind for kind, _ in kinds(found(config, tmp_path, **shuffled))]
    assert "memory" not in [kind for kind, _ in kinds(found(config, tmp_path, card=200 * 2**20, **shuffled))]


def test_a_loss_that_leaves_out_the_last_timestep_is_said(config: RunConfig, tmp_path: Path) -> None:
    # The embedded base predicts velocity and has zero terminal SNR.
    (one,) = found(config, tmp_path, loss__min_snr=5.0)
    assert (one.kind, one.blocking) == ("loss", False)
    assert "loss.min_snr = 5 gives the last timestep no weight" in one.sentence
    assert found(config, tmp_path, loss__min_snr=5.0, model__zero_terminal_snr="off") == []
    assert found(config, tmp_path, loss__min_snr=0) == found(config, tmp_path, loss__min_snr="auto") == []


@pytest.mark.parametrize(
    ("changes", "words", "blocking"),
    [
        (
            {"loss__timestep_mean": 1.0},
            "has no effect while loss.timesteps is uniform",
            False,
        ),
        ({"loss__multires_discount": 0.5}, "has no effect while loss.multires_noise is 0", False),
        ({"loss__multires_noise": 6, "loss__noise_offset": 0.05}, "set one of them to 0", True),
        ({"loss__min_timestep": 500, "loss__max_timestep": 500}, "is not below loss.max_timestep", True),
        ({"loss__timesteps": "logit_normal", "loss__timestep_std": 0.5}, "", False),
    ],
)
def test_settings_of_the_loss_that_do_not_go_together(
    changes: dict[str, object], words: str, blocking: bool, config: RunConfig, tmp_path: Path
) -> None:
    problems = found(config, tmp_path, **changes)
    assert [(words in one.sentence, one.blocking) for one in problems] == [(True, blocking)] * bool(words)


def test_a_rank_of_convolutions_where_none_is_adapted_is_said(config: RunConfig, tmp_path: Path) -> None:
    (one,) = found(config, tmp_path, adapter__conv_rank=4, adapter__targets="attention")
    assert one.sentence.startswith("adapter.conv_rank has no effect: adapter.targets = attention has")
    assert found(config, tmp_path, adapter__conv_rank=4, adapter__targets="locon") == []


@pytest.mark.parametrize("table", ["adapter__block_ranks", "adapter__block_alphas", "optimizer__block_lr"])
def test_a_pattern_that_matches_no_layer_stops_before_the_start(
    config: RunConfig, tmp_path: Path, table: str
) -> None:
    """One of a part that is not trained matches none either, but a rate of its own trains its layers."""
    patterns = ["mid_blok"] if table == "optimizer__block_lr" else ["mid_blok", "text_encoder.*mlp"]
    values = {table: {"mid_blok": 1, "unet": 2, "text_encoder.*mlp": 1}}
    problems = found(config, tmp_path, optimizer__text_encoder_lr=0.0, **values)
    assert kinds(problems) == [("targets", True)] * len(patterns)
    for pattern, one in zip(patterns, problems, strict=True):
        words = f"{table.replace('__', '.')} has the pattern {pattern!r}, which matches no adapted layer"
        assert words in one.sentence


def test_a_text_encoder_whose_trained_layers_are_all_skipped_blocks(
    config: RunConfig, tmp_path: Path
) -> None:
    """The embedded base has two; skipping both reads the token embeddings, which no layer changes."""
    assert found(config, tmp_path, train__clip_skip=2) == []
    (one,) = found(config, tmp_path, train__clip_skip=3)
    assert one.sentence.startswith("train.clip_skip = 3 skips all layers of the text encoder")
    assert one.blocking
    last = {"text_encoder.*layers.0": 0.0}
    assert kinds(found(config, tmp_path, train__clip_skip=2, optimizer__block_lr=last)) == [("targets", True)]
    assert found(config, tmp_path, train__clip_skip=3, optimizer__text_encoder_lr=0.0) == []


def test_layers_that_their_patterns_leave_out_are_not_forecast(config: RunConfig, tmp_path: Path) -> None:
    facts, unet = read_base_facts("demo"), config.changed({"optimizer.text_encoder_lr": 0.0})
    sizes_of = [
        sizes.export_bytes(facts, unet.changed({"optimizer.block_lr": rates}))
        for rates in ({}, {"mid_block": 0.0}, {"text_encoder": 1e-4})
    ]
    assert sizes_of[1] < sizes_of[0] < sizes_of[2]
    for table in ("adapter__block_ranks", "optimizer__block_lr"):
        (one,) = found(config, tmp_path, **{table: {"": 0}})
        assert (one.kind, one.blocking) == ("rate", True)
        assert one.sentence.startswith("Nothing would be trained")


def test_alpha_has_no_part_in_the_rate_of_an_oft(config: RunConfig, tmp_path: Path) -> None:
    """A scale of 64 is much for a LoRA at 3e-4, and nothing to an OFT; the forecast tells the same rate."""
    high = {
        "adapter__rank": 4,
        "adapter__alpha": 256.0,
        "optimizer__lr": 3e-4,
        "optimizer__text_encoder_lr": 0.0,
    }
    (one,) = found(config, tmp_path, **high)
    assert "x alpha / rank = 0.0192 is much" in one.sentence
    assert "rate" not in [one.kind for one in found(config, tmp_path, **high, adapter__kind="oft")]
    assert config.changed({"adapter.kind": "oft", "adapter.rank": 4}).adapter.scale == 1.0


@pytest.mark.parametrize(
    ("changes", "why", "with_effect"),
    [
        ({"loss.huber_delta": 0.5}, "while loss.type is mse; it is for huber", {"loss.type": "huber"}),
        (
            {"adapter.conv_alpha": 2.0, "adapter.targets": "locon", "adapter.kind": "oft"},
            "with adapter.kind = oft, which has no alpha",
            {"adapter.kind": "lora"},
        ),
        (
            {"adapter.alpha": 1.0, "adapter.kind": "oft"},
            "with adapter.kind = oft, which has no alpha",
            {"adapter.kind": "lora", "optimizer.lr": 1e-3},
        ),
        (
            {"dataset.trigger": "sks", "dataset.caption_dropout": 1.0},
            "while dataset.caption_dropout is 1, which shows each image without its caption",
            {"dataset.caption_dropout": 0.9},
        ),
        (LATE, "while no text encoder is trained", TEXT),
        (LATE, "while no text encoder is trained", ZWX),
        (
            {**TEXT, "adapter.targets": "style"},
            "with adapter.targets = style, which names no layer of a text encoder",
            {"adapter.targets": "attention"},
        ),
        (
            {"optimizer.text_encoder_2_lr": 1e-4},
            "with this base: the Embedded tiny base has one text encoder",
            {"optimizer.text_encoder_2_lr": 0.0},
        ),
        ({"optimizer.token_lr": 1e-2}, "without adapter.new_tokens", ZWX),
        (
            {"dataset.keep_tags": 1},
            "without dataset.shuffle_tags or dataset.tag_dropout",
            {"dataset.tag_dropout": 0.1},
        ),
        (
            {"sample.negative_prompt": "blurred", "sample.cfg": 1.0},
            "without guidance: sample.cfg or --l is 1",
            {"sample.prompts": ["a dot", "a square --l 4"]},
        ),
        (
            {"sample.negative_prompt": "blurred", "sample.cfg": 5.0, "sample.prompts": ["a --l 1"]},
            "without guidance: sample.cfg or --l is 1",
            {"sample.prompts": ["a --l 1", "b"]},
        ),
        (
            {"sample.cfg_rescale": 0.5, "sample.cfg": 1.0},
            "without guidance: sample.cfg or --l is 1",
            {"sample.cfg": 2},
        ),
        ({"validation.patience": 2, "validation.every": 0}, "while validation.every is 0", EPOCH),
        (
            {"validation.draws_per_image": 2, "validation.pictures": 0},
            "while validation.pictures is 0",
            {"validation.pictures": 1},
        ),
        ({"save.keep_last": 5, "save.every": 0}, "while save.every is 0", {"save.every_epochs": 1}),
        (
            {"slider.guidance": 2.0},
            "without slider.positive and slider.negative, which make a slider",
            {"slider.guidance": 1.0},
        ),
    ],
)
def test_a_setting_without_effect_is_said(
    changes: dict[str, object], why: str, with_effect: dict[str, object], config: RunConfig, tmp_path: Path
) -> None:
    (one,) = found(config, tmp_path, **changes)
    assert (one.sentence, one.blocking) == (f"{next(iter(changes))} has no effect {why}.", False)
    assert [p for p in found(config, tmp_path, **changes | with_effect) if "no effect" in p.sentence] == []


def test_what_a_slider_makes_of_settings_of_images(config: RunConfig, tmp_path: Path) -> None:
    """It is trained at `train.resolution`, whatever sizes the images have."""
    slider = {"slider.positive": "old", "slider.negative": "young", "train.resolution": 64}
    problems = found(
        config, tmp_path, **slider, **{"dataset.resolutions": [64, 96], "validation.memorization": False}
    )
    said = " ".join(one.sentence for one in problems)
    assert "without images, so that" in said
    assert "train.resolution" not in said
    assert "validation.memorization has no effect for a slider" in said


def test_what_is_turned_off_has_not_to_have_an_effect(config: RunConfig, tmp_path: Path) -> None:
    off = {"validation.every": 0, "validation.patience": 0, "validation.forgetting": 0}
    assert found(config, tmp_path, **off) == []


def test_the_report_draws_noise_for_held_out_images_without_validation(
    config: RunConfig, tmp_path: Path
) -> None:
    draws = {"validation.every": 0, "validation.draws_per_image": 100}
    assert found(config, tmp_path, **draws, **{"validation.pictures": 1}) == []


def test_zero_terminal_snr_for_a_base_that_predicts_noise_blocks(config: RunConfig, tmp_path: Path) -> None:
    wrong = {"model__zero_terminal_snr": "on", "model__prediction": "epsilon"}
    (one,) = found(config, tmp_path, **wrong)
    assert (one.kind, one.blocking) == ("base", True)
    assert "predicts noise" in one.sentence


@pytest.mark.parametrize(("asked", "becomes"), [(7, 32), (60, 32), (32, 0), (0, 0)])
def test_a_resolution_that_is_rounded_is_said(
    config: RunConfig, tmp_path: Path, asked: int, becomes: int
) -> None:
    notes = [p for p in found(config, tmp_path, train__resolution=asked) if p.kind == "resolution"]
    assert bool(notes) == bool(becomes)
    for note in notes:
        assert note.sentence.startswith(f"train.resolution = {asked} becomes {becomes}: ")
        assert not note.blocking


def test_a_resolution_that_no_image_reaches_is_said(config: RunConfig, tmp_path: Path) -> None:
    (note,) = found(config, tmp_path, train__resolution=96)
    assert note.sentence.startswith("No image is as large as train.resolution = 96, and none is enlarged")
    assert not note.blocking


@pytest.mark.parametrize(("setting", "kind"), [("model__vae", "vae"), ("adapter__init", "adapter")])
def test_a_path_that_is_too_long_is_a_problem(
    config: RunConfig, tmp_path: Path, setting: str, kind: str
) -> None:
    (problem,) = found(config, tmp_path, **{setting: "a" * 100_000})
    assert (problem.kind, problem.blocking) == (kind, True)
    assert len(problem.sentence) < 500


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a cat --w 100", "--w in the sample prompt 'a cat --w 100' is not a multiple of 32; take 96, 128."),
        ("a cat --h 16", "take 32."),
        ("a cat --q 3", "--q in the sample prompt 'a cat --q 3' is not known"),
        ("a (cat:1.2.3)", "'1.2.3' of a prompt is not a number"),
        ("a cat --n [a:b:0.5]", "not supported"),
    ],
)
def test_a_sample_prompt_that_cannot_be_used_blocks(
    config: RunConfig, tmp_path: Path, line: str, words: str
) -> None:
    (problem,) = found(config, tmp_path, sample__prompts=["a dog --w 64", line])
    assert (problem.kind, problem.blocking) == ("sample", True)
    assert words in problem.sentence


def test_the_largest_sample_is_what_memory_and_time_are_counted_for(
    config: RunConfig, tmp_path: Path
) -> None:
    facts = read_base_facts("demo")
    small = config.changed({"sample.prompts": ["a"], "sample.steps": 10})
    large = config.changed({"sample.prompts": ["a", "b --w 512 --h 256 --s 20"], "sample.steps": 10})
    assert sizes.sample_pixels(large, facts.resolution) == [128 * 128, 512 * 256]
    assert sizes.preview_bytes(large) > sizes.preview_bytes(small.changed({"train.resolution": 128}))
    own, asked = (seconds_between_steps(one, 1.0, 1.0, 4) for one in (small, large))
    # 20 steps of eight times the pixels, beside 10 of one.
    sampling = num_rounds(small.train.steps, small.sample.every) * 10 / small.train.steps
    assert asked - own == pytest.approx(16 * sampling)
