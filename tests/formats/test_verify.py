"""verify against the tools' own loaders, whose doings are written down, and against the specification.

`loader_runs.json` holds what the real loaders did with the files of `odd_files.py`; the specification's table
(formats.md) is another run of the same loaders on other files.
"""

import json
from pathlib import Path

import pytest

from lora_core.formats.container import serialised
from lora_core.formats.layout import family_layout
from lora_core.formats.verify import tool_outcomes, verified
from lora_core.spec.tensor_file import read_header
from tests.formats.odd_files import ALL, FAMILIES_HERE, odd_file

RUNS = json.loads((Path(__file__).parent / "loader_runs.json").read_text(encoding="utf-8"))
TOOLS = RUNS["tools"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "f.safetensors"


def written(path, family, case, layout=None):
    tensors, metadata = odd_file(case, family, layout or family_layout(family))
    path.write_bytes(serialised(tensors, metadata))
    return path


def narrow(family):
    """The family's layers at an eighth of their widths: what decides here are names, not sizes."""
    return {
        layer: (max(shape[0] // 8, 1), max(shape[1] // 8, 1), *shape[2:])
        for layer, shape in family_layout(family).items()
    }


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_the_same_as_the_tools_own_loaders(path, name, case):
    family = FAMILIES_HERE[name]
    outcomes = tool_outcomes(written(path, family, case, narrow(family)), family)
    found = {
        tool: [len(outcome.used), round(sum(used.scale for used in outcome.used.values()), 3)]
        for tool, outcome in outcomes.items()
    }
    assert found == dict(zip(TOOLS, RUNS[name][case], strict=True))


EVERY = dict.fromkeys(TOOLS, "exact")
# The table of formats.md, row by row: "exact"; "strength": all layers, some at a wrong one; "none"; or the
# share of layers in per cent. Where it gives a range, the numbers are SD1, SD2, SDXL.
TABLE = {
    "default targets": EVERY,
    "attention only": EVERY,
    "LoCon": EVERY,
    "mixed ranks, one alpha": EVERY,
    "text encoders only": {"sd15": EVERY, "sd2": EVERY, "sdxl": EVERY | {"InvokeAI": "none"}},
    "mixed alphas": EVERY | {"diffusers": "strength"},
    "lora_A in kohya stems": (
        EVERY | {"diffusers": "none", "A1111": "strength", "kohya": "none", "InvokeAI": "none"}
    ),
    "no text_model level": {
        name: dict.fromkeys(TOOLS, share) | {"Forge": "none", "diffusers": last}
        for name, share, last in (("sd15", 73, "exact"), ("sd2", 58, "exact"), ("sdxl", 73, "none"))
    },
    "q only": {
        name: EVERY | {"diffusers": "none", "A1111": share}
        for name, share in (("sd15", "exact"), ("sd2", 58), ("sdxl", 83))
    },
    "2-D and 4-D exchanged": {"sd15": EVERY | {"diffusers": "none", "kohya": "none"}},
    "diffusers' block names": {"sdxl": EVERY},
    "diffusers' block names, LoCon": {"sdxl": EVERY | {"A1111": "one less"}},
    "PEFT": {
        name: (
            {"diffusers": "exact", "ComfyUI": share, "A1111": "none", "kohya": "none", "InvokeAI": "none"}
            | ({"Forge": "none"})
        )
        for name, share in (("sd15", 52), ("sd2", 61), ("sdxl", 43))
    },
}
ROWS = [
    (name, case)
    for case, tools in TABLE.items()
    for name in FAMILIES_HERE
    if name in tools or "A1111" in tools
]


@pytest.mark.parametrize(("name", "case"), ROWS)
def test_the_table_of_the_specification(path, name, case):
    family = FAMILIES_HERE[name]
    expected = TABLE[case].get(name, TABLE[case])
    report = verified(written(path, family, case), family)
    layers = sum(key.endswith(("lora_down.weight", "lora_A.weight")) for key in read_header(path).tensors)
    for row in report["tools"]:
        want = expected[row["tool"]]
        used = sum(1 for key in row["dropped"] if key.endswith(("lora_down.weight", "lora_A.weight")))
        share = round(100 * (layers - used) / layers)
        if want == "exact":
            assert (row["dropped"], row["max_delta_error"]) == ([], 0), row
            assert "right strength" in row["note"]
        elif want == "strength":
            assert share == 100, row
            assert row["max_delta_error"] > 0.1
            assert "strength" in row["note"]
        elif want == "none":
            assert (row["matched"], row["max_delta_error"]) == (0, 1), row
            assert "loads nothing" in row["note"]
        elif want == "one less":
            assert used == 1
        else:
            assert abs(share - want) <= 1, row
            assert row["max_delta_error"] == 1
    meant = report["tools"] if report["format"] == "kohya" else report["tools"][-1:]
    assert report["ok"] == all(row["ok"] for row in meant)
    assert all("\n" not in row["note"] and len(row["note"]) < 400 for row in report["tools"])
