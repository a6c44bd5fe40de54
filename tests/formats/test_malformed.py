"""Malformed adapter files through `inspect` and `verify`: one sentence, at once, with little memory."""

import json
import re
import resource
import time

import pytest
import torch

from lora_core.__main__ import main
from tests.formats.conftest import raw_file
from tests.formats.odd_files import serialised
from tests.formats.test_container import MALFORMED

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


def pair(down=(4, 768), up=(1280, 4), **more):
    return {f"{STEM}.lora_down.weight": torch.ones(down), f"{STEM}.lora_up.weight": torch.ones(up), **more}


def with_value(value, dtype=torch.float32):
    tensors = pair()
    tensors[f"{STEM}.lora_up.weight"][3, 1] = value
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


INSIDE = {
    "NaN": (with_value(float("nan")), "not finite"),
    "infinity": (with_value(float("inf")), "not finite"),
    "NaN in half precision": (with_value(float("nan"), torch.float16), "not finite"),
    "NaN in bf16": (with_value(float("nan"), torch.bfloat16), "not finite"),
    "alpha is NaN": (pair(**{f"{STEM}.alpha": torch.tensor(float("nan"))}), "finite"),
    "alpha is a vector": (pair(**{f"{STEM}.alpha": torch.ones(3)}), "one number"),
    "no up": ({f"{STEM}.lora_down.weight": torch.ones(4, 768)}, "not the up half"),
    "no down": ({f"{STEM}.lora_up.weight": torch.ones(1280, 4)}, "not the down half"),
    "ranks differ": (pair(up=(1280, 5)), "ranks differ"),
    "of no dimension": (pair(down=(4,)), "shapes"),
    "of three dimensions": (pair(down=(4, 768, 1)), "shapes"),
    "empty": (pair(down=(0, 768), up=(1280, 0)), "shapes"),
    "integers": ({key: tensor.long() for key, tensor in pair().items()}, "floating-point"),
    "PEFT without its B": (
        {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(4, 8)},
        "up half",
    ),
}


def run(verb, path, capsys, *more):
    started = time.process_time()
    code = main([verb, str(path), *more])
    captured = capsys.readouterr()
    assert time.process_time() - started < 2
    return code, captured.out, captured.err


@pytest.mark.parametrize("verb", ["inspect", "verify"])
@pytest.mark.parametrize("case", MALFORMED)
def test_broken_headers(tmp_path, capsys, verb, case):
    make, words = MALFORMED[case]
    path = tmp_path / "file.safetensors"
    make(path)
    code, out, sentence = run(verb, path, capsys, "--json")
    assert (code, out) == (1, "")
    assert re.search(words, sentence)
    assert sentence.count("\n") == 1
    assert "Traceback" not in sentence


@pytest.mark.parametrize("verb", ["inspect", "verify"])
@pytest.mark.parametrize("case", INSIDE)
def test_broken_contents(tmp_path, capsys, verb, case):
    tensors, words = INSIDE[case]
    path = tmp_path / "file.safetensors"
    path.write_bytes(serialised(tensors, {"ss_base_model_version": "sd_v1"}))
    code, out, sentence = run(verb, path, capsys)
    assert code == 1
    assert words in sentence, sentence
    assert sentence.count("\n") == 1
    assert len(sentence) < 500
    assert ("kind" in out) == (verb == "inspect")


def test_inspect_still_says_what_a_broken_file_is(tmp_path, capsys):
    path = tmp_path / "file.safetensors"
    path.write_bytes(serialised(INSIDE["NaN"][0], {}))
    code, out, sentence = run("inspect", path, capsys, "--json")
    report = json.loads(out)
    assert (code, report["family"], report["ranks"]) == (1, "sd15", [4])
    assert report["problem"] == sentence.strip()


def test_claims_cost_no_memory(tmp_path, capsys):
    path = tmp_path / "file.safetensors"
    path.write_bytes(serialised(pair(), {"ss_base_model_version": "sd_v1"}))
    assert run("inspect", path, capsys)[0] == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in (10**10, 2**40):
        entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
        raw_file(path, {f"{STEM}.lora_down.weight": entry})
        for verb in ("inspect", "verify"):
            assert run(verb, path, capsys)[0] == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


def test_verify_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "file.safetensors"
    path.write_bytes(serialised(pair(**{f"{STEM}.alpha": torch.tensor(2.0)}), {}))
    code, out, _ = run("verify", path, capsys)
    assert code == 0
    assert out.count("✓") == 6
    code, out, _ = run("verify", path, capsys, "--json")
    report = json.loads(out)
    # The row of cli.md.
    assert {"ok", "tools"} <= report.keys()
    for row in report["tools"]:
        assert {"tool", "keys", "matched", "dropped", "max_delta_error", "note"} <= row.keys()
    code, _, sentence = run("verify", path, capsys, "--base", "demo")
    assert (code, "the base is the Embedded tiny base" in sentence) == (1, True)
    peft = {f"unet.mid_block.attentions.0.proj_in.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    path.write_bytes(serialised(pair() | peft, {}))
    code, out, _ = run("verify", path, capsys)
    assert (code, out.count("✗")) == (1, 6)
    assert "drops 2 of 4 keys" in out
