"""From the strength slider to the image in few files: those that ARCHITECTURE lists, and no others, have code
that is executed between the request of a moved slider and its PNG."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.train.test_reading_path import reading_path
from tests.warm import program

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("settings/", "backends/", "projects/", "runs/", "model_files/", "system/")
"""Folders of `lora_core` for settings, what is on disk, facts of the base and this computer."""
HELPERS = {
    "app/jobs.py": {"Jobs.all", "Jobs.live"},
    "app/preview/history.py": {"History.add", "History._keep"},
    "app/state.py": {"AppState.__init__", "AppState.generated", "AppState._device", "AppState._in_the_way"},
    # A request that waits says for how many others.
    "app/templates.py": {"_", "pluralize"},
    "lora_core/data/images.py": {"encode_file", "save_png"},
    "lora_core/errors.py": {"wrap_os_errors"},
    "lora_core/generate/grid.py": {"make_axis", "split_values", "_check_value"},
    "lora_core/lora/inject.py": {"put_tokens"},
    # A step that takes long is looked at.
    "lora_core/generate/latent_preview.py": {"previewer", "latent_preview", "predict_clean"},
    "lora_core/models/device.py": {"best_device", "use_device"},
    "lora_core/models/load.py": {
        "BaseModel.component", "BaseModel.image_size", "BaseModel.latent_channels", "BaseModel.on_device",
        "BaseModel.resolution", "BaseModel.shift_and_scale", "BaseModel.size_multiple",
        "BaseModel.vae_scale_factor",
        "_DivideByOne.__rtruediv__",
    },
}  # fmt: skip
"""Small functions of other files: whether a run needs the memory, where the image is noted, properties of the
base, how a PNG is written and errors of the disk are told, the language, the strengths of the strip and the
small image in progress, which slow steps show, and the new tokens of adapters."""

WORKER = """
import json, sys, threading
from lora_core import worker
seen, out = {}, sys.argv[1]

def note(frame, event, arg):
    _, folder, file = frame.f_code.co_filename.rpartition("/lora_core/")
    if event == "call" and folder:
        seen.setdefault("lora_core/" + file, set()).add(frame.f_code.co_qualname.partition(".<locals>")[0])

handle, number = worker.Worker.handle, 0
def counted(self, request):
    global number
    number += request["do"] == "generate"
    if number == 3:
        sys.setprofile(note)
    handle(self, request)
    sys.setprofile(None)
    open(out, "w").write(json.dumps({file: sorted(names) for file, names in seen.items()}))
worker.Worker.handle = counted
worker.main()
"""
WINDOW = """
import json, sys, threading, time
from pathlib import Path
home, worker, lora = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
seen, on = {}, False

def note(frame, event, arg):
    folder = "/app/" if "/app/" in frame.f_code.co_filename else "/lora_core/"
    _, found, file = frame.f_code.co_filename.rpartition(folder)
    if on and event == "call" and found:
        name = frame.f_code.co_qualname.partition(".<locals>")[0]
        seen.setdefault(folder.strip("/") + "/" + file, set()).add(name)

threading.setprofile(note)
from app.preview.view import generate
from app.preview.sent_form import take_rows
from app.state import AppState
state = AppState(home / "workspace", worker_command=[sys.executable, "-c", worker, str(home / "worker.json")])
fields = {"prompt": "a house", "seed": 3, "steps": 2}

def settle():
    end = time.monotonic() + 600
    while (view := state.render_queue.view()).working and time.monotonic() < end:
        time.sleep(0.02)
    assert view.state == "idle", view.message
    return view

sent = {"rows": [{"file": lora, "strength": 1.0}], "fields": fields, "strip": {"values": "1", "on": False}}
generate(state, {**sent, "what": "image"})
settle()
on = True
sys.setprofile(note)
take_rows(state, {**sent, "rows": [{"file": lora, "strength": 0.5}], "moved": True})
view = settle()
sys.setprofile(None)
on = False
assert view.image(view.shot) is not None
state.close()
window = {file: sorted(names) for file, names in seen.items()}
print(json.dumps([window, json.loads((home / "worker.json").read_text())]))
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The functions that a moved slider calls in window and worker, by file."""
    home = tmp_path_factory.mktemp("path")
    command = [program("window"), "-c", WINDOW, str(home), WORKER, str(lora(home))]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    window, worker = json.loads(said.splitlines()[-1])
    return {file: {*window.get(file, []), *worker.get(file, [])} for file in (*window, *worker)}


def lora(home: Path) -> Path:
    """A LoRA of one layer of the UNet."""
    import torch

    from lora_core.formats.io import save_adapter
    from lora_core.lora.weights import AdapterWeights, LayerWeights
    from lora_core.model_files.families import FAMILIES

    layer = LayerWeights(torch.randn(4, 128), torch.randn(96, 4), 1.0)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    file = home / "one.safetensors"
    save_adapter(AdapterWeights({("unet", name): layer}), file, FAMILIES["tiny"])
    return file


def test_a_moved_slider_runs_in_the_files_that_are_listed(executed: dict[str, set[str]]) -> None:
    listed = reading_path("From the slider to the image")
    for file, names in executed.items():
        if not file.removeprefix("lora_core/").startswith(ELSEWHERE):
            assert file in listed or names <= HELPERS.get(file, set()), (
                file,
                names - HELPERS.get(file, set()),
            )
    assert set(listed) <= executed.keys(), "a file is listed that no preview needs"
