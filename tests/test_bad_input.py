"""Everything that people get wrong, through the real command line: one sentence, exit code 1, nothing
lost."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app.preview.view import parse_infotext
from lora_core.__main__ import main
from lora_core.cli.terminal import show_result
from lora_core.data.captions import check_prompt
from lora_core.formats.io import save_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES
from lora_core.runs import events
from lora_core.runs.events import EventWriter
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import parse_new_tokens
from lora_core.system.files import DEMO_BASE
from tests.faults import Nursery
from tests.waiting import PATIENCE
from tests.warm import program

ROOT = Path(__file__).resolve().parents[1]
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with all that a command needs, as it should be: each case spoils one thing of it."""

    root: Path

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def lora(self) -> Path:
        return self.root / "good.safetensors"

    @property
    def run(self) -> Path:
        return self.workspace / "runs" / "mine"

    def copied_base(self) -> Path:
        # Linked, as weights are replaced here and never changed in place.
        shutil.copytree(DEMO_BASE, self.base, ignore=shutil.ignore_patterns("make"), copy_function=os.link)
        return self.base

    def text(self, name: str, content: str) -> Path:
        path = self.root / name
        path.write_text(content, encoding="utf-8")
        return path

    def train(self, *more: object, dataset: object = None) -> list[object]:
        where = self.pictures if dataset is None else dataset
        return ["train", where, "--name", "mine", "--workspace", self.workspace, *more]

    def generate(self, *more: object) -> list[object]:
        out = () if "--out" in more else ("--out", self.root / "out.png")
        return ["generate", "--prompt", "a red cat", "--steps", "1", *out, *more]


def adapter(width: int) -> AdapterWeights:
    layer = LayerWeights(torch.ones(2, width), torch.ones(96, 2), 2.0)
    return AdapterWeights({("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"): layer})


def draw(path: Path, color: str = "red", size: tuple[int, int] = (64, 64)) -> None:
    Image.new("RGB", size, color).save(path)
    path.with_suffix(".txt").write_text(f"a {color} square", encoding="utf-8")


