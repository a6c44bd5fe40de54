"""verify on files of other tools against what those tools did with such files, and what else is made of them.

`TABLE` is a run of 2026-11-28 of the tools' own loaders (A1111 1.10.1, Forge dfdcbab6, ComfyUI 0.8.0,
InvokeAI 8e71a8a5, sd-scripts 48d368fa, diffusers 0.42.1, PyTorch 2.13) on files of these kinds: how many keys
each tool took, with "!" where a layer was changed otherwise than the file means, or not at all. Where the run
could not see the truth the loader's source decides, as said beside the row. Forge's and InvokeAI's own code
was run on the files made here as well, with the same counts.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_core.cli import main, note_extras
from lora_core.formats.io import convert_adapter, load_adapter
from lora_core.formats.layers import layer_of_prefix
from lora_core.formats.verify import verify_adapter
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.header import read_header
from tests.formats.conftest import same_bits
from tests.formats.foreign_files import FILES, HEADERS, PEFT_LEAVES, PLAIN, SD15, comfy_name, kohya, norms
from tests.formats.odd_files import serialised

TOOLS = ("A1111", "Forge", "ComfyUI", "InvokeAI", "kohya", "diffusers")
TABLE = {
    # name: keys in the file, then what each tool takes of them, in the order of TOOLS.
    "aitoolkit_peft_stems": (36, "36 36 36 0 0 0"),
    "diffusers_attnprocs": (16, "0 16 16 0 0 16"),
    "kohya_alpha1d": (54, "54 54 54 54 54 54"),
    "kohya_alphaint": (54, "54 54 54 54 54 54"),
    "kohya_bf16": (54, "54 54 54 54 54 54"),
    "kohya_fp16": (54, "54 54 54 54 54 54"),
    "kohya_fp8": (54, "54 54 54 54 54 54"),
    "kohya_ldm_names": (54, "54 54 54 18 18 0"),
    # Forge and ComfyUI change the bias; A1111 and InvokeAI take the layer and pass over it.
    "kohya_lora_diff_b": (55, "55 55 55 55 54 0"),
    "kohya_mixedalpha": (54, "54 54 54 54 54 54!"),
    "kohya_noalpha": (36, "36 36 36 36 36 36"),
    "kohya_plain": (54, "54 54 54 54 54 54"),
    "kohya_proj2d": (54, "54 54 54 54 0 0"),
    # diffusers drops dora_scale with a warning; the harness counted what was there to read, 80.
    "lycoris_dora_in": (80, "80 80 80 80 60! 60!"),
    "lycoris_dora_out": (80, "80! 80! 80! 80! 60! 60!"),
    # Some of the layers have no bias that diff_b could change.
    "lycoris_full": (40, "40 40 40 0 0 0"),
    "lycoris_locon": (69, "69 69 69 69 69 69"),
    "lycoris_loha": (115, "115 115 115 115 0 0"),
    "lycoris_loha_tucker": (121, "121 121 121 121 0 0"),
    "lycoris_lokr": (92, "92 92 92 0 0 0"),
    "lycoris_lokr_both": (115, "115 115 115 0 0 0"),
    "lycoris_lokr_full": (69, "69 69 69 69 0 0"),
    "lycoris_lokr_tucker": (95, "95 0 95! 0 0 0"),
    "lycoris_lora_norm": (56, "56 56 56 56 54 0"),
    # A run of 2026-11-29 (ComfyUI 0.3.68, A1111's extension as forks of 2026 have it). ComfyUI takes alpha
    # for the limit of |Q|, LyCORIS and A1111 alpha for each output; in the second file ComfyUI's is reached.
    "lycoris_oft": (46, "46 0 46 0 0 0"),
    "lycoris_oft_limited": (46, "46 0 46! 0 0 0"),
    "lycoris_tucker": (72, "72 72 72 72 0 0"),
    # A1111 makes textual inversions of them (networks.py, load_network), for which the harness had none.
    "onetrainer_bundle": (55, "55 54 54 55 54 0"),
    "onetrainer_te1": (54, "54 54 54 36 36 54"),
    "peft_lora_A": (36, "0 0 20 0 0 36"),
    "peft_lora_down": (36, "0 0 20 0 0 0"),
    "peft_meta": (36, "0 0 20! 0 0 36"),
    "peft_meta_rslora": (36, "0 0 20 0 0 36"),
    "simpletuner_alpha": (54, "0 0 30 0 0 0"),
    "sdxl_comfy_diffusion_model": (54, "0 54 54 0 0 0"),
    "sdxl_kohya_diffusers_names": (54, "54 54 54 54 54 54"),
}


def written(folder, name):
    path = folder / f"{name}.safetensors"
    if not path.exists():
        path.write_bytes(serialised(FILES[name](), HEADERS.get(name, {})))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("foreign")


@pytest.mark.parametrize("name", TABLE)
def test_the_same_as_the_tools_own_loaders(folder, name):
    keys, row = TABLE[name]
    family = FAMILIES["sdxl" if name.startswith("sdxl") else "sd15"]
    report = verify_adapter(written(folder, name), family)
    for tool, told, expected in zip(TOOLS, report["tools"], row.split(), strict=True):
        assert told["tool"] == tool
        assert told["keys"] == keys
        assert told["matched"] == int(expected.rstrip("!")), told
        assert told["ok"] == (expected == str(keys)), told
        if told["ok"]:
            assert told["max_delta_error"] in (None, 0.0)
            assert "reads every key" in told["note"]
        else:
            assert told["max_delta_error"] != 0.0 or told["dropped"]


def report_of(folder, name, weight_of=None):
    return {
        row["tool"]: row for row in verify_adapter(written(folder, name), SD15, weight_of=weight_of)["tools"]
    }


def base_weight(layer):
    """A base's weight as large as the updates of the files here."""
    return torch.randn(family_layout(SD15)[layer], generator=torch.Generator().manual_seed(len(layer[1]))) / 8


