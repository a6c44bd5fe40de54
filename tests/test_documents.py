"""All commands of the documents, executed: as they are written, in a folder that has what they speak of, a
folder of images called FOLDER, a run RUN, a LoRA file FILE. Each finds that folder unchanged; what takes long
gets options that make it short, and a toy for a base. What does not run is in ELSEWHERE, with its reason."""

import re
import shlex
import shutil
import subprocess
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from lora_core.cli import main
from lora_core.evaluate import caption_scores
from lora_core.runs.folder import RunFolder
from lora_core.system.files import DEMO_TRAIN
from tests.captioners import TAGS, write_blip, write_clipseg, write_tagger
from tests.hub import hub_of, use_hub
from tests.system.test_other_tools import install
from tests.test_readme import ROOT, commands, lines_of_commands, page
from tests.tiny import tiny_folder
from tests.waiting import PATIENCE
from tests.warm import program

ELSEWHERE = {
    r"python launch\.py": "sets up and stays open: .ci/window",
    r"python launch\.py (test|update|repair|wheels|uninstall).*": "changes .venv: tests/test_launch.py",
    r"source \.venv/bin/activate": "belongs to a shell",
    r"ruff .*|mypy": ".ci/run",
    r"python -m hatchling build|mkdocs build.*": "tests/test_package.py, tests/test_readme.py",
    r"pip install .*": "needs a package index; without one: tests/test_package.py",
    r"lora-easel-window.*": "stays open: tests/test_package.py",
    r"docker .*|LORA_EASEL_PASSWORD=\.\.\. docker .*": "needs Docker: .ci/container",
    r"ssh .*": "needs another computer",
    r"accelerate launch .*": "several processes: tests/train/test_several.py",
    r"hf auth login": "needs an account",
    r"\S*python -m tests\.gpu": "needs a card; at toy size: tests/gpu/test_toy.py",
    r"python -m tests\.(benchmarks|slow|simulated)\b.*": "minutes to hours",
    r"python -m tests\.catalogues.*": "writes assets/locale: tests/app/test_words.py checks what it wrote",
    r"python assets/(base|demo)/make.*": "hours, and writes the embedded base",
    r"lora-easel (train demo --name first|.* first\b.*)": "a page executed as a whole: tests/test_readme.py",
    r"lora-easel masks make FOLDER --model CIDAS.*": "of a hub: tests/evaluate/test_masks_by_models.py",
    r"lora-easel generate --base sd-v1-5-inpainting.*": "needs such a base: tests/train/test_inpainting.py",
    r"lora-easel caption FOLDER --model florence.*": "0.5 GB of a hub: tests/evaluate/test_captioning.py",
}
"""Commands that do not run here: why, and what runs them instead."""

SETS = (
    "train.steps=1", "train.batch_size=1", "train.resolution=64", "validation.every=0", "sample.every=0",
)  # fmt: skip
SHORT = {
    "train": [word for one in SETS for word in ("--set", one)],
    "forecast": [word for one in SETS for word in ("--set", one)],
    "generate": ["--steps", "1"],
    "grid": ["--steps", "1"],
    "report": ["--no-measure"],
    **{verb: ["--triples", "1"] for verb in ("validate", "strength", "probe", "pictures")},
}
"""Options that make a verb do less."""
NEEDS_BASE = {*SHORT, "merge"} - {"report", "pictures"}
"""Verbs that take the embedded base, or here a toy, where nothing is said."""
BEFORE = {
    "captions undo": "captions prefix FOLDER the",
    "take-back": "leave-out FOLDER PICTURE",
    "trash restore": "delete RUN",
    "concepts set": "concepts make FOLDER",
    "queue results": "queue sweep RUN adapter.rank 4 8",
    **dict.fromkeys(("queue move", "queue remove", "queue list"), "queue add NEW"),
    "projects": "projects new PROJECT",
}
"""A command that has to come before another, by how that begins."""
LIVE = ("stop", "pause", "save", "preview")
"""Verbs that ask something of a run that is being trained."""
WORDS = {
    "PICTURE$": "PICTURE.png",
    r"LEFT,TOP,RIGHT,BOTTOM(\[,X,Y\])?$": "0.1,0,0.9,1",
    "FILE(?=:|$)": "FILE.safetensors",
    "OUT$": "OUT.safetensors",
    "OWNER/NAME$": "owner/name",
    "NAME$": "RUN",
    "SDXL.safetensors$": "TOY",
    "([AB])$": r"\1.safetensors",
}
"""What stands for a word that cannot be taken as it is."""
NEW = {"--out": "NEW.safetensors", "--zip": "NEW.zip"}
"""Where FILE is one to be written."""


def all_commands() -> list[str]:
    """Of all blocks and of the text, ours and others."""
    return sorted({*(f"lora-easel {one}" for one in commands()), *lines_of_commands()})


