"""Two LoRAs that were really trained: the strength that is suggested against thirty tried by an independent
judge, and two at once against their exact merge."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_core.formats.io import load_adapter
from tests.evaluator import Evaluator, mean_and_error
from tests.tools.planted import dense

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo"
PROMPTS = ("a robot, 3d", "a house beside a tree", "a cat with a hat")

pytestmark = pytest.mark.slow


def said(*words: object) -> str:
    command = [sys.executable, "-m", "lora_core", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def loras(home: Path) -> list[Path]:
    """The demo's pictures in two halves, a LoRA of each."""
    files = []
    pictures = sorted((DEMO / "train").glob("*.png"))
    for half in range(2):
        folder = home / f"half-{half}"
        folder.mkdir()
        for picture in pictures[half::2]:
            for file in (picture, picture.with_suffix(".txt")):
                shutil.copy(file, folder)
        more = ["--preset", "demo", "--workspace", home, "--name", f"half-{half}", "--set", f"seed={half}"]
        quiet = ["--set", "sample.every=0", "--set", "validation.every=0"]
        files.append(Path(said("train", folder, *more, *quiet).strip().splitlines()[-1]))
    return files


def test_the_suggested_strength_is_as_good_as_the_best_of_thirty(home: Path, loras: list[Path]) -> None:
    held_out = DEMO / "held_out"
    found = json.loads(said("strength", loras[0], "--dataset", held_out, "--workspace", home, "--json"))
    judge = Evaluator(ROOT / "assets" / "base", held_out, looks=8)
    base = judge.losses()
    suggested = base - judge.losses(loras[0], found["strength"])
    tried = {s: base - judge.losses(loras[0], s) for s in torch.linspace(0.1, 3.0, 30).tolist()}
    best = max(tried, key=lambda strength: float(tried[strength].mean()))
    short, error = mean_and_error(tried[best] - suggested)
    sys.stdout.write(
        f"\nsuggested {found['strength']:.2f} [{found['low']:.2f}, {found['high']:.2f}], best of thirty"
        f" {best:.2f}; short of it by {short:+.5f}, standard error {error:.5f}, of a gain of"
        f" {float(suggested.mean()):.4f}\n"
    )
    assert short <= 2 * error


def test_two_at_once_equal_their_exact_merge(home: Path, loras: list[Path]) -> None:
    merged = home / "both.safetensors"
    said("merge", f"{loras[0]}:1", f"{loras[1]}:1", "--out", merged)
    for number, prompt in enumerate(PROMPTS):
        drawn = []
        for name, files in (("two", loras), ("one", [merged])):
            out = home / f"{name}-{number}.png"
            use = [word for file in files for word in ("--lora", f"{file}:1")]
            said("generate", "--prompt", prompt, *use, "--workspace", home, "--out", out)
            drawn.append(np.asarray(Image.open(out).convert("RGB"), dtype=float))
        apart = float(np.abs(drawn[0] - drawn[1]).mean())
        sys.stdout.write(f"\n{prompt}: {apart:.4f} of 255 apart\n")
        assert apart < 1


def test_overlap_is_what_formed_updates_say(home: Path, loras: list[Path]) -> None:
    report = json.loads(said("stack", f"{loras[0]}:1", f"{loras[1]}:1", "--json"))
    one, two = (load_adapter(file).layers for file in loras)
    whole = own = 0.0
    for row in report["layers"]:
        key = (row["part"], row["module"])
        a, b = dense(one[key], 1.0), dense(two[key], 1.0)
        (pair,) = row["pairs"]
        # Directions below the rounding of a file in fp16 are not counted.
        assert pair["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-3)
        whole += float(((a + b) * a).sum())
        own += float(a.square().sum())
    assert len(report["layers"]) == len(one) == len(two)
    assert report["files"][0]["survives"] == pytest.approx(whole / own, rel=1e-3)
    sys.stdout.write(
        f"\nsurvives: {report['files'][0]['survives']:.3f} and {report['files'][1]['survives']:.3f}\n"
    )