@pytest.fixture(autouse=True)
def quiet_libraries() -> Iterator[None]:
    """As in a process of the command line, which quiets them before it imports them; here others came
    first."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    kept = of_diffusers.get_verbosity(), of_transformers.get_verbosity()
    of_diffusers.set_verbosity_error()
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    yield
    of_diffusers.set_verbosity(kept[0])
    of_transformers.set_verbosity(kept[1])
    of_transformers.enable_progress_bar()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.pictures.mkdir()
    for color in ("red", "green", "blue", "white"):
        draw(place.pictures / f"{color}.png", color)
    save_adapter(adapter(128), place.lora, FAMILIES["tiny"])
    return place


def settings(*pairs: str) -> Callable[[Place], list[object]]:
    return lambda place: place.train(*[word for pair in pairs for word in ("--set", pair)])


def missing_dataset(place: Place) -> list[object]:
    return place.train(dataset=place.root / "nowhere")


def no_pictures(place: Place) -> list[object]:
    for path in place.pictures.glob("*.png"):
        path.unlink()
    return place.train()


def text_as_png(place: Place) -> list[object]:
    (place.pictures / "notes.png").write_text("I am no image.")
    return place.train()


def truncated_jpeg(place: Place) -> list[object]:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(buffer, "JPEG")
    (place.pictures / "photo.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return place.train()


def one_pixel(place: Place) -> list[object]:
    draw(place.pictures / "dot.png", size=(1, 1))
    return place.train()


def empty_picture(place: Place) -> list[object]:
    (place.pictures / "nothing.png").write_bytes(b"")
    return place.train()


def caption_not_utf8(place: Place) -> list[object]:
    (place.pictures / "red.txt").write_bytes("ein grünes Haus".encode("latin-1"))
    return place.train()


def one_picture_to_train_on(place: Place) -> list[object]:
    return place.train("--set", "validation.pictures=3")


def zip_of(place: Place, name: str) -> Path:
    path = place.root / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(place.pictures / "red.png", name)
        archive.write(place.pictures / "blue.png", "blue.png")
    return path


def climbing_zip(place: Place) -> list[object]:
    return place.train(dataset=zip_of(place, "../../escaped.png"))


def truncated_zip(place: Place) -> list[object]:
    path = zip_of(place, "red.png")
    path.write_bytes(path.read_bytes()[:-60])
    return place.train(dataset=path)


def plain_file_as_dataset(place: Place) -> list[object]:
    return place.train(dataset=place.text("pictures.txt", "red.png"))


def missing_base(place: Place) -> list[object]:
    return place.train("--base", place.root / "no-base")


def base_lacks_a_file(place: Place) -> list[object]:
    (place.copied_base() / "text_encoder" / "model.safetensors").unlink()
    return place.train("--base", place.base)


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def base_with_broken_json(place: Place) -> list[object]:
    replaced(place.copied_base() / "unet" / "config.json", b'{"cross_attention_dim": 128')
    return place.train("--base", place.base)


def base_with_broken_vae_json(place: Place) -> list[object]:
    replaced(place.copied_base() / "vae" / "config.json", b"not json")
    return place.train("--base", place.base)


def base_cut_short(place: Place) -> list[object]:
    path = place.copied_base() / UNET_FILE
    replaced(path, path.read_bytes()[:100_000])
    return place.train("--base", place.base)


def base_without_a_tensor(place: Place) -> list[object]:
    path = place.copied_base() / UNET_FILE
    tensors = load_file(path)
    del tensors["conv_out.weight"]
    path.unlink()
    save_file(tensors, path)
    return place.train("--base", place.base)


def base_text_encoder_without_a_tensor(place: Place) -> list[object]:
    path = place.copied_base() / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.endswith("final_layer_norm.weight"))]
    path.unlink()
    save_file(tensors, path)
    return place.train("--base", place.base)


def base_of_width(value: object) -> Callable[[Place], list[object]]:
    def spoiled(place: Place) -> list[object]:
        path = place.copied_base() / "unet" / "config.json"
        config = json.loads(path.read_text()) | {"cross_attention_dim": value}
        replaced(path, json.dumps(config).encode())
        return place.train("--base", place.base)

    return spoiled


def upscaling_base(place: Place) -> list[object]:
    path = place.copied_base() / "unet" / "config.json"
    replaced(path, json.dumps(json.loads(path.read_text()) | {"in_channels": 7}).encode())
    return place.train("--base", place.base)


def single_file_base(place: Place) -> list[object]:
    return place.train("--base", place.lora)


def separate_vae_missing(place: Place) -> list[object]:
    return place.train("--set", f"model.vae={place.root / 'no-vae'}")


def lora_of_another_family(place: Place) -> list[object]:
    save_adapter(adapter(768), place.root / "other.safetensors", FAMILIES["sd15"])
    return place.generate("--lora", place.root / "other.safetensors")


def lora_of_another_base(place: Place) -> list[object]:
    layers = {("unet", "down_blocks.9.attentions.0.transformer_blocks.0.attn2.to_k"): LayerWeights(
        torch.ones(2, 128), torch.ones(96, 2), 2.0)}  # fmt: skip
    odd = place.root / "odd.safetensors"
    save_adapter(AdapterWeights(layers), odd, FAMILIES["tiny"])
    return place.generate("--lora", odd)


def lora_cut_short(place: Place) -> list[object]:
    half = place.root / "half.safetensors"
    half.write_bytes(place.lora.read_bytes()[:-100])
    return place.generate("--lora", half)


def web_page_as_lora(place: Place) -> list[object]:
    return place.generate("--lora", place.text("page.safetensors", "<!DOCTYPE html><html>Not found</html>"))


def lora_folder(place: Place) -> list[object]:
    return place.generate("--lora", place.pictures)


def strength_is_no_number(place: Place) -> list[object]:
    return place.generate("--lora", f"{place.lora}:nan")


def broken_toml(place: Place) -> list[object]:
    return place.train("--config", place.text("config.toml", "[adapter\nrank = 4"))


def unknown_section(place: Place) -> list[object]:
    return place.train("--config", place.text("config.toml", "[sampler]\nsteps = 4"))


def unwritable_workspace(place: Place) -> list[object]:
    file = place.text("file", "")
    return ["train", place.pictures, "--name", "mine", "--workspace", file / "workspace"]


def workspace_is_a_file(place: Place) -> list[object]:
    return ["train", place.pictures, "--name", "mine", "--workspace", place.text("file", "")]


def name_is_taken(place: Place) -> list[object]:
    RunFolder.create(place.run, RunConfig())
    return place.train()


def resume_of_no_run(place: Place) -> list[object]:
    return ["resume", place.pictures]


def made(place: Place, *story: events.Event) -> Path:
    run = RunFolder.create(place.run, RunConfig().changed({"dataset.path": str(place.pictures)}))
    writer = EventWriter(run.events_file)
    for event in story:
        writer.write(event)
    writer.close()
    return run.path


def resume_with_no_more_steps(place: Place) -> list[object]:
    started = events.Started(steps=50, pid=1, device="cpu", threads=1, versions={})
    finished = events.Finished(step=50, export="export/mine.safetensors")
    return ["resume", made(place, started, events.StepDone(step=50, loss=1, lr=1, seconds=1), finished),
            "--steps", "50"]  # fmt: skip


def resume_to_fewer_steps(place: Place) -> list[object]:
    started = events.Started(steps=80, pid=1, device="cpu", threads=1, versions={})
    stopped = events.Stopped(step=50, export="export/mine.safetensors")
    return ["resume", made(place, started, events.StepDone(step=50, loss=1, lr=1, seconds=1), stopped),
            "--steps", "20"]  # fmt: skip


def resume_of_edited_config(place: Place) -> list[object]:
    path = made(place)
    (path / "config.toml").write_text("[adapter]\nrank = 0\n")
    return ["resume", path]


def stop_of_a_run_at_rest(place: Place) -> list[object]:
    return ["stop", made(place)]


def empty_validation_set(place: Place) -> list[object]:
    (place.root / "empty").mkdir()
    return ["validate", "--dataset", place.root / "empty", "--workspace", place.workspace]


def convert_onto_a_file(place: Place) -> list[object]:
    return ["convert", place.lora, place.text("there.safetensors", "keep me"), "--to", "diffusers"]


def convert_no_lora(place: Place) -> list[object]:
    return ["convert", DEMO_BASE / UNET_FILE, place.root / "new.safetensors", "--to", "diffusers"]


def convert_into_nowhere(place: Place) -> list[object]:
    return ["convert", place.lora, place.root / "no" / "new.safetensors", "--to", "diffusers"]


def out_below_a_file(place: Place) -> list[object]:
    return place.generate("--out", place.text("file", "") / "out.png")


CASES: dict[str, tuple[Callable[[Place], list[object]], str]] = {
    "dataset missing": (missing_dataset, r"nowhere does not exist"),
    "no images": (no_pictures, r"no images in .*pictures"),
    "text named png": (text_as_png, r"notes\.png"),
    "truncated jpeg": (truncated_jpeg, r"photo\.jpg"),
    "one pixel": (one_pixel, r"dot\.png is only 1 x 1"),
    "empty image": (empty_picture, r"nothing\.png"),
    "caption not utf-8": (caption_not_utf8, r"red\.txt.*UTF-8"),
    "too few images": (one_picture_to_train_on, r"validation\.pictures"),
    "zip that climbs": (climbing_zip, r"\.\./\.\./escaped\.png"),
    "zip cut short": (truncated_zip, r"pictures\.zip"),
    "dataset is a file": (plain_file_as_dataset, r"pictures\.txt is neither a folder nor a zip"),
    "base missing": (missing_base, r"no-base"),
    "base lacks a file": (base_lacks_a_file, r"lacks text_encoder/model\.safetensors"),
    "base with broken json": (base_with_broken_json, r"unet/config\.json cannot be read as JSON"),
    "base with broken vae json": (base_with_broken_vae_json, r"vae.config\.json"),
    "base cut short": (base_cut_short, r"base/unet|unet.*base"),
    "base without a tensor": (base_without_a_tensor, r"conv_out\.weight"),
    "text encoder without a tensor": (base_text_encoder_without_a_tensor, r"final_layer_norm"),
    "base of unknown width": (base_of_width(999), r"999 channels wide"),
    "base of no width": (base_of_width(None), r"cross_attention_dim"),
    "base of many widths": (base_of_width([128, 128]), r"cross_attention_dim"),
    "upscaling base": (upscaling_base, r"an upscaling model \(7 input channels\)"),
    "single-file base": (single_file_base, r"good\.safetensors is an adapter file"),
    "vae missing": (separate_vae_missing, r"no-vae"),
    "lora of another family": (lora_of_another_family, r"other\.safetensors is for Stable Diffusion 1\.x"),
    "lora of another base": (lora_of_another_base, r"down_blocks\.9.*another base"),
    "lora cut short": (lora_cut_short, r"half\.safetensors is cut short"),
    "web page as lora": (web_page_as_lora, r"page\.safetensors .*web page"),
    "folder as lora": (lora_folder, r"pictures .*folder"),
    "lora missing": (lambda p: p.generate("--lora", "no.safetensors:0.5"), r"no\.safetensors does not exist"),
    "lora missing in inspect": (lambda p: ["inspect", p.root / "no.safetensors"], r"does not exist"),
    "strength nan": (strength_is_no_number, r"nan"),
    "rank 0": (settings("adapter.rank=0"), r"adapter\.rank = 0 is out of range"),
    "alpha 0": (settings("adapter.alpha=0"), r"adapter\.alpha = 0 is out of range"),
    "alpha infinite": (settings("adapter.alpha=inf"), r"adapter\.alpha"),
    "steps infinite": (settings("train.steps=inf"), r"train\.steps"),
    "mis-spelt setting": (settings("adapter.rnak=4"), r"did you mean adapter\.rank\?"),
    "two mistakes at once": (
        settings("adapter.rank=0", "seed=-1"),
        r"(?=.*adapter\.rank = 0)(?=.*seed = -1)",
    ),
    "wrong type": (settings("train.steps=many"), r"train\.steps = 'many' should be an integer"),
    "set without =": (settings("adapter.rank"), r"section\.key=value"),
    "unknown optimizer": (settings("optimizer.name=adamx"), r"optimizer\.name = 'adamx'.*adamw"),
    "unknown schedule": (settings("optimizer.schedule=cubic"), r"optimizer\.schedule = 'cubic'.*cosine"),
    "nothing to train": (settings("optimizer.lr=0", "optimizer.text_encoder_lr=0"), r"optimizer\.lr"),
    "two rates for prodigy": (settings("optimizer.name=prodigy", "optimizer.lr=1"), r"one learning rate"),
    "unknown preset": (lambda p: p.train("--preset", "best"), r"preset 'best'.*style-high"),
    "config missing": (lambda p: p.train("--config", p.root / "no.toml"), r"no\.toml cannot be read"),
    "config broken": (broken_toml, r"config\.toml is not valid TOML"),
    "config with unknown section": (unknown_section, r"sampler\.steps is not a setting"),
    "workspace below a file": (unwritable_workspace, r"file/workspace cannot be written"),
    "workspace is a file": (workspace_is_a_file, r"file cannot be written"),
    "name with a slash": (lambda p: ["train", p.pictures, "--name", "a/b", "--workspace", p.workspace],
    "a/b"), "name taken": (name_is_taken, r"mine already exists.*resume"),
    "resume of no run": (resume_of_no_run, r"pictures is not a run"),
    "resume without more steps": (resume_with_no_more_steps, r"50 steps"),
    "resume to fewer steps": (resume_to_fewer_steps, r"50 steps"),
    "resume to 0 steps": (lambda p: ["resume", made(p), "--steps", "0"], r"--steps = 0"),
    "resume of an edited config": (resume_of_edited_config, r"adapter\.rank = 0"),
    "stop of a run at rest": (stop_of_a_run_at_rest, r"mine is not running.*stop"),
    "width 100": (lambda p: p.generate("--width", 100), r"width = 100.*multiple of"),
    "height -32": (lambda p: p.generate("--height", -32), r"height = -32"),
    "strength without an image": (
        lambda p: p.generate("--strength", 0.5),
        r"--strength 0\.5 has no effect without --image",
    ),
    "unknown sampler": (lambda p: p.generate("--sampler", "magic"), r"sampler = 'magic'.*euler_a"),
    "steps 0": (lambda p: p.generate("--steps", 0), r"steps = 0 is out of range; it must be between 1"),
    "count 0": (lambda p: p.generate("--count", 0), r"--count 0"),
    "cfg nan": (lambda p: p.generate("--cfg", "nan"), r"cfg = nan"),
    "seed -1": (lambda p: p.generate("--seed", -1), r"seed = -1"),
    "out is no png": (lambda p: p.generate("--out", p.root / "out.jpg"), r"out\.jpg.*\.png"),
    "out below a file": (out_below_a_file, r"file/out\.png"),
    "empty validation set": (empty_validation_set, r"no images in .*empty"),
    "triples 0": (lambda p: ["validate", "--dataset", p.pictures, "--triples", "0"], r"--triples = 0"),
    "convert onto a file": (convert_onto_a_file, r"there\.safetensors already exists"),
    "convert no lora": (convert_no_lora, r"whole UNet"),
    "convert into nowhere": (convert_into_nowhere, r"no/new\.safetensors cannot be written"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """Every file outside the workspace by its hash."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "workspace"
    }


