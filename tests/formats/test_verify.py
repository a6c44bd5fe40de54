"""verify against the tools' own loaders, whose doings are written down, and against the specification.

`loader_runs.json` holds what the real loaders did with the files of `odd_files.py`; the specification's table
(formats.md) is another run of the same loaders on other files.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lora_core.errors import AdapterFileError
from lora_core.formats import kinds, kohya
from lora_core.formats.io import convert_adapter, load_adapter, save_adapter
from lora_core.formats.verify import run_loaders, verify_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.header import read_header
from tests.formats.odd_files import ALL, CASES, FAMILIES_HERE, odd_file, serialised

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
    outcomes = run_loaders(written(path, family, case, narrow(family)), family)
    layers = {tool: outcome.loaded.layers for tool, outcome in outcomes.items()}
    found = {
        t: [len(found), round(sum(layer.scale for layer in found.values()), 3)] for t, found in layers.items()
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
    report = verify_adapter(written(path, family, case), family)
    layers = sum(key.endswith(("lora_down.weight", "lora_A.weight")) for key in read_header(path).tensors)
    for row in report["tools"]:
        want = expected[row["tool"]]
        used = sum(1 for key in row["dropped_keys"] if key.endswith(("lora_down.weight", "lora_A.weight")))
        share = round(100 * (layers - used) / layers)
        if want == "exact":
            assert (row["dropped"], row["max_delta_error"]) == (0, 0), row
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


def adapter_for(family, layout, rank=2, alpha=lambda i: 1.0):
    """Random factors for the default targets; alpha is a function of the layer's number."""
    draw = torch.Generator().manual_seed(1)
    layers = {}
    for number, (layer, (out, inside, *kernel)) in enumerate(layout.items()):
        if ".attentions." in layer[1] or layer[1].startswith("text_model."):
            down = torch.randn(rank, inside, *kernel, generator=draw)
            up = torch.randn(out, rank, *(1 for _ in kernel), generator=draw)
            layers[layer] = LayerWeights(down, up, alpha(number))
    return AdapterWeights(layers)


@pytest.mark.parametrize("name", ["sd15", "sd2", "sd2_v", "sdxl"])
def test_our_own_exports_suit_all_six_tools(path, name):
    family = FAMILIES[name]
    live = adapter_for(family, narrow(family), alpha=lambda i: (1.0, 0.3, 7.0)[i % 3])
    save_adapter(live, path, family)
    report = verify_adapter(path, family, live)
    assert report["ok"], report
    assert [row["tool"] for row in report["tools"]] == TOOLS
    # Scaling `up` by 0.3 rounds it once, to a relative error of 6e-8.
    assert all(row["max_delta_error"] < 1e-6 for row in report["tools"])
    assert all(row["keys"] == row["matched"] == 3 * len(live.layers) for row in report["tools"])


@pytest.mark.parametrize(("precision", "error"), [("fp16", 1e-3), ("bf16", 8e-3)])
def test_rounding_is_measured_and_no_failure(path, precision, error):
    family = FAMILIES["sd15"]
    live = adapter_for(family, narrow(family))
    save_adapter(live, path, family, dtype=precision)
    report = verify_adapter(path, family, live)
    assert report["ok"]
    assert 1e-5 < report["tools"][0]["max_delta_error"] < error


def test_the_error_is_that_of_the_updates_themselves(path):
    """Against the updates formed in full, with other factors than the live adapter's."""
    family = FAMILIES["sd15"]
    file, live = (adapter_for(family, narrow(family), alpha=lambda i, a=a: a) for a in (2.0, 3.0))
    live = AdapterWeights({k: dataclasses.replace(v, down=v.down + 0.1) for k, v in live.layers.items()})
    save_adapter(file, path, family)
    expected = max(
        float((file.layers[key].delta() - layer.delta()).norm() / layer.delta().norm())
        for key, layer in live.layers.items()
    )
    report = verify_adapter(path, family, live)
    assert not report["ok"]
    assert [row["max_delta_error"] for row in report["tools"]] == pytest.approx([expected] * 6, rel=1e-4)


def test_a_layer_that_the_file_lacks_is_no_tick(path):
    family = FAMILIES["sd15"]
    live = adapter_for(family, narrow(family))
    save_adapter(AdapterWeights(dict(list(live.layers.items())[1:])), path, family)
    report = verify_adapter(path, family, live)
    assert not report["ok"]
    assert {row["max_delta_error"] for row in report["tools"]} == {1.0}
    assert "lacks layers" in report["tools"][0]["note"]


