"""The verb `merge`, through the command line."""

import json
import os
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.__main__ import main
from lora_core.errors import ConfigError
from lora_core.formats.io import file_hashes, load_adapter, save_adapter
from lora_core.formats.verify import inspect_file
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.header import read_header
from lora_core.tools.delta import BaseWeights
from lora_core.tools.merge import parse_block_weights

SD15, TINY = FAMILIES["sd15"], FAMILIES["tiny"]
BLOCK = "mid_block.attentions.0"
TO_K = ("unet", f"{BLOCK}.transformer_blocks.0.attn2.to_k")
PROJ = ("unet", f"{BLOCK}.proj_in")
TEXT = ("text_encoder", "text_model.encoder.layers.1.self_attn.q_proj")


def adapter(family, seed, rank, alpha, keys=(TO_K, PROJ, TEXT)):
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for key in keys:
        out, inside, *kernel = family_layout(family)[key]
        down = torch.randn(rank, inside, *kernel, generator=draw)
        layers[key] = LayerWeights(down, torch.randn(out, rank, *(1 for _ in kernel), generator=draw), alpha)
    return AdapterWeights(layers)


@pytest.fixture
def files(tmp_path):
    """Two adapters for SD 1.x, one with each format, with headers as after a run."""
    one, two = tmp_path / "one.safetensors", tmp_path / "my two.safetensors"
    header = {"ss_sd_model_name": "sd-v1-5", "ss_resolution": "(512, 512)", "lora_easel.config": "seed = 1"}
    header |= {"ss_tag_frequency": '{"set": {"owl": 3}}', "modelspec.trigger_phrase": "ohwx owl"}
    save_adapter(adapter(SD15, 1, 4, 2.0), one, SD15, dtype="fp16", metadata=header)
    header |= {"ss_tag_frequency": '{"set": {"cat": 5}}', "modelspec.trigger_phrase": "zkx cat"}
    header |= {"ss_resolution": "(768, 768)"}
    save_adapter(adapter(SD15, 2, 3, 3.0, (TO_K, TEXT)), two, SD15, format="diffusers", metadata=header)
    return one, two


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out.strip().splitlines(), said.err.strip()


def test_an_exact_merge(files, tmp_path, capsys):
    one, two = files
    out = tmp_path / "both.safetensors"
    code, lines, _ = run(capsys, "merge", f"{one}:0.5:0.25", f"{two}:-2", "--out", out)
    assert (code, lines[-1]) == (0, str(out))
    assert "3 layers of ranks 4 to 7 from 2 files" in lines[0]
    a, b, found = (load_adapter(path).layers for path in (one, two, out))
    for key, strength in ((TO_K, 0.5), (TEXT, 0.25)):
        expected = strength * a[key].delta().double() - 2 * b[key].delta().double()
        torch.testing.assert_close(found[key].delta().double(), expected, rtol=1e-5, atol=1e-5)
    assert found[PROJ].down.shape == (4, 1280, 1, 1)
    assert all(t.dtype == torch.float32 for t in load_file(out).values())
    report = inspect_file(out)
    assert (report["family"], report["format"], report["alphas"]) == ("sd15", "kohya", [7.0])
    assert report["hash_matches"] is True


def test_the_header_and_the_side_file_say_what_was_merged(files, tmp_path, capsys):
    one, two = files
    out = tmp_path / "both.safetensors"
    run(capsys, "merge", f"{one}:0.5", two, one, "--out", out)
    metadata = read_header(out).metadata
    assert json.loads(metadata["lora_easel.merged"]) == [
        {"name": name, "sha256": file_hashes(path)["sha256"][:12], "strength": s, "text_strength": s}
        for name, path, s in (("one", one, 0.5), ("my two", two, 1.0), ("one", one, 1.0))
    ]
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "both"
    assert metadata["modelspec.merged_from"] == "one, my two, one"
    assert metadata["modelspec.trigger_phrase"] == "ohwx owl, zkx cat"
    assert metadata["ss_sd_model_name"] == "sd-v1-5"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    # What the files do not agree on, and settings of one run, are not those of the merge.
    assert not {"ss_resolution", "lora_easel.config"} & metadata.keys()
    tags = json.loads(metadata["ss_tag_frequency"])
    assert tags["set"] == {"owl": 3}
    assert tags["my two set"] == {"cat": 5}
    assert str(tmp_path) not in json.dumps(metadata)
    side = json.loads(out.with_suffix(".json").read_text())
    assert side["activation text"] == "ohwx owl, zkx cat"


