"""The verbs about a dataset: what they print, what programs read, what they refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_core.__main__ import main
from lora_core.formats.io import save_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.system.files import DEMO_BASE

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "set"
    made.mkdir()
    for file in sorted((DEMO_BASE / "check").glob("0[1-3]-*")):
        shutil.copy(file, made / file.name)
    return made


def test_audit_says_what_will_be_learned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "demo", "--trigger", "duskprint style", "--batch", "5"]) == 0
    printed = capsys.readouterr().out
    assert "17 of 24 images are mostly orange, 17 of them without saying so in the caption" in printed
    assert "learned with “duskprint style”" in printed
    assert main(["audit", "demo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"absorbed", "named", "meaning", "wording"} == {row["kind"] for row in found["learned"]}
    assert sum(row["share"] for row in found["shares"]) == pytest.approx(1)
    assert main(["audit", "demo", "--batch", "0"]) == 1
    assert capsys.readouterr().err == "--batch = 0 is out of range; it must be between 1 and 256.\n"
    for value in ("-1", "9" * 20):
        assert main(["audit", "demo", "--resolution", value]) == 1
        assert "out of range; it must be between 0 and 4,096.\n" in capsys.readouterr().err


def test_probe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(folder), "--triples", "1", "--trigger", "dog", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"triples", "helped", "standard_error", "rows", "trigger"}
    assert len(found["rows"]) == 3
    assert "dog" in [row["word"] for row in found["trigger"]["rows"] if row["given"]]
    assert main(["probe", str(folder), "--triples", "0"]) == 1
    assert "--triples = 0 is out of range" in capsys.readouterr().err


def test_pictures_of_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig().changed({"dataset.path": str(folder), "validation.pictures": 1})
    run = RunFolder.create(tmp_path / "runs" / "one", config)
    assert main(["pictures", str(run.path)]) == 1
    assert "no checkpoint yet" in capsys.readouterr().err
    run.checkpoint(3).mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    layer = LayerWeights(torch.randn(2, 128, generator=draw), 0.02 * torch.randn(96, 2, generator=draw), 2.0)
    file = run.checkpoint(3) / "adapter.safetensors"
    save_adapter(AdapterWeights({("unet", LAYER): layer}), file, FAMILIES["tiny"])
    assert main(["pictures", str(run.path), "--triples", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("% of the steps") == 2
    assert "held out" in printed
    assert main(["pictures", str(run.path), "--triples", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run.path / "pictures.json").read_text())