def test_a_diffusers_file_is_meant_for_diffusers_alone(path):
    family = FAMILIES["sdxl"]
    live = adapter_for(family, narrow(family), alpha=lambda i: (1.0, 2.0)[i % 2])
    save_adapter(live, path, family, format="diffusers")
    report = verify_adapter(path, family, live)
    assert report["ok"]
    *others, diffusers = report["tools"]
    assert diffusers["max_delta_error"] < 1e-6
    assert all("export as kohya" in row["note"] for row in others)


def test_mixed_alphas_are_named_with_how_far_off_they_are(path):
    family = FAMILIES["sd15"]
    live = adapter_for(family, narrow(family), alpha=lambda i: 16.0 if i % 3 else 1.0)
    save_adapter(live, path, family, keep_alphas=True)
    report = verify_adapter(path, family)
    assert not report["ok"]
    note = report["tools"][-1]["note"]
    assert "16 times too strong" in note
    assert report["tools"][-1]["max_delta_error"] == pytest.approx(15)
    assert "one alpha" in note


def test_the_embedded_base(path):
    family = FAMILIES["tiny"]
    save_adapter(adapter_for(family, family_layout(family)), path, family)
    report = verify_adapter(path)
    assert (report["ok"], report["family"]) == (True, "tiny")
    assert all("of use only with" in row["note"] for row in report["tools"])


def test_dora_and_loha_are_named(path):
    family, layout = FAMILIES["sd15"], family_layout(FAMILIES["sd15"])
    tensors = CASES["attention only"](family, layout)
    scales = {
        key.replace("lora_down.weight", "dora_scale"): torch.ones(1, tensor.shape[1])
        for key, tensor in tensors.items()
        if key.endswith("lora_down.weight")
    }
    path.write_bytes(serialised(tensors | scales, {}))
    report = verify_adapter(path)
    assert (report["ok"], report["kind"]) == (False, "DoRA")
    notes = {row["tool"]: row["note"] for row in report["tools"]}
    # Columns are normed, which four tools do as the file means.
    assert "right strength" in notes["ComfyUI"]
    assert "plain LoRA" in notes["kohya"]
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    loha = {f"{stem}.hada_w{i}_{half}": torch.ones(2, 2) for i in (1, 2) for half in "ab"}
    loha |= {f"{stem}.hada_w1_b": torch.ones(2, 768), f"{stem}.hada_w2_b": torch.ones(2, 768)}
    path.write_bytes(serialised(loha | {f"{stem}.alpha": torch.tensor(1.0)}, {}))
    report = verify_adapter(path)
    matched = {row["tool"]: row["matched"] for row in report["tools"]}
    assert matched == dict.fromkeys(TOOLS[:4], 5) | {"kohya": 0, "diffusers": 0}
    assert report["tools"][0]["max_delta_error"] is None


def test_what_cannot_be_verified_is_one_sentence(path):
    def refused(tensors, words, **more):
        path.write_bytes(serialised(tensors, {}))
        with pytest.raises(AdapterFileError, match=words) as caught:
            verify_adapter(path, **more)
        assert "\n" not in str(caught.value)

    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
    pair = {f"{stem}.lora_down.weight": torch.ones(2, 1280), f"{stem}.lora_up.weight": torch.ones(1280, 2)}
    refused(pair, "does not say which family")
    refused({"x": torch.ones(2)}, "no adapter")
    refused({"model.diffusion_model.out.2.weight": torch.ones(2)}, "whole checkpoint")
    refused({f"{stem}.lora_down.weight": torch.ones(2, 1280)}, "not the up half", family=FAMILIES["sd15"])
    bad = pair | {f"{stem}.lora_up.weight": torch.full((1280, 2), float("nan"))}
    refused(bad, "not finite", family=FAMILIES["sd15"])
    refused(pair | {f"{stem}.lora_up.weight": torch.ones(1280, 3)}, "ranks differ", family=FAMILIES["sd15"])
    xl = {key.replace("attn1", "attn2"): t for key, t in pair.items()}
    xl[f"{stem}.lora_down.weight".replace("attn1", "attn2")] = torch.ones(2, 2048)
    refused(xl, "is for Stable Diffusion XL, the base is", family=FAMILIES["sd15"])
    flux = {
        f"lora_unet_double_blocks_0_img_attn_qkv.lora_{half}.weight": torch.ones(2, 2)
        for half in ("down", "up")
    }
    refused(flux, "is for Flux")


