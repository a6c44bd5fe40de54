"""The main job through the real command line, on the embedded base: train, look, measure, break off, go
on."""

import contextlib
import io
import json
import random
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from lora_core.__main__ import main
from lora_core.formats.io import load_adapter
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.header import read_header
from lora_core.runs import events
from lora_core.runs.events import read_events
from lora_core.runs.folder import RunFolder
from lora_core.system.files import DEMO_BASE
from lora_core.train.trainer import Outcome, train
from tests.waiting import PATIENCE, wait_for
from tests.warm import program

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
SETTINGS = [
    "adapter.rank=4", "adapter.alpha=2", "train.batch_size=2", f"train.steps={STEPS}", "train.resolution=64",
    "train.precision=fp32", "optimizer.lr=0.003", "dataset.flip=true", "dataset.trigger=blob",
    "adapter.dropout=0.1", "validation.pictures=2", "validation.every=4", "validation.draws_per_image=2",
    "validation.max_time_share=0",
    "sample.every=6", "sample.steps=2", "save.every=2", "save.keep_last=2",
]  # fmt: skip


def draw_pictures(folder: Path) -> Path:
    folder.mkdir()
    draw = random.Random(0)
    for number in range(6):
        image = Image.new("RGB", (80, 64 + 8 * (number % 2)), tuple(draw.randrange(256) for _ in range(3)))
        x, y = draw.randrange(40), draw.randrange(30)
        ImageDraw.Draw(image).ellipse(
            (x, y, x + 25, y + 25), fill=tuple(draw.randrange(256) for _ in range(3))
        )
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a round thing, number {number}", encoding="utf-8")
    return folder


