"""The three paths that a stranger reads first are short, and true: a training step and an export run in the
files that ARCHITECTURE lists and in no others; `tests/app/test_preview_path.py` shows it of a slider."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.warm import program

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "lora_core"
ELSEWHERE = ("data/", "settings/", "backends/")
"""How captions are drawn and the settings, which need no torch; what takes the place of plain torch."""
HELPERS = {
    "errors.py": {"wrap_os_errors"},
    "formats/kinds.py": {"detect_family", "family_evidence", "_title", "_width"},
    "lora/inject.py": {"EMA.update"},
    "models/weight_files.py": {
        "SafetensorsFile.__init__", "SafetensorsFile._open", "SafetensorsFile.tensor",
    },
    "models/load.py": {
        "BaseModel.modules", "BaseModel.component", "BaseModel.on_device", "BaseModel.resolution",
        "_DivideByOne.__rtruediv__",
    },
}  # fmt: skip
"""Small functions of other files. Of a step: a text encoder's device, a division that is left out, and the
average, where one is kept. Of an export: the base's size, how errors of the disk are worded, and the file
read back, with the family that it is for."""
STEP = """
import json, sys, threading, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from tests.train.runs import toy
from lora_core.train.loop import StepSettings, training_steps
from lora_core.train.setup import RuntimePlan, prepare

def note(frame, event, arg):
    _, engine, file = frame.f_code.co_filename.partition("/lora_core/")
    if event == "call" and engine:
        name = frame.f_code.co_qualname.partition(".<locals>")[0]
        seen.setdefault(file, set()).add(name)

place = toy(Path(sys.argv[1]))
for name, changes in json.loads(sys.argv[2]).items():
    run = place.run(name, train__steps=3, **changes)
    config = run.config()
    session = prepare(run, config, RuntimePlan.of(run, config), lambda *_: None)
    settings = StepSettings(config, 3)
    steps = training_steps(session.state, session.batches, session.text, settings, 0)
    next(steps)
    seen = {}
    threading.setprofile(note)
    sys.setprofile(note)
    next(steps)
    sys.setprofile(None)
    threading.setprofile(None)
    print(json.dumps({file: sorted(names) for file, names in seen.items()}))
"""
EXPORT = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from tests.train.runs import toy
import torch
from lora_core.lora.inject import adapter_weights
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES
from lora_core.train.export import export_header, write_export
from lora_core.train.setup import RuntimePlan, prepare

place = toy(Path(sys.argv[1]))
run = place.run("exported", optimizer__text_encoder_lr=5e-4)
config = run.config()
session = prepare(run, config, RuntimePlan.of(run, config), lambda *_: None)
base, weights, seen = session.state.base, adapter_weights(session.state.injected), {}

def note(frame, event, arg):
    _, engine, file = frame.f_code.co_filename.partition("/lora_core/")
    if event == "call" and engine:
        seen.setdefault(file, set()).add(frame.f_code.co_qualname.partition(".<locals>")[0])

ldm = next(family for family in FAMILIES.values() if family.kohya_block_names == "ldm")
key = ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v")
other = AdapterWeights({key: LayerWeights(torch.ones(4, ldm.context_width), torch.ones(640, 4), 1.0)})
sys.setprofile(note)
header = export_header(config, base, session.train_items, 3, 0.0)
for stem, family, one in (("one", base.family, weights), ("ldm", ldm, other)):
    write_export(one, Path(sys.argv[1]) / f"{stem}.safetensors", ("kohya", "fp16"), family, header)
sys.setprofile(None)
print(json.dumps({file: sorted(names) for file, names in seen.items()}))
"""


def executed(home: Path, **runs: dict[str, object]) -> list[dict[str, list[str]]]:
    """What functions a step of each run calls, by file below `lora_core`; `runs` are settings by name."""
    command = [program("engine"), "-c", STEP, str(home), json.dumps(runs)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return [json.loads(line) for line in said.splitlines()[-len(runs) :]]


PATHS = {
    "A training step": (8, 1500),
    "From the slider to the image": (10, 2000),
    "From the adapter to the file": (8, 1800),
}
"""How many files and lines a reader opens at most, by the heading in ARCHITECTURE."""


def reading_path(heading: str) -> list[str]:
    """The files in the table that ARCHITECTURE has under a heading, as it names them."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([\w/]+\.py)` \|", section, re.MULTILINE)


@pytest.mark.parametrize("heading", PATHS)
def test_a_reading_path_is_short(heading: str) -> None:
    most, lines = PATHS[heading]
    listed = reading_path(heading)
    found = [file if (file := ENGINE / name).is_file() else ROOT / name for name in listed]
    assert 0 < len(listed) <= most
    assert sum(len(file.read_text("utf-8").splitlines()) for file in found) <= lines


def test_a_step_runs_in_the_files_that_are_listed(tmp_path: Path) -> None:
    """With what is on by default, and with a text encoder that is trained, dropout and an average."""
    listed = reading_path("A training step")
    seen: set[str] = set()
    more = {"optimizer__text_encoder_lr": 5e-4, "adapter__dropout": 0.1, "save__ema": 0.9}
    for functions in executed(tmp_path, plain={}, more=more):
        for file, names in functions.items():
            if file in listed or not file.startswith(ELSEWHERE):
                assert file in listed or set(names) <= HELPERS.get(file, set()), (file, names)
                seen.add(file)
    assert set(listed) <= seen, "a file is listed that no step needs"


def test_an_export_runs_in_the_files_that_are_listed(tmp_path: Path) -> None:
    command = [program("engine"), "-c", EXPORT, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    seen: dict[str, list[str]] = json.loads(said.splitlines()[-1])
    listed = reading_path("From the adapter to the file")
    for file, names in seen.items():
        if not file.startswith((*ELSEWHERE, "model_files/", "system/")) and file.endswith(".py"):
            assert file in listed or set(names) <= HELPERS.get(file, set()), (file, names)
    assert set(listed) <= seen.keys(), "a file is listed that no export needs"
