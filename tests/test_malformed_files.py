"""Model files as the internet has them: cut, lying, renamed, dangerous. One sentence each, nothing executed.

Each broken container goes through every verb that opens one, as an adapter and as a base.
"""

import io
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lora_core.__main__ import main
from tests.checkpoints import write_single

ROOT = Path(__file__).resolve().parents[1]
STEM = "lora_unet_mid_block_attentions_0_proj_in"
UNET = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
WITNESS = "easel-ran-code"
MEMORY = 200 * 2**20


def good() -> dict[str, torch.Tensor]:
    """The tensors of a small file that is an adapter of SD 1.x."""
    return {
        f"{STEM}.lora_down.weight": torch.ones(4, 1280, 1, 1),
        f"{STEM}.lora_up.weight": torch.ones(1280, 4, 1, 1),
        f"{STEM}.alpha": torch.tensor(4.0),
    }


def file(header: object, data: bytes = bytes(64), length: int | None = None) -> bytes:
    """A safetensors file with the header as given, legal or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changes


def two(first: list[int], second: list[int], data: int = 64) -> bytes:
    rows = {
        f"{STEM}.lora_down.weight": entry(shape=[(first[1] - first[0]) // 4], data_offsets=first),
        UNET: entry(shape=[(second[1] - second[0]) // 4], data_offsets=second),
    }
    return file(rows, bytes(data))


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, (f"open({str(Path(os.environ.get('TMPDIR', '/tmp')) / WITNESS)!r}, 'w').close()",))


def zipped(name: str, data: bytes) -> bytes:
    """A zip with one packed file."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return packed.getvalue()


def torch_saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


CONTAINERS: dict[str, bytes | Callable[[], bytes]] = {
    "empty": b"",
    "one byte": b"x",
    "seven bytes": b"1234567",
    "random bytes": bytes(range(256)) * 40,
    "text": b"Not Found. Please log in to download this model.\n" * 9,
    "an HTML page": b"<!DOCTYPE html><html><head><title>404</title></head></html>" * 9,
    "an HTML page after blanks": b"\n\n  <html><body>Sign in</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2132625894\n",
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "a pickle": lambda: pickle.dumps(Evil()),
    "a pickle of protocol 2": lambda: pickle.dumps(Evil(), protocol=2),
    "a torch file": lambda: torch_saved({"x": Evil()}),
    "a zip": lambda: zipped("x.txt", b"x" * 99),
    "cut in the middle of the header": lambda: save(good())[:99],
    "cut in the middle of the data": lambda: save(good())[:-4000],
    "cut by one byte": lambda: save(good())[:-1],
    "bytes after the end": lambda: save(good()) + b"more",
    "a header longer than the file": file({"a": entry()}, length=10_000),
    "a header of 10 GB": file({"a": entry()}, length=10 * 2**30),
    "a header of 2^64 - 1": file({"a": entry()}, length=2**64 - 1),
    "a header of no length": file({"a": entry()}, length=0),
    "a header that is not JSON": file(b"{nonsense", bytes(8)),
    "a header that is a list": file([1, 2]),
    "a header that is not UTF-8": file(b'{"\xff\xfe": 1}'),
    "a header nested without end": file(b"[" * 200_000 + b"]" * 200_000),
    "metadata that is a list": file({"__metadata__": ["a"], "a": entry()}),
    "metadata with a number": file({"__metadata__": {"a": 1}, "a": entry()}),
    "a tensor that is not a table": file({"a": 7}),
    "a tensor without offsets": file({"a": {"dtype": "F32", "shape": [4, 4]}}),
    "an unknown number type": file({"a": entry(dtype="F7")}),
    "a number type that is a list": file({"a": entry(dtype=["F32"])}),
    "negative offsets": file({"a": entry(data_offsets=[-64, 0])}),
    "offsets the wrong way round": file({"a": entry(data_offsets=[64, 0])}),
    "offsets that are texts": file({"a": entry(data_offsets=["0", "64"])}),
    "a negative shape": file({"a": entry(shape=[-4, -4])}),
    "a shape of fractions": file({"a": entry(shape=[4.0, 4.0])}),
    "a shape that does not fit": file({"a": entry(shape=[4, 5])}),
    "a tensor of 10 GB": file({UNET: entry(shape=[50_000, 50_000], data_offsets=[0, 10 * 10**9])}),
    "a shape whose product overflows": file({"a": entry(shape=[2**32, 2**32, 2**32], data_offsets=[0, 64])}),
    "overlapping tensors": two([0, 64], [32, 96], 96),
    "a gap between tensors": two([0, 32], [48, 64]),
    "two tensors in one place": two([0, 64], [0, 64]),
}  # fmt: skip
VERBS: dict[str, Callable[[Path, Path], list[object]]] = {
    "inspect": lambda bad, out: ["inspect", bad],
    "verify": lambda bad, out: ["verify", bad],
    "convert": lambda bad, out: ["convert", bad, out / "x.safetensors", "--to", "diffusers"],
    "merge": lambda bad, out: ["merge", bad, bad, "--out", out / "x.safetensors"],
    "merge into": lambda bad, out: ["merge", bad, "--into-base", bad, "--out", out / "y.safetensors"],
    "generate": lambda bad, out: ["generate", "--prompt", "x", "--lora", bad, "--out", out / "x.png"],
    "base": lambda bad, out: ["generate", "--prompt", "x", "--base", bad, "--out", out / "x.png"],
    "vae": lambda bad, out: ["train", "demo", "--workspace", out, "--name", "r", "--set", f"model.vae={bad}"],
}