def norm(weight, axis):
    return weight.pow(2).sum([n for n in range(weight.dim()) if n != axis], keepdim=True).sqrt()


@pytest.mark.parametrize("name", ["lycoris_dora_in", "lycoris_dora_out"])
def test_the_error_of_a_dora_is_measured_on_its_base(folder, name):
    """By the loaders' formulas, worked out in full.

    A1111 and InvokeAI norm columns, Forge and ComfyUI take the base rows' norms where the file has rows,
    kohya and diffusers apply no magnitude.
    """
    tensors = load_file(written(folder, name))
    worst = dict.fromkeys(TOOLS, 0.0)
    axis = 0 if name.endswith("out") else 1
    for key in tensors:
        stem, _, leaf = key.partition(".")
        if leaf != "dora_scale":
            continue
        layer = layer_of_prefix(stem, SD15)
        weight, scale = base_weight(layer), tensors[key]
        up, down = (tensors[f"{stem}.lora_{half}.weight"].flatten(1) for half in ("up", "down"))
        product = up @ down
        merged = weight + (2 / 4 * product).reshape(weight.shape)
        right = merged * scale / norm(merged, axis) - weight
        columns = merged * scale / norm(merged, 1) - weight
        rows = columns if axis else merged * scale / norm(weight, 0) - weight
        found = (columns, rows, rows, columns, merged - weight, merged - weight)
        for tool, got in zip(TOOLS, found, strict=True):
            worst[tool] = max(worst[tool], float((got - right).norm() / right.norm()))
    told = {tool: row["max_delta_error"] for tool, row in report_of(folder, name, base_weight).items()}
    assert told == pytest.approx(worst, rel=1e-3, abs=1e-5)
    assert worst["kohya"] > 0.1
    unknown = report_of(folder, name)
    assert unknown["kohya"]["max_delta_error"] is None
    if axis == 0:
        assert unknown["ComfyUI"]["max_delta_error"] is None
        assert "--base" in unknown["ComfyUI"]["note"]


@pytest.mark.parametrize(
    ("name", "tool", "words"),
    [
        ("lycoris_lokr_tucker", "Forge", "kron"),
        ("lycoris_lokr_tucker", "ComfyUI", "skips 3 layers of Tucker form"),
        ("lycoris_loha", "kohya", "merge it into a plain LoRA with --rank"),
        ("lycoris_lokr", "InvokeAI", "cannot tell which base"),
        ("lycoris_full", "InvokeAI", "has no bias"),
        ("lycoris_oft", "Forge", "here are 23"),
        ("lycoris_oft", "InvokeAI", "merge it into a plain LoRA with --rank"),
        ("lycoris_oft", "ComfyUI", "right strength if that is 1; it takes the square of any other"),
        ("lycoris_oft_limited", "ComfyUI", "turns 23 layers less than the file means"),
        ("lycoris_full", "kohya", "no plain LoRA can hold it"),
        ("lycoris_lora_norm", "kohya", "convert leaves them out"),
        ("onetrainer_bundle", "ComfyUI", "bundle_emb.cat.clip_l"),
        ("onetrainer_bundle", "InvokeAI", "makes no use of 'bundle_emb.cat.clip_l'"),
        ("kohya_lora_diff_b", "A1111", "makes no use of"),
        ("kohya_lora_diff_b", "ComfyUI", "right strength"),
    ],
)
def test_the_note_says_why(folder, name, tool, words):
    assert words in report_of(folder, name)[tool]["note"]


