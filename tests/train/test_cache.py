from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lora_core.data.dataset import scan
from lora_core.data.images import Bucket
from lora_core.models.load import load_base
from lora_core.train import data
from lora_core.train.data import LatentCache, PromptCache


@pytest.fixture(scope="module")
def base():
    return load_base("demo", torch.device("cpu"), torch.float32)


@pytest.fixture
def record(tmp_path):
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (0, 0, 20, 64))
    image.save(tmp_path / "a.png")
    return scan(tmp_path).records[0]


def _counted(monkeypatch, name):
    calls = []
    original = getattr(data, name)
    monkeypatch.setattr(data, name, lambda *a: calls.append(a) or original(*a))
    return calls


def test_latents_are_encoded_once_for_all_runs(base, record, tmp_path, monkeypatch):
    calls = _counted(monkeypatch, "encode_view")
    bucket = Bucket(64, 64)
    first = LatentCache(base, tmp_path / "cache").latents(record, bucket, False)
    again = LatentCache(base, tmp_path / "cache")
    assert torch.equal(again.latents(record, bucket, False), first)
    assert torch.equal(again.latents(record, bucket, False), first)
    assert len(calls) == 1
    assert not torch.equal(again.latents(record, bucket, True), first)
    assert len(calls) == 2


def test_each_kind_of_device_has_entries_of_its_own(base, record, tmp_path, monkeypatch):
    """They round differently, so a run on one must not begin from another's numbers."""
    made = []
    monkeypatch.setattr(data, "encode_view", lambda *_: made.append("image") or torch.zeros(4, 8, 8))
    condition = data.encode_prompt(base, ["owl"])
    monkeypatch.setattr(data, "encode_prompt", lambda *_: made.append("caption") or condition)
    for device in map(torch.device, ("cpu", "meta", "cpu", "meta")):
        other = replace(base, device=device, vae=SimpleNamespace(device=device))
        LatentCache(other, tmp_path / "latents").latents(record, Bucket(64, 64), False)
        PromptCache(other, tmp_path / "text", False, 1, 75).embed("owl")
    assert made == ["image", "caption"] * 2


def test_a_changed_picture_is_encoded_anew(base, record, tmp_path):
    bucket = Bucket(64, 64)
    first = LatentCache(base, tmp_path / "cache").latents(record, bucket, False)
    Image.new("RGB", (64, 64), "green").save(record.path)
    assert not torch.equal(LatentCache(base, tmp_path / "cache").latents(record, bucket, False), first)


def test_a_broken_cache_file_is_made_again(base, record, tmp_path):
    bucket = Bucket(64, 64)
    first = LatentCache(base, tmp_path / "cache").latents(record, bucket, False)
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for broken in (whole[:40], b"", b"x" * 200):
        file.write_bytes(broken)
        assert torch.equal(LatentCache(base, tmp_path / "cache").latents(record, bucket, False), first)
        assert file.read_bytes() == whole


def test_captions_are_encoded_once_unless_the_encoder_is_trained(base, tmp_path, monkeypatch):
    calls = _counted(monkeypatch, "encode_prompt")
    frozen = PromptCache(base, tmp_path / "text", False, 1, 75)
    both = torch.cat([frozen.embed(caption).context for caption in ("owl", "fox")])
    assert torch.equal(frozen.embed_batch(["owl", "fox"]).context, both)
    assert torch.equal(PromptCache(base, tmp_path / "text", False, 1, 75).embed("fox").context[0], both[1])
    assert len(calls) == 2
    live = PromptCache(base, tmp_path / "text", True, 1, 75)
    torch.testing.assert_close(live.embed_batch(["owl", "fox"]).context, both)
    live.embed_batch(["owl"])
    assert len(calls) == 4


def test_captions_that_vary_take_no_disk_and_little_memory(base, tmp_path, monkeypatch):
    calls = _counted(monkeypatch, "encode_prompt")
    fixed = PromptCache(base, tmp_path / "text", False, 1, 75).embed("owl").context
    monkeypatch.setattr(data, "DRAWN_CAPTIONS_BYTES", 3 * fixed.nbytes)
    text = PromptCache(base, tmp_path / "text", False, 1, 75)
    assert torch.equal(text.embed("owl").context, fixed)
    looks = [f"owl, tag {number}" for number in range(20)]
    seen = [text.embed_batch(["owl", look]) for look in looks]
    assert torch.equal(seen[0].context[:1], fixed)
    assert len(list((tmp_path / "text").iterdir())) == 1
    assert len(calls) == 21
    # The newest three are in memory; one that has gone is encoded anew, to the same bits.
    assert torch.equal(text.embed_batch(looks[-3:]).context[-1], seen[-1].context[1])
    assert len(calls) == 21
    assert torch.equal(text.embed_batch(looks[:1]).context[0], seen[0].context[1])
    assert len(calls) == 22
