"""What masks bring where half of each image is noise, and what prior preservation keeps of the base: the
demo trained with and without them, judged independently. Prints the numbers of docs/masks.md."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_core.runs.events import Validated, read_events
from tests.benchmarks.pictures import picture_set
from tests.evaluator import Evaluator, mean_and_error

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo"

pytestmark = pytest.mark.slow


def train(folder: Path | str, name: str, home: Path, **changes: object) -> Path:
    """The exported LoRA of a run of the demo's preset."""
    settings = {"sample__every": 0, "validation__every": 0, **changes}
    words = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    more = [word for one in words for word in ("--set", one)]
    command = [sys.executable, "-m", "lora_core", "train", folder, "--name", name, "--preset", "demo", *more]
    command += ["--workspace", home]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


def spoil(into: Path) -> Path:
    """The demo's images with noise in the left or the right half, and a mask of the other half."""
    into.mkdir()
    draw = np.random.default_rng(0)
    for number, path in enumerate(sorted((DEMO / "train").glob("*.png"))):
        pixels = np.array(Image.open(path).convert("RGB"))
        half = slice(0, pixels.shape[1] // 2) if number % 2 else slice(pixels.shape[1] // 2, None)
        pixels[:, half] = draw.integers(0, 256, pixels[:, half].shape)
        mask = np.full(pixels.shape[:2], 255, np.uint8)
        mask[:, half] = 0
        Image.fromarray(pixels).save(into / path.name)
        Image.fromarray(mask).save(into / f"{path.stem}-masklabel.png")
        shutil.copy(path.with_suffix(".txt"), into)
    return into


def test_masked_training_gains_at_least_half_more_than_unmasked(tmp_path: Path) -> None:
    noisy, judge = spoil(tmp_path / "noisy"), Evaluator(ROOT / "assets" / "base", DEMO / "held_out")
    base, gains = judge.losses(), {}
    cases = {
        "clean images": ("demo", {}),
        "unmasked": (noisy, {"dataset__masks": "off"}),
        "masked, 0.1 outside": (noisy, {"loss__unmasked_weight": 0.1}),
        "masked, 0 outside": (noisy, {"loss__unmasked_weight": 0.0}),
    }
    for number, (name, (folder, changes)) in enumerate(cases.items()):
        file = train(folder, f"run-{number}", tmp_path / "home", **changes)
        gains[name], error = mean_and_error(base - judge.losses(file))
        sys.stdout.write(f"\n{name}: gain {gains[name]:.4f} (standard error {error:.4f})\n")
    assert gains["masked, 0.1 outside"] >= 1.5 * max(gains["unmasked"], 0.0)
    assert gains["masked, 0 outside"] >= 1.5 * max(gains["unmasked"], 0.0)
    assert gains["masked, 0.1 outside"] > 0


@pytest.mark.parametrize(("name", "trigger"), [("demo", "duskprint style"), ("subject", "zorbit")])
def test_prior_preservation_halves_forgetting_and_keeps_the_gain(
    name: str, trigger: str, tmp_path: Path
) -> None:
    images = picture_set(name, tmp_path / "sets")
    judge, found = Evaluator(ROOT / "assets" / "base", images / "held_out"), {}
    base, home = judge.losses(), tmp_path / "home"
    measured = {"dataset__trigger": trigger, "validation__every": 120, "validation__forgetting": 8}
    for weight in (0.0, 1.0):
        run = f"prior-{weight:g}"
        file = train(images / "train", run, home, **measured, loss__prior_preservation=weight)
        gain, error = mean_and_error(base - judge.losses(file))
        events = read_events(home / "runs" / run / "events.jsonl")[0]
        last = [event for event in events if isinstance(event, Validated)][-1]
        found[weight] = (gain, -last.prior)
        sys.stdout.write(
            f"\nprior preservation {weight:g}: gain {gain:.4f} (standard error {error:.4f}), forgotten"
            f" {-last.prior:.4f} ({last.prior_error:.4f})\n"
        )
    assert found[1.0][0] >= 0.9 * found[0.0][0]
    assert found[1.0][1] <= 0.5 * found[0.0][1]