def one_sentence(stderr: str) -> str:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert re.match(r"\S.*[.?]$", lines[0]), stderr
    assert "Traceback" not in lines[0]
    assert "Errno" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_sentence_and_loses_nothing(
    case: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = CASES[case]
    arguments = [str(word) for word in spoil(place)]
    before, fresh = contents(place.root), not place.run.exists()
    capsys.readouterr()
    assert main(arguments) == 1
    said = one_sentence(capsys.readouterr().err)
    assert re.search(words, said.replace("\\", "/")), said
    assert contents(place.root) == before
    assert not (place.root.parent / "escaped.png").exists()
    left = [path.name for path in place.root.rglob(".*")]
    assert [name for name in left if name.endswith((".tmp", ".making", ".draft"))] == []
    if arguments[0] == "train" and fresh and place.workspace.is_dir():
        # The corrected second try with the same name must not be refused.
        RunFolder.create(place.run, RunConfig())


def real(arguments: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_core", *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.mark.skipif(sys.platform == "win32", reason="a nursery forks")
@pytest.mark.parametrize(
    "case",
    ["text named png", "base without a tensor", "text encoder without a tensor", "lora of another family"],
)
def test_a_process_says_nothing_else_either(case: str, place: Place, nursery: Nursery) -> None:
    """Libraries have a voice of their own, which only a process of its own shows."""
    spoil, words = CASES[case]
    code, said, _ = nursery.command(spoil(place))
    assert code == 1
    assert re.search(words, one_sentence(said))


BLANKS = " " * 50_000
LONG: dict[str, Callable[[], object]] = {
    "prompt": lambda: check_prompt(f"a{BLANKS}b BREAK{BLANKS}c"),
    "settings of an image": lambda: parse_infotext(f"a\nSteps: 1, a{BLANKS}b"),
    "result": lambda: show_result("", f"a{BLANKS}b", {}),
    "new token": lambda: parse_new_tokens([f"zwx = a{BLANKS}b"]),
}


@pytest.mark.parametrize("what", LONG)
def test_text_by_anyone_takes_no_time(what: str) -> None:
    """Each took the square of its blanks: minutes, in which a window answers nothing."""
    begun = time.process_time()
    LONG[what]()
    assert time.process_time() - begun < 1.0


@pytest.mark.parametrize("case", ["base cut short", "rank 0"])
def test_nor_while_it_imports_and_ends(case: str, place: Place) -> None:
    spoil, words = CASES[case]
    done = real(spoil(place))
    assert done.returncode == 1
    assert re.search(words, one_sentence(done.stderr))


def test_a_base_of_the_hub_that_cannot_be_had(place: Place) -> None:
    elsewhere = {
        "HF_HUB_OFFLINE": "0",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HF_HOME": str(place.root / "hub"),
    }
    done = real(place.train("--base", "nobody/no-such-model"), **elsewhere)
    assert done.returncode == 1
    assert re.search("nobody/no-such-model.*cannot be downloaded", one_sentence(done.stderr))


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["train"], ["generate"], ["train", "demo", "--rank", "4"], ["resume", "x", "--steps",
    "many"],
     ["convert", "a", "b"], ["convert", "a", "b", "--to", "onnx"], ["validate"]],
)  # fmt: skip
def test_wrong_usage_of_a_verb_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: lora-easel" in capsys.readouterr().err