def said(*words: object) -> str:
    """What a verb says on stdout; it must succeed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        assert main([str(word) for word in words]) == 0
    return out.getvalue()


def document(*words: object) -> Any:
    return json.loads(said(*words, "--json"))


def train_words(home: Path, pictures: Path, name: str, *more: str) -> list[object]:
    settings = [word for pair in (*SETTINGS, *more) for word in ("--set", pair)]
    return ["train", pictures, "--name", name, "--workspace", home, *settings]


@dataclass(frozen=True)
class Trained:
    """A finished run, and what its command said."""

    home: Path
    pictures: Path
    run: RunFolder
    lines: list[str]

    @property
    def export(self) -> Path:
        return self.run.exports / "first.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp("home ü")
    pictures = draw_pictures(home / "pictures")
    lines = said(*train_words(home, pictures, "first")).splitlines()
    return Trained(home, pictures, RunFolder.open(home / "runs" / "first"), lines)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float64)


def drawn(trained: Trained, name: str, *more: object) -> Path:
    out = trained.home / f"{name}.png"
    how = [
        "--prompt",
        "blob, a round thing",
        "--steps",
        "2",
        "--seed",
        "3",
        "--precision",
        "fp32",
        "--out",
        out,
    ]
    assert said("generate", *how, *more) == f"{out}\n"
    return out


def test_a_run_tells_its_story(trained: Trained) -> None:
    story = read_events(trained.run.events_file)[0]
    kinds = [event.kind for event in story]
    assert [e.step for e in story if isinstance(e, events.StepDone)] == list(range(1, STEPS + 1))
    assert [e.step for e in story if isinstance(e, events.Validated)] == [4, 8, 12]
    assert [e.step for e in story if isinstance(e, events.PreviewDone)] == [0, 6, 12]
    assert [e.step for e in story if isinstance(e, events.CheckpointDone)] == list(range(2, STEPS + 1, 2))
    assert kinds[0] == "Started"
    assert kinds[-1] == "Finished"
    assert "Failed" not in kinds
    for event in story:
        if isinstance(event, events.PreviewDone):
            assert all((trained.run.path / file).is_file() for file in event.files)
    assert trained.lines[-1] == str(trained.export)
    assert any(f"step {STEPS} of {STEPS}" in line for line in trained.lines)


def test_what_a_run_leaves_behind(trained: Trained) -> None:
    best = trained.run.progress().best_step
    assert trained.run.checkpoint_steps() == sorted({10, 12, *([best] if best else [])})
    beside = {f"first{end}" for end in (".safetensors", ".json", ".md", ".preview.png")}
    assert {path.name for path in trained.run.exports.iterdir()} == beside
    # The last sample that was drawn, and not the base's.
    newest = trained.run.path / "previews" / f"step-{STEPS:06d}-0.png"
    assert (trained.run.exports / "first.preview.png").read_bytes() == newest.read_bytes()
    thumbnail = read_header(trained.export).metadata["modelspec.thumbnail"]
    assert thumbnail.startswith("data:image/jpeg;base64,")
    assert [path for path in trained.home.rglob(".*") if path.suffix in (".tmp", ".draft", ".making")] == []
    assert not trained.run.process_file.exists()
    checkpoint = load_adapter(trained.run.checkpoint(STEPS) / "adapter.safetensors", FAMILIES["tiny"])
    for key, layer in load_adapter(trained.export).layers.items():
        assert torch.equal(layer.down, checkpoint.layers[key].down.half())
        assert torch.equal(layer.up, checkpoint.layers[key].up.half())


def test_runs_as_json(trained: Trained) -> None:
    row = next(r for r in document("runs", "--workspace", trained.home) if r["name"] == "first")
    assert set(row) == {"name", "path", "status", "step", "steps", "loss", "best_step", "reason"}
    assert (row["status"], row["step"], row["steps"]) == ("done", STEPS, STEPS)
    assert Path(row["path"]) == trained.run.path


def test_inspect_as_json(trained: Trained) -> None:
    report = document("inspect", trained.export)
    promised = "family format kind ranks alphas modules parameters bytes sha256 autov3 hash_matches metadata"
    assert set(promised.split()) <= set(report)
    assert (report["family"], report["format"], report["ranks"], report["alphas"]) == (
        "tiny",
        "kohya",
        [4],
        [2.0],
    )
    assert report["hash_matches"] is True
    assert report["metadata"]["ss_base_model_version"] == "easel_tiny"
    assert report["bytes"] == trained.export.stat().st_size


def test_there_and_back_again_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    said("convert", trained.export, tmp_path / "d.safetensors", "--to", "diffusers")
    said("convert", tmp_path / "d.safetensors", tmp_path / "k.safetensors", "--to", "kohya")
    before, after = load_file(trained.export), load_file(tmp_path / "k.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


def test_strength_zero_is_the_base_and_more_is_more(trained: Trained) -> None:
    base = pixels(drawn(trained, "base"))
    assert np.array_equal(pixels(drawn(trained, "zero", "--lora", f"{trained.export}:0")), base)
    changes = [
        np.abs(pixels(drawn(trained, f"at-{s}", "--lora", f"{trained.export}:{s}")) - base).mean()
        for s in (0.25, 0.5, 1)
    ]
    assert 0 < changes[0] < changes[1] < changes[2]


def test_pictures_get_new_names_and_say_how_they_were_made(trained: Trained) -> None:
    words = ["generate", "--prompt", "a cat", "--steps", "1", "--count", "2", "--workspace", trained.home]
    files = [Path(line) for line in (said(*words) + said(*words)).splitlines()]
    assert len(set(files)) == 4
    assert all(file.parent == trained.home / "generated" for file in files)
    with Image.open(files[0]) as image:
        assert image.info["parameters"].startswith("a cat\nSteps: 1, Sampler: DDIM, CFG scale: 5, Seed: 0")


def test_validation_at_strength_zero_gains_exactly_nothing(trained: Trained) -> None:
    words = ["validate", "--dataset", trained.pictures, "--triples", "2", "--workspace", trained.home]
    zero = document(*words, "--lora", f"{trained.export}:0")
    promised = {"gain", "standard_error", "base_loss", "adapted_loss", "triples", "bands", "strength"}
    assert promised <= set(zero)
    assert (zero["gain"], zero["standard_error"], zero["strength"]) == (0.0, 0.0, 0.0)
    assert zero["triples"] == 12
    assert all(band["gain"] == 0.0 for band in zero["bands"])
    one = document(*words, "--lora", trained.export)
    assert one["base_loss"] == zero["base_loss"]
    assert one["gain"] == pytest.approx(one["base_loss"] - one["adapted_loss"])
    assert one["gain"] != 0.0


def test_diffusers_loads_the_export_whole_and_draws_the_same(trained: Trained) -> None:
    ours = pixels(drawn(trained, "ours", "--lora", trained.export))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(
            DEMO_BASE, torch_dtype=torch.float32, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(str(trained.export.parent), weight_name=trained.export.name)
    adapted = {
        (part, path if part == "unet" or path.startswith("text_model.") else f"text_model.{path}")
        for part in ("unet", "text_encoder")
        for path, module in getattr(pipeline, part).named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapted == set(load_adapter(trained.export).layers)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    side = pipeline.unet.config.sample_size
    noise = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pipeline(
            "blob, a round thing", latents=noise, num_inference_steps=2, guidance_scale=5.0, output_type="np"
        ).images[0]
    assert ours.shape == theirs.shape
    assert np.abs(ours / 255 - theirs).mean() < 1 / 255


def started(words: list[object]) -> subprocess.Popen[str]:
    command = [program("engine"), "-m", "lora_core", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextlib.contextmanager
def under_way(words: list[object], run: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """A trainer that has done some steps of its own."""
    before = run.progress().step
    process = started(words)
    try:
        wait_for(lambda: run.status() == "running" and run.progress().step >= before + 2, process)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    out = process.communicate(timeout=PATIENCE)[0]
    return process.returncode, out.splitlines()


def test_pause_interrupt_and_stop_keep_the_work(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "runs" / "long")
    seldom = ["sample.every=0", "validation.every=0", "save.every=0"]
    words = train_words(tmp_path, trained.pictures, "long", "train.steps=5000", *seldom)
    with under_way(words, run) as process:
        # Nobody else may train it meanwhile.
        assert main(["resume", str(run.path)]) == 1
        assert "another process" in capsys.readouterr().err
        said("save", run.path)
        wait_for(lambda: run.checkpoint_steps() != [], process)
        said("pause", run.path)
        assert ended(process)[0] == 0
    assert run.status() == "paused"
    paused_at = run.progress().step
    assert run.checkpoint_steps()[-1] == paused_at
    assert not list(run.exports.iterdir())

    with under_way(["resume", run.path], run) as process:
        process.send_signal(signal.SIGINT)
        code, lines = ended(process)
    assert code == 130
    assert run.status() == "stopped"
    interrupted_at = run.progress().step
    assert interrupted_at > paused_at
    assert run.checkpoint_steps()[-1] == interrupted_at
    assert lines[-1] == str(run.exports / "long.safetensors")
    load_adapter(Path(lines[-1]), FAMILIES["tiny"])

    with under_way(["resume", run.path], run) as process:
        said("stop", run.path)
        code, lines = ended(process)
    assert code == 0
    assert document("runs", "--workspace", tmp_path)[0]["status"] == "stopped"
    assert lines[-1] == str(run.exports / "long.safetensors")
    steps = [e.step for e in read_events(run.events_file)[0] if isinstance(e, events.StepDone)]
    assert steps == list(range(1, len(steps) + 1))

    goal = run.progress().step + 2
    said("resume", run.path, "--steps", goal)
    assert (run.status(), run.progress().step) == ("done", goal)
    said("resume", run.path, "--steps", goal + 2)
    assert (run.status(), run.progress().step) == ("done", goal + 2)
    # A finished run has nothing to do; it names its file again.
    assert said("resume", run.path) == f"{run.exports / 'long.safetensors'}\n"


def trained_here(run: RunFolder, on_event: Callable[[events.Event], None]) -> Outcome:
    with run.hold(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.request("resume")
        return train(run, None, on_event)


def test_a_stop_before_the_first_step_of_a_resume_exports_what_there_is(
    trained: Trained, tmp_path: Path
) -> None:
    config = trained.run.config().changed({"name": "short", "train.steps": 20, "sample.every": 0})
    run = RunFolder.create(tmp_path / "runs" / "short", config)

    def ask(do: str, kind: type[events.Event]) -> Callable[[events.Event], None]:
        def on_event(event: events.Event) -> None:
            if isinstance(event, kind):
                run.request(do)

        return on_event

    assert trained_here(run, ask("stop", events.Preparing)) == Outcome("stopped")
    assert (run.status(), run.progress().export) == ("stopped", "")
    assert trained_here(run, ask("pause", events.StepDone)).status == "paused"
    assert run.checkpoint_steps() == [1]
    outcome = trained_here(run, ask("stop", events.Preparing))
    assert outcome == Outcome("stopped", run.exports / "short.safetensors")
    assert run.progress().export == "export/short.safetensors"
    assert load_adapter(run.exports / "short.safetensors", FAMILIES["tiny"]).layers


def ended_or_told(process: subprocess.Popen[str], run: RunFolder, events_told: int) -> bool:
    return process.poll() is not None or len(read_events(run.events_file)[0]) >= events_told


def test_sigkill_at_any_moment_costs_no_bit(trained: Trained, tmp_path: Path) -> None:
    """An unbroken run and one that was killed three times end in the same adapter, bit for bit."""
    run = RunFolder(tmp_path / "runs" / "killed")
    words = train_words(tmp_path, trained.pictures, "killed")
    draw = random.Random()
    in_all = len(read_events(trained.run.events_file)[0])
    moments = [draw.randrange(1, 4), draw.randrange(5, in_all // 2), draw.randrange(in_all // 2, in_all)]
    told = []
    for moment in moments:
        process = started(words)
        wait = draw.uniform(0, 0.1)
        try:
            wait_for(partial(ended_or_told, process, run, moment))
            time.sleep(wait)
        finally:
            process.kill()
            process.communicate()
        story = read_events(run.events_file)[0]
        told.append((moment, wait, story[-1].kind, story[-1].step))
        for file in run.path.rglob("*.safetensors"):
            load_adapter(file) if file.name.startswith("adapter") else load_file(file)
        words = ["resume", run.path]
    said("resume", run.path)
    assert run.status() == "done", told
    assert run.plan_file.read_text() == trained.run.plan_file.read_text()
    whole, broken = load_file(trained.export), load_file(run.exports / "killed.safetensors")
    assert whole.keys() == broken.keys()
    assert [n for n in whole if whole[n].numpy().tobytes() != broken[n].numpy().tobytes()] == [], told
    assert [path for path in run.path.rglob(".*") if path.suffix in (".tmp", ".draft", ".making")] == []


def test_a_run_of_the_unet_alone_in_another_shape(trained: Trained, tmp_path: Path) -> None:
    """Captions are encoded once, gradients over several batches, activations twice: other paths, same
    story."""
    words = train_words(
        tmp_path, trained.pictures, "unet", "train.steps=2", "optimizer.text_encoder_lr=0",
        "train.gradient_accumulation_steps=2",
        "train.gradient_checkpointing=true", "sample.every=0", "adapter.targets=kohya",
        "optimizer.name=adafactor",
    )  # fmt: skip
    export = Path(said(*words).splitlines()[-1])
    assert load_adapter(export, FAMILIES["tiny"]).parts() == ["unet"]