def test_norm_layers_in_the_text_encoder_suit_fewer_tools(folder):
    """ComfyUI and Forge map no norm of a text encoder under kohya's names (LORA_CLIP_MAP)."""
    stem = "lora_te_text_model_encoder_layers_0_layer_norm1"
    path = folder / "text norms.safetensors"
    both = {f"{stem}.{leaf}": torch.ones(768) for leaf in ("w_norm", "b_norm")}
    path.write_bytes(serialised(FILES["kohya_plain"]() | both, {}))
    matched = {row["tool"]: row["matched"] for row in verify_adapter(path, SD15)["tools"]}
    assert matched == {"A1111": 56, "Forge": 54, "ComfyUI": 54, "InvokeAI": 56, "kohya": 54, "diffusers": 0}


EXTRAS = {
    "kohya_lora_diff_b": "changes of biases (1 tensor)",
    "lycoris_lora_norm": "changes of norm layers (2 tensors)",
    "onetrainer_bundle": "bundled embeddings (1 tensor)",
}


@pytest.mark.parametrize("name", EXTRAS)
def test_what_can_be_taken_is_taken_and_the_rest_is_named(folder, tmp_path, capsys, name):
    source, target = written(folder, name), tmp_path / "converted.safetensors"
    bundle = name == "onetrainer_bundle"
    # New tokens are kept, and can be used in prompts.
    kept = f"new tokens are in files of their own too, in {tmp_path / 'converted-tokens'}"
    assert main(["convert", str(source), str(target), "--to", "kohya"]) == 0
    assert (kept if bundle else EXTRAS[name]) in capsys.readouterr().out
    weights = load_adapter(source, SD15)
    assert same_bits(weights, load_adapter(target, SD15))
    assert list(weights.tokens.get("text_encoder", {})) == ["cat"] * bundle
    assert repr(weights.tokens) == repr(load_adapter(target, SD15).tokens)
    assert len(weights.layers) == 18
    assert main(["merge", str(source), str(source), "--out", str(tmp_path / "merged.safetensors")]) == 0
    assert EXTRAS[name] in capsys.readouterr().out
    assert main(["inspect", str(source), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["problem"]) == ("LoRA", "")
    assert report["extras"] == "" if bundle else EXTRAS[name] in report["extras"]
    assert report["new_tokens"] == ({"cat": 2} if bundle else {})
    small = tmp_path / "small.safetensors"
    assert main(["shrink", str(source), "--rank", "2", "--out", str(small)]) == 0
    assert (EXTRAS[name] in capsys.readouterr().out) is not bundle
    assert repr(load_adapter(small, SD15).tokens) == repr(weights.tokens)


def test_generate_says_on_stderr_what_it_leaves_out(folder, capsys):
    files = ("onetrainer_bundle", "kohya_plain", "kohya_lora_diff_b")
    note_extras([written(folder, name) for name in files])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert EXTRAS["kohya_lora_diff_b"] in said.err


def test_a_loha_with_more_beside_it_is_merged(folder, tmp_path, capsys):
    path = tmp_path / "loha.safetensors"
    path.write_bytes(serialised(FILES["lycoris_loha"]() | norms(), {}))
    assert main(["merge", str(path), "--rank", "2", "--out", str(tmp_path / "m.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "norm layers (2 tensors)" in out
    # The loss of the approximation, and no word on a second one, which loses nothing.
    assert out.count("At rank 2") == 1
    assert "nothing is lost" not in out


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_comfyuis_own_names(tmp_path, family):
    """The same factors under kohya's names and ComfyUI's."""
    row = FAMILIES[family]
    layers = PLAIN
    if family == "sdxl":
        layers = [layer for layer in family_layout(row) if "down_blocks.1.attentions.0" in layer[1]]
    path, other = tmp_path / "comfy.safetensors", tmp_path / "kohya.safetensors"
    comfy = kohya(layers, comfy_name, family=row, leaves=PEFT_LEAVES)
    named = kohya(layers, family=row)
    path.write_bytes(serialised(comfy, {}))
    other.write_bytes(serialised(dict(zip(named, comfy.values(), strict=True)), {}))
    assert same_bits(load_adapter(path, row), load_adapter(other, row))
    assert convert_adapter(path, tmp_path / "out.safetensors", "kohya") == []
    assert verify_adapter(tmp_path / "out.safetensors")["ok"]


def test_a_converted_file_has_an_alias_of_its_own(folder, tmp_path):
    source = tmp_path / "source.safetensors"
    texts = {"ss_output_name": "old", "modelspec.title": "old", "ss_seed": "7"}
    source.write_bytes(serialised(FILES["kohya_plain"](), texts))
    convert_adapter(source, tmp_path / "new.safetensors", "kohya")
    found = read_header(tmp_path / "new.safetensors").metadata
    assert [found[key] for key in texts] == ["new", "new", "7"]
