"""The worker's verbs about a dataset, in this process: what they answer, that they can be cancelled, and that
the base is without adapters while they measure."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.formats.io import save_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.system.files import DEMO_BASE
from lora_core.worker import Worker

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "set"
    made.mkdir()
    for file in sorted((DEMO_BASE / "check").glob("0[1-3]-*")):
        shutil.copy(file, made / file.name)
    return made


class Asked:
    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = []
        self.worker = Worker(self._take)
        self.cancel_at = 0

    def _take(self, answer: dict[str, Any]) -> None:
        self.answers.append(answer)
        if answer["event"] == "progress" and self.cancel_at and answer["done"] >= self.cancel_at:
            self.worker.cancelled.add(answer["id"])

    def last(self, **request: Any) -> dict[str, Any]:
        self.worker.handle({"id": "1", **request})
        return self.answers[-1]


def adapter(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    layer = LayerWeights(torch.randn(4, 128, generator=draw), torch.randn(96, 4, generator=draw), 4.0)
    save_adapter(AdapterWeights({("unet", LAYER): layer}), path, FAMILIES["tiny"])
    return path


def test_captions_are_measured_on_the_bare_base_and_can_be_cancelled(folder: Path, tmp_path: Path) -> None:
    asked = Asked()
    request = {"do": "captions", "base": "demo", "dataset": str(folder), "triples": 1}
    first = asked.last(**request)
    assert first["event"] == "done", first
    assert len(first["found"]["rows"]) == 3
    assert asked.answers[-2]["event"] == "progress"
    # A picture with a strong LoRA was drawn in between, by the same base.
    lora = {"file": str(adapter(tmp_path / "a.safetensors")), "strength": 1.0}
    drawn = asked.last(
        do="generate", prompt="a", steps=1, width=64, height=64, loras=[lora], out=str(tmp_path / "drawn")
    )
    assert drawn["event"] == "done", drawn
    assert asked.last(**request)["found"] == first["found"]
    asked.cancel_at = 4
    assert asked.last(**request) == {"id": "1", "event": "error", "message": "Cancelled."}
    assert asked.worker.cancelled == set()


def test_words_for_a_trigger(folder: Path) -> None:
    answer = Asked().last(do="triggers", base="demo", dataset=str(folder), trigger="dog", triples=1)
    assert [row["word"] for row in answer["found"]["rows"] if row["given"]] == ["dog"]


def test_pictures_of_a_run(folder: Path, tmp_path: Path) -> None:
    config = RunConfig().changed({"dataset.path": str(folder), "validation.pictures": 0})
    run = RunFolder.create(tmp_path / "runs" / "one", config)
    asked = Asked()
    assert "no checkpoint yet" in asked.last(do="pictures", run=str(run.path))["message"]
    adapter(run.checkpoint(3) / "adapter.safetensors")
    answer = asked.last(do="pictures", run=str(run.path), triples=1)
    assert (answer["event"], answer["found"]["step"]) == ("done", 3)
    assert all(row["gain"] for row in answer["found"]["rows"])
    assert (run.path / "pictures.json").is_file()