def test_the_corrected_second_try_takes_the_same_name(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--set", "train.steps=1", "--set", "sample.every=0", "--set", "validation.pictures=0"]
    # What only opening the base tells; what can be told before makes no run at all.
    arguments = [str(word) for word in (*base_without_a_tensor(place), *few)]
    assert main(arguments) == 1
    assert RunFolder.open(place.run).summary()["status"] == "failed"
    replaced(place.base / UNET_FILE, (DEMO_BASE / UNET_FILE).read_bytes())
    with warnings.catch_warnings():
        assert main(arguments) == 0
    assert RunFolder.open(place.run).summary()["status"] == "done"
    capsys.readouterr()
    assert main(arguments) == 1
    assert "already exists" in one_sentence(capsys.readouterr().err)


def test_all_that_is_wrong_is_said_at_once_and_no_run_is_made(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.pictures / "notes.png").write_text("I am no image.")
    arguments = place.train(
        "--base", place.root / "no-base", "--set", "model.vae=no-vae", "--set", "validation.pictures=3",
        "--set", "adapter.init=no.safetensors", "--set", "optimizer.lr=0", "--set",
        "optimizer.text_encoder_lr=0",
    )  # fmt: skip
    assert main([str(word) for word in arguments]) == 1
    said = one_sentence(capsys.readouterr().err)
    for words in ("notes.png", "no-base", "no-vae", "validation.pictures", "no.safetensors", "optimizer.lr"):
        assert words in said
    assert not place.run.exists()


def test_what_does_not_block_is_a_note(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.pictures / "red.txt").write_text("a red square, " * 40, encoding="utf-8")
    few = ["--set", "train.steps=1", "--set", "sample.every=0", "--set", "optimizer.lr=1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([str(word) for word in place.train(*few)]) == 0
    lines = capsys.readouterr().out.splitlines()
    notes = [line for line in lines if line.startswith("Note: ")]
    assert any("red.png" in line and "75 tokens" in line for line in notes)
    assert any("optimizer.lr x alpha / rank = 1 is much for AdamW" in line for line in notes)
    assert lines[-1] == str(place.run / "export" / "mine.safetensors")


def test_output_that_nobody_reads_is_no_reason_to_fail(place: Place) -> None:
    """`train ... | head -1` must not end a run."""
    few = ["--set", "train.steps=2", "--set", "sample.every=0", "--set", "validation.pictures=0"]
    command = [program("engine"), "-m", "lora_core", *map(str, place.train(*few))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(PATIENCE) == 0
    assert said == ""
    assert RunFolder.open(place.run).summary()["status"] == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("more", [["--json"], []])
def test_a_result_that_finds_no_room_is_no_success(place: Place, more: list[str]) -> None:
    """`inspect FILE --json > result.json` on a full disk."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [program("engine"), "-m", "lora_core", "inspect", str(place.lora), *more]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "The output cannot be read or written: No space left on device.\n"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_a_help_whose_reader_is_gone_is_no_failure(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """As `lora-easel --help | head -1`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with contextlib.suppress(BrokenPipeError), os.fdopen(write_end, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0


def test_a_closed_output_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    """As `>&-` leaves it, or a Windows program without a console."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["runs", "--workspace", str(place.workspace)]) == 0


def test_a_terminal_that_lacks_a_letter_is_no_reason_to_fail(place: Place) -> None:
    made(place)
    place.run.rename(place.run.with_name("木"))
    done = real(["runs", "--workspace", place.workspace], PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "queued" in done.stdout


def test_a_tick_is_told_from_a_cross_where_the_encoding_has_neither(place: Place) -> None:
    """kohya reads an alpha of 0 as the rank."""
    weights = adapter(128)
    layers = {key: dataclasses.replace(layer, alpha=0.0) for key, layer in weights.layers.items()}
    save_adapter(AdapterWeights(layers), place.lora, FAMILIES["tiny"], keep_alphas=True)
    done = real(["verify", place.lora], PYTHONIOENCODING="ascii")
    signs = {line.split()[1]: line[0] for line in done.stdout.splitlines()[1:]}
    assert signs == {tool: "x" if tool == "kohya" else "+" for tool in signs}, done.stdout
    assert "kohya" in signs


class Interrupted(ModuleType):
    """A module whose import ends by Ctrl-C."""

    def __getattr__(self, name: str) -> object:
        raise KeyboardInterrupt


def test_ctrl_c_before_a_verb_begins_ends_it_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a module is imported, and while it waits for the right to spin."""

    def wait(kind: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lora_core.system.processes.limit_spinning", wait)
        assert main(["runs"]) == 130
    monkeypatch.setitem(sys.modules, "lora_core.cli", Interrupted("lora_core.cli"))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "lora_core" / "__main__.py"), run_name="__main__")
    assert end.value.code == 130
