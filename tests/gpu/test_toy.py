"""`python -m tests.gpu` takes all of its ways at toy size, so that it works where there is a card."""

import json
import sys
from pathlib import Path

import pytest

from lora_core.models.device import use_device
from tests.gpu import __main__ as gpu
from tests.train.conftest import one_thread
from tests.warm import program


def test_all_parts_at_toy_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program("engine"))
    with one_thread():
        code = gpu.main(
            ["--toy", "--device", "cpu", "--folder", str(tmp_path), "--out", str(tmp_path / "gpu")]
        )
    use_device("auto")
    said = capsys.readouterr().out
    assert code == 0, said
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["part"] for row in found["rows"]} == set(gpu.PARTS)
    rows = {row["what"]: row["found"] for row in found["rows"]}
    assert rows["killed (-9) and resumed"] == "the same bits, exit code -9"
    assert rows["Out of memory in step"].startswith("done; checkpointing")
    assert found["machine"]["toy"]
    table = (tmp_path / "gpu.md").read_text()
    assert "toy size" in table.splitlines()[0]
    assert table.count("\n| ") == len(rows) + 1
    # Time at toy size has no bar to meet.
    assert {row["bar"] for row in found["rows"] if row["part"] == "step_time"} == {"none"}


def test_without_a_card_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_card", lambda hidden: None)
    assert gpu.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err == "There is no graphics card in this computer.\n"
    assert gpu.main(["--device", "cuda:7"]) == 2
    assert "cuda:7 does not exist" in capsys.readouterr().err


def test_a_part_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.gpu import parts

    def broken(bench: parts.Bench):
        yield parts.Finding("first", "1")
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(parts, "memory", broken)
    found = gpu.measured(None, ["memory"])
    assert [(row.what, row.met) for row in found] == [("first", True), ("fails", False)]