def is_elsewhere(command: str) -> bool:
    return any(re.fullmatch(pattern, command) for pattern in ELSEWHERE)


def run(command: str, url: str = "") -> int:
    """The exit code of `lora-easel ...`, short."""
    words = shlex.split(command)
    verb = words[0]
    ended = "NEW" if verb in ("queue", "resume") else "RUN"  # what is done is not gone on with
    if verb in NEEDS_BASE and not {"demo", "--base", "--into-base"} & {*words}:
        words += ["--base", "TOY"]
    for place, word in enumerate(words):
        if word == "FILE" and words[place - 1] in NEW:
            words[place] = NEW[words[place - 1]]
            continue
        for pattern, put in (*WORDS.items(), ("URL$", url), ("RUN$", ended)):
            words[place] = re.sub(f"^{pattern}", put, words[place])
    rate = [] if verb != "train" or "optimizer.lr=auto" in words else ["--set", "optimizer.lr=1e-3"]
    return main([*words, *SHORT.get(verb, []), *rate])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as each command finds it."""
    place = tmp_path_factory.mktemp("documents") / "kept"
    images = sorted(DEMO_TRAIN.glob("*.png"))
    for number, name in enumerate(("PICTURE", "2", "cat/3")):
        target = place / "FOLDER" / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images[number], target)
        target.with_suffix(".txt").write_text(
            f"kitty, TAG, FIND a picture of thing {number}", encoding="utf-8"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("LORA_EASEL_HOME", str(place / "workspace"))
        shared = place.parent
        tiny_folder(shared / "TOY")
        for name in ("TOY", "BASE"):
            Path(name).symlink_to(shared / "TOY")
        assert run("train FOLDER --name RUN --set adapter.rank=2 --set save.every=1") == 0
        assert run("train FOLDER --name NEW --queue") == 0
        assert run("queue remove NEW") == 0
        (made,) = (place / "workspace" / "runs" / "RUN" / "export").glob("*.safetensors")
        for name in ("FILE", "A", "B"):
            shutil.copy(made, f"{name}.safetensors")
        shutil.copy(made, "IN")
        assert run(f"merge FILE --into-base BASE --out {shared / 'TUNED'}") == 0
        Path("TUNED").symlink_to(shared / "TUNED")
        write_blip(place / "CAPTIONER")
        for name in ("CLIPSEG", "MODEL"):
            write_clipseg(place / name)
        Path("TABLE").write_text("TAG -> thing\n", encoding="utf-8")
        write_tagger(place / "tagger", torch.ones(3, len(TAGS)))
        install(place / "home" / "ComfyUI", "ComfyUI")
        Path("PROMPTS.txt").write_text("a castle --n blur --w 64 --h 64 --s 1\n", encoding="utf-8")
        (block,) = re.findall(r"```toml\n(.*?)```", page("docs/settings.md"), re.S)
        Path("settings.toml").write_text(block, encoding="utf-8")
    return place


@pytest.fixture
def place(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, where paths are always the same."""
    made = kept.with_name("place")
    shutil.copytree(kept, made, symlinks=True)
    monkeypatch.chdir(made)
    monkeypatch.setenv("LORA_EASEL_HOME", str(made / "workspace"))
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(made / "home"))
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("command", [one for one in all_commands() if not is_elsewhere(one)])
def test_the_command_works(
    command: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(caption_scores, "TRIGGER_IMAGES", 1)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    words = command.removeprefix("lora-easel ")
    if "tagger" in words:
        request.getfixturevalue("onnxruntime")
    if words == "serve":  # until its stdin ends
        serve = [program("engine"), "-m", "lora_core", "serve"]
        assert subprocess.run(serve, input=b"", timeout=PATIENCE, check=False).returncode == 0
        return
    for begins, earlier in BEFORE.items():
        if words.startswith(begins) and words != earlier:
            assert run(earlier) == 0, capsys.readouterr().err
    with ExitStack() as stack:
        hub = stack.enter_context(hub_of())
        use_hub(monkeypatch, hub, place / "cache")
        hub.root = place
        if words.split()[0] in LIVE:
            stack.enter_context(RunFolder.open(place / "workspace" / "runs" / "RUN").hold())
        # An address that answers whatever is sent there.
        code = run(words, f"{hub.address}/api/validate-yaml")
    # What is wrong with this computer is the doctor's result.
    assert code == 0 or (code, words.split()[0]) == (1, "doctor"), capsys.readouterr().err
    assert len(opened) == (words == "docs")


def test_what_does_not_run_here_is_in_the_documents() -> None:
    spoken_of = all_commands()
    unused = [one for one in ELSEWHERE if not any(re.fullmatch(one, command) for command in spoken_of)]
    assert unused == []
    named = {
        name
        for reason in ELSEWHERE.values()
        for name in re.findall(r"(?:tests|\.ci)/[\w/]+(?:\.py)?", reason)
    }
    assert [name for name in named if not (ROOT / name).is_file()] == []