def test_a_rank_and_a_precision(files, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    code, lines, _ = run(capsys, "merge", *files, "--out", out, "--rank", 2, "--precision", "bf16")
    assert code == 0
    assert re.search(
        r"At rank 2 .* by \d+\.\d\d% of its norm; the worst layer, text_encoder\..*, by", lines[1]
    )
    assert inspect_file(out)["ranks"] == [2]
    assert {t.dtype for k, t in load_file(out).items() if "lora_" in k.split(".", 1)[1]} == {torch.bfloat16}


def test_block_weights(files, tmp_path, capsys):
    table, out = tmp_path / "table.toml", tmp_path / "out.safetensors"
    table.write_text("text_encoder = [0, 1]\n'attn2\\.to_[kv]' = 0.5\n")
    assert run(capsys, "merge", *files, "--out", out, "--blocks", table)[0] == 0
    a, b, found = (load_adapter(path).layers for path in (*files, out))
    torch.testing.assert_close(found[TEXT].delta(), b[TEXT].delta())
    torch.testing.assert_close(
        found[TO_K].delta(), (a[TO_K].delta() + b[TO_K].delta()) / 2, rtol=1e-5, atol=1e-5
    )
    code, _, error = run(
        capsys, "merge", *files, "--out", tmp_path / "x.safetensors", "--blocks", "up=1,md=2"
    )
    assert code == 1
    assert "'up' of --blocks matches no layer" in error


def loha(path, base_version="easel_tiny", **more):
    draw = torch.Generator().manual_seed(6)
    out, inside = family_layout(TINY)[TO_K]
    stem = f"lora_unet_{TO_K[1].replace('.', '_')}"
    tensors = {
        f"{stem}.hada_w{n}_{half}": torch.randn(*((out, 2) if half == "a" else (2, inside)), generator=draw)
        for n in "12"
        for half in "ab"
    }
    tensors |= {f"{stem}.alpha": torch.tensor(1.0)} | {
        f"{stem}.{leaf}": tensor for leaf, tensor in more.items()
    }
    save_file(tensors, path, {"ss_base_model_version": base_version})
    pairs = [tensors[f"{stem}.hada_w{n}_a"] @ tensors[f"{stem}.hada_w{n}_b"] for n in "12"]
    return 0.5 * pairs[0] * pairs[1]


def test_a_loha_becomes_a_plain_lora_and_the_error_is_told(tmp_path, capsys):
    source, out = tmp_path / "ha.safetensors", tmp_path / "plain.safetensors"
    expected = loha(source)
    code, _, error = run(capsys, "merge", source, "--out", out)
    assert (code, out.exists()) == (1, False)
    assert "give --rank" in error
    code, lines, _ = run(capsys, "merge", f"{source}:2", "--out", out, "--rank", 3)
    assert code == 0
    values = torch.linalg.svdvals(expected)
    share = float((values[3:].square().sum() / values.square().sum()).sqrt())
    assert (
        f"ha.safetensors as a plain LoRA: At rank 3 the update differs from the original by {share:.2%}"
        in lines[0]
    )
    found = load_adapter(out).layers[TO_K]
    assert float((found.delta() - 2 * expected).norm() / (2 * expected).norm()) == pytest.approx(
        share, rel=1e-3
    )
    assert inspect_file(out)["kind"] == "LoRA"
    # Four is the rank of a product of two of rank 2.
    whole = tmp_path / "whole.safetensors"
    _, lines, _ = run(capsys, "merge", source, "--out", whole, "--rank", 4)
    assert "nothing is lost but rounding" in lines[0]


def test_a_dora_needs_its_base(tmp_path, capsys):
    source, out = tmp_path / "do.safetensors", tmp_path / "plain.safetensors"
    loha(source, dora_scale=torch.ones(family_layout(TINY)[TO_K][0], 1))
    code, _, error = run(capsys, "merge", source, "--out", out, "--rank", 3)
    assert (code, out.exists()) == (1, False)
    assert "give --base" in error
    code, lines, _ = run(capsys, "merge", source, "--out", out, "--rank", 3, "--base", "demo")
    assert code == 0
    assert "differs from the original" in lines[0]


def test_an_oft_needs_its_base_and_goes_into_it(tmp_path, capsys):
    source, out = tmp_path / "oft.safetensors", tmp_path / "plain.safetensors"
    sides = family_layout(TINY)[TO_K][0] // 8, 8, 8
    blocks = torch.randn(sides, generator=torch.Generator().manual_seed(2)) / 8
    name = f"lora_unet_{TO_K[1].replace('.', '_')}.oft_blocks"
    save_file({name: blocks}, source, {"ss_base_model_version": "easel_tiny"})
    for arguments, words in ((["--rank", 3], "is an OFT, whose .*give --base"), ([], "is an OFT, .* --rank")):
        refused(capsys, words, source, "--out", out, *arguments)
    code, lines, _ = run(capsys, "merge", source, "--out", out, "--rank", 3, "--base", "demo")
    assert code == 0
    assert "differs from the original" in lines[0]
    assert inspect_file(source)["kind"] == "OFT"
    assert inspect_file(source)["ranks"] == [8]
    folder = tmp_path / "base"
    assert run(capsys, "merge", source, "--into-base", "demo", "--out", folder)[0] == 0
    old, new = BaseWeights("demo").weight(TO_K), BaseWeights(str(folder)).weight(TO_K)
    assert not torch.equal(new, old)
    torch.testing.assert_close(new.norm(dim=0), old.norm(dim=0), rtol=2e-3, atol=2e-3)


def test_kinds_are_merged_with_each_other(tmp_path, capsys):
    odd, even, out = (tmp_path / f"{name}.safetensors" for name in ("odd", "even", "out"))
    expected = loha(odd)
    save_adapter(adapter(TINY, 1, 2, 2.0, (TO_K,)), even, TINY)
    assert run(capsys, "merge", odd, even, "--out", out, "--rank", 6)[0] == 0
    expected = expected + load_adapter(even).layers[TO_K].delta()
    torch.testing.assert_close(load_adapter(out).layers[TO_K].delta(), expected, rtol=1e-3, atol=1e-3)


def test_into_a_base(tmp_path, capsys):
    lora, out = tmp_path / "one.safetensors", tmp_path / "out"
    save_adapter(adapter(TINY, 1, 2, 2.0), lora, TINY)
    code, lines, _ = run(capsys, "merge", f"{lora}:0.1", "--into-base", "demo", "--out", out)
    assert (code, lines) == (0, ["3 layers of the base changed by one file.", str(out)])
    assert sorted(os.listdir(out)) == sorted(
        [
            "README.md",
            "easel.json",
            "model_index.json",
            "scheduler",
            "text_encoder",
            "tokenizer",
            "unet",
            "vae",
        ]
    )
    picture = tmp_path / "a.png"
    generate = ("generate", "--prompt", "x", "--steps", 1, "--precision", "fp32")
    assert run(capsys, *generate, "--base", out, "--out", picture)[0] == 0
    for option in ("--rank=3", "--precision=fp16", "--base=demo"):
        code, _, error = run(capsys, "merge", lora, "--into-base", "demo", "--out", tmp_path / "b", option)
        assert code == 1
        assert f"{option.partition('=')[0]} goes with a merged adapter" in error


def refused(capsys, words, *arguments):
    code, lines, error = run(capsys, "merge", *arguments)
    assert (code, lines) == (1, [])
    assert re.search(words, error), error
    assert "\n" not in error
    assert "Traceback" not in error


def test_what_does_not_go_together(files, tmp_path, capsys):
    one, two = files
    out = tmp_path / "out.safetensors"
    other = tmp_path / "tiny.safetensors"
    save_adapter(adapter(TINY, 1, 2, 2.0), other, TINY)
    refused(
        capsys,
        "one.*is for Stable Diffusion 1.x and .*tiny.* for Embedded tiny base",
        one,
        other,
        "--out",
        out,
    )
    refused(capsys, "already exists", one, "--out", two)
    refused(capsys, "should end in .safetensors", one, "--out", tmp_path / "out")
    refused(capsys, "cannot be written", one, "--out", tmp_path / "no" / "out.safetensors")
    refused(capsys, "does not exist", one, tmp_path / "no.safetensors", "--out", out)
    refused(capsys, "not a finite number", f"{one}:nan", "--out", out)
    refused(capsys, "nothing is left", f"{one}:0", "--out", out)
    refused(capsys, "--rank 0", one, "--out", out, "--rank", 0)
    assert not out.exists()


def test_a_file_that_does_not_say_its_family_is_of_the_others(files, tmp_path, capsys):
    one, _ = files
    silent, out = tmp_path / "silent.safetensors", tmp_path / "out.safetensors"
    tensors = {k: t for k, t in load_file(one).items() if "proj_in" in k}
    save_file(tensors, silent)
    refused(capsys, "name its base with --base", silent, "--out", out)
    assert run(capsys, "merge", silent, one, "--out", out)[0] == 0
    torch.testing.assert_close(
        load_adapter(out).layers[PROJ].delta(), 2 * load_adapter(one).layers[PROJ].delta()
    )


def test_a_side_file_of_somebody_else_stays(files, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.with_suffix(".json").write_text("mine")
    assert run(capsys, "merge", files[0], "--out", out)[0] == 0
    assert out.with_suffix(".json").read_text() == "mine"


def spoiled(good, path, how):
    """The file, broken in one way."""
    raw = good.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    name = next(name for name in header if name.endswith("lora_down.weight"))
    new = json.loads(json.dumps(header))
    if how == "cut short":
        path.write_bytes(raw[:-100])
        return path
    if how == "header cut":
        path.write_bytes(raw[:200])
        return path
    if how == "header length lies":
        path.write_bytes(struct.pack("<Q", 2**40) + raw[8:])
        return path
    if how == "web page":
        path.write_bytes(b"<!DOCTYPE html><html>Not found</html>")
        return path
    if how == "pickle":
        path.write_bytes(b"\x80\x02}q\x00." + raw)
        return path
    if how == "empty":
        path.write_bytes(b"")
        return path
    if how == "negative offsets":
        new[name]["data_offsets"] = [-8, new[name]["data_offsets"][1]]
    elif how == "overlap":
        other = next(n for n in header if n.endswith("lora_up.weight"))
        new[name]["data_offsets"] = new[other]["data_offsets"]
    elif how == "ten gigabytes":
        new[name] |= {"shape": [50000, 50000], "data_offsets": [0, 10**10]}
    elif how == "shape":
        new[name]["shape"] = [1, 1]
    elif how == "type":
        new[name]["dtype"] = "F4"
    else:
        tensors = load_file(good)
        if how == "half a pair":
            del tensors[name]
        elif how == "NaN":
            tensors[name][0, 0] = float("nan")
        elif how == "infinity":
            tensors[name.replace("down", "up")][0, 0] = float("-inf")
        elif how == "ranks differ":
            tensors[name] = torch.ones(9, *tensors[name].shape[1:])
        elif how == "three sides":
            tensors[name] = torch.ones(4, 3, 3)
        elif how == "alpha":
            tensors[name.replace("lora_down.weight", "alpha")] = torch.tensor(float("nan"))
        save_file(tensors, path, header["__metadata__"])
        return path
    text = json.dumps(new).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "how",
    [
        "cut short", "header cut", "header length lies", "web page", "pickle", "empty", "negative offsets",
        "overlap", "ten gigabytes", "shape", "type", "half a pair", "NaN", "infinity", "ranks differ",
        "three sides", "alpha",
    ],
)  # fmt: skip
def test_broken_files_get_one_sentence_and_nothing_is_written(files, tmp_path, capsys, how):
    one, _ = files
    bad = spoiled(one, tmp_path / "bad.safetensors", how)
    before = sorted(os.listdir(tmp_path))
    out = tmp_path / "out.safetensors"
    refused(capsys, "bad.safetensors", bad, one, "--out", out)
    refused(capsys, "bad.safetensors", one, bad, "--out", out, "--rank", 2)
    for kind in ("kohya", "diffusers"):
        assert run(capsys, "convert", bad, out, "--to", kind)[0] == 1
    code, _, error = run(capsys, "merge", bad, "--into-base", "demo", "--out", tmp_path / "base")
    assert code == 1
    assert "\n" not in error
    assert sorted(os.listdir(tmp_path)) == before


def test_a_pattern_that_cannot_be_read_is_named():
    with pytest.raises(ConfigError, match=r"The pattern '\(\?=x\)' of --blocks cannot be used"):
        parse_block_weights("mid_block=1,(?=x)=0.5", 2)


@pytest.mark.parametrize("strength", ["1e300", "-1e31"])
def test_a_strength_that_overflows_is_named(files, tmp_path, capsys, strength):
    out = tmp_path / "out.safetensors"
    assert main(["merge", f"{files[0]}:{strength}", "--out", str(out)]) == 1
    assert f"The strength {float(strength):g} of {files[0]} is out of range" in capsys.readouterr().err
    assert not out.exists()