def one_sentence(stderr: str) -> str:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert re.match(r"\S.*[.?]$", lines[0]), stderr
    assert not re.search(r"Traceback|Errno|Error\b.*Error", lines[0]), stderr
    return lines[0]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", CONTAINERS)
def test_a_broken_container_gets_one_sentence(case, verb, tmp_path, out, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    content = CONTAINERS[case]
    bad = tmp_path / "modèl from the net.safetensors"
    bad.write_bytes(content() if callable(content) else content)
    before = bad.read_bytes()
    capsys.readouterr()
    assert main([str(word) for word in VERBS[verb](bad, out)]) == 1
    said = one_sentence(capsys.readouterr().err)
    assert bad.name in said
    assert len(said) < 600
    assert bad.read_bytes() == before
    assert not (tmp_path / WITNESS).exists()
    assert [
        path for path in out.rglob("*") if path.suffix in (".safetensors", ".png", ".draft", ".tmp")
    ] == []


ADAPTERS: dict[str, tuple[dict[str, object], str]] = {
    "half of a pair": ({f"{STEM}.lora_up.weight": None}, "not the up half"),
    "the other half": ({f"{STEM}.lora_down.weight": None}, "not the down half"),
    "an alpha alone": ({f"{STEM}.lora_up.weight": None, f"{STEM}.lora_down.weight": None}, "."),
    "NaN": ({f"{STEM}.lora_up.weight": torch.full((1280, 4, 1, 1), float("nan"))}, "not finite"),
    "infinity": ({f"{STEM}.lora_down.weight": torch.full((4, 1280, 1, 1), float("inf"))}, "not finite"),
    "an alpha that is NaN": ({f"{STEM}.alpha": torch.tensor(float("nan"))}, "not a finite number"),
    "an alpha of many numbers": ({f"{STEM}.alpha": torch.ones(3)}, "must be one number"),
    "ranks that differ": ({f"{STEM}.lora_up.weight": torch.ones(1280, 5, 1, 1)}, "ranks differ"),
    "five axes": ({f"{STEM}.lora_up.weight": torch.ones(1280, 4, 1, 1, 1)}, "no linear layer or convolution"),
    "rank 0": (
        {f"{STEM}.lora_up.weight": torch.ones(1280, 0), f"{STEM}.lora_down.weight": torch.ones(0, 1280)}, ".",
    ),
    "integers": (
        {f"{STEM}.lora_up.weight": torch.ones(1280, 4, 1, 1, dtype=torch.int8)}, "floating-point",
    ),
    "a layer of no model": ({"lora_unet_left_block_7.lora_down.weight": torch.ones(4, 8)}, "."),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["convert", "merge", "generate"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_a_broken_adapter_gets_one_sentence(case, verb, tmp_path, out, capsys):
    changes, words = ADAPTERS[case]
    bad = tmp_path / "bad.safetensors"
    tensors = {key: value for key, value in (good() | changes).items() if value is not None}
    bad.write_bytes(save(tensors))
    assert main([str(word) for word in VERBS[verb](bad, out)]) == 1
    said = one_sentence(capsys.readouterr().err)
    assert "bad.safetensors" in said
    assert verb == "generate" or words in said
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("verb", ["inspect", "verify"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_a_broken_adapter_is_looked_at_without_a_traceback(case, verb, tmp_path, out, capsys):
    """What can be told of such a file is told, or one sentence says why not."""
    bad = tmp_path / "bad.safetensors"
    changes = ADAPTERS[case][0]
    bad.write_bytes(save({key: value for key, value in (good() | changes).items() if value is not None}))
    code = main([str(word) for word in VERBS[verb](bad, out)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    if captured.err:
        assert code == 1
        assert "bad.safetensors" in one_sentence(captured.err)
    if verb == "verify":
        assert code == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a nursery forks")
def test_no_broken_file_takes_much_more_memory_than_a_good_one(tmp_path, out, nursery):
    base = write_single(tmp_path / "base.safetensors", "sd15", torch.float16)
    made = ["generate", "--prompt", "x", "--width", 64, "--height", 64, "--steps", 1, "--out", out / "x.png"]
    done, _, usual = nursery.command([*made, "--base", base])
    assert done == 0
    bad = tmp_path / "bad.safetensors"
    for case in ("a header of 10 GB", "a tensor of 10 GB", "a header nested without end", "a pickle"):
        content = CONTAINERS[case]
        bad.write_bytes(content() if callable(content) else content)
        done, _, most = nursery.command([*made, "--base", bad])
        assert (done, most < usual + MEMORY) == (1, True), f"{case}: {most - usual:,} bytes more"
    # A .ckpt whose records unpack to a gigabyte each.
    bomb = tmp_path / "bomb.ckpt"
    bomb.write_bytes(zipped("archive/data.pkl", bytes(2**30)))
    done, _, most = nursery.command([*made, "--base", bomb])
    assert (done, most < usual + MEMORY) == (1, True), f"bomb: {most - usual:,} bytes more"