WHICH = {
    "by version": ({"ss_base_model_version": "sd_v2_v"}, "sd2_v"),
    "by version, 512": ({"ss_base_model_version": "sd_v2"}, "sd2"),
    "by architecture": ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2_v"),
    "by prediction": ({"modelspec.prediction_type": "v"}, "sd2_v"),
    "by nothing": ({}, "sd2"),
    "old kohya": ({"ss_v2": "True"}, "sd2"),
}


@pytest.mark.parametrize("case", WHICH)
def test_the_exact_row_of_a_file(case):
    metadata, name = WHICH[case]
    shapes = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 1024)}
    assert kinds.detect_family(shapes, metadata) is FAMILIES[name]
    assert kinds.detect_family_name(shapes, metadata) == "sd2"


def test_families_without_a_cross_attention():
    """Told by what else differs: how the first text encoder is called, original names, deep transformers."""
    clip = "text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    assert kinds.detect_family_name({f"lora_te_{clip}": (4, 768)}, {}) == "sd15"
    assert kinds.detect_family_name({f"lora_te1_{clip}": (4, 768)}, {}) == "sdxl"
    assert (
        kinds.detect_family_name({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 640)}, {})
        == "sdxl"
    )
    deep = "lora_unet_mid_block_attentions_0_transformer_blocks_7_attn1_to_q.lora_down.weight"
    assert kinds.detect_family_name({deep: (4, 1280)}, {}) == "sdxl"
    assert kinds.detect_family_name({deep.replace("_7_", "_0_"): (4, 1280)}, {}) == "unknown"


@pytest.mark.parametrize("name", FAMILIES_HERE)
@pytest.mark.parametrize("case", ["LoCon", "diffusers' block names", "no text_model level", "old diffusers"])
def test_files_of_others_are_read_whole(path, name, case):
    family = FAMILIES_HERE[name]
    written(path, family, case)
    halves = [key for key in read_header(path).tensors if key.endswith(("down.weight", "lora_A.weight"))]
    weights = load_adapter(path, family)
    assert len(weights.layers) == len(halves)
    assert weights.layers.keys() <= family_layout(family).keys()


@pytest.mark.parametrize("case", ["q only", "no text_model level"])
def test_a_conversion_is_advised_only_where_it_changes_something(path, case):
    """A file of `to_q` alone has all the right names; diffusers lacks layers, which no conversion adds."""
    family = FAMILIES["sd15"]
    tools = verify_adapter(written(path, family, case))["tools"]
    notes = [row["note"] for row in tools if not row["ok"]]
    assert notes
    advised = ["convert it to kohya" in note for note in notes]
    assert advised == [case != "q only"] * len(notes), notes


def test_a_file_that_needs_no_advice_is_not_converted_for_one(path, monkeypatch):
    family = FAMILIES["sd15"]
    written(path, family, "attention only")
    monkeypatch.setattr(kohya, "to_tensors", None)
    assert verify_adapter(path)["ok"]


def test_the_advice_for_a_file_that_convert_renames_or_cuts(path):
    """Names of two formats, which `convert` makes one; a bias, for which diffusers refuses it all."""
    family = FAMILIES["sd15"]
    tensors, metadata = odd_file("attention only", family, family_layout(family))
    other = "unet.mid_block.attentions.0.proj_in"
    pair = {f"{other}.lora_A.weight": torch.ones(1, 1280), f"{other}.lora_B.weight": torch.ones(1280, 1)}
    path.write_bytes(serialised(tensors | pair, metadata))
    rows = {row["tool"]: row for row in verify_adapter(path)["tools"]}
    assert rows["A1111"]["note"].endswith("; convert it to kohya, which writes the names that all tools know")
    assert rows["A1111"]["max_delta_error"] == 1.0
    assert ("unet", other.removeprefix("unet.")) in load_adapter(path).layers
    convert_adapter(path, path.with_name("one.safetensors"), "kohya")
    assert verify_adapter(path.with_name("one.safetensors"))["ok"]
    stem = next(iter(tensors)).split(".")[0]
    path.write_bytes(serialised(tensors | {f"{stem}.diff_b": torch.ones(320)}, metadata))
    notes = {row["tool"]: row["note"] for row in verify_adapter(path)["tools"]}
    assert notes["diffusers"].endswith("; only a file without them suits it; convert leaves them out")
