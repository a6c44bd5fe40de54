"""Adapters merged into bases on disk, against the same adapters merged into the opened base.

What is compared is read back by diffusers, from the folder and from the single file.
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from lora_core.errors import AdapterFileError, LoraError, ModelFileError
from lora_core.formats.io import save_adapter
from lora_core.generate.request import WeightedLora
from lora_core.lora.inject import target_modules
from lora_core.lora.weights import AdapterWeights, LayerWeights, LoadedLora, Merger
from lora_core.model_files.families import FAMILIES, named_targets
from lora_core.model_files.header import read_header
from lora_core.models.load import load_base
from lora_core.tools.delta import BaseWeights
from lora_core.tools.merge import merge_files_into_base
from tests.checkpoints import write_folder, write_single

CPU = torch.device("cpu")
NAMES = ["sd15", "sd2", "sdxl"]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path):
    """Merged bases are large, and pytest would keep them."""
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(folder, single file) of the same weights by family; large, so that they are removed at the end."""
    root = tmp_path_factory.mktemp("bases")
    made: dict[str, tuple[Path, Path]] = {}

    def pair(name: str) -> tuple[Path, Path]:
        if name not in made:
            # As in real SD 2 checkpoints, the header says nothing of the prediction: a guess does here.
            folder = write_folder(root / name, name, size="wordless")
            made[name] = folder, write_single(root / f"{name}.safetensors", name, size="wordless")
        return made[name]

    yield pair
    shutil.rmtree(root)


def adapter(base, seed, alpha, every=1):
    """Random factors for every linear layer and convolution of the blocks, text encoders included."""
    targets = named_targets("locon")
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for part, module in base.modules.items():
        for number, (path, (_, layer)) in enumerate(target_modules(part, module, targets).items()):
            if number % every == 0:
                out, inside, *kernel = layer.weight.shape
                down = torch.randn(2, inside, *kernel, generator=draw)
                up = torch.randn(out, 2, *(1 for _ in kernel), generator=draw) * 0.02
                layers[part, path] = LayerWeights(down, up, alpha)
    return AdapterWeights(layers)


def ingredients(base, folder):
    """Two adapter files for a base, the second for some layers only, and the same in memory."""
    one, two = adapter(base, 1, 1.0), adapter(base, 2, 4.0, every=3)
    files = [folder / f"{name}.safetensors" for name in ("one", "two")]
    for weights, file in zip((one, two), files, strict=True):
        if not file.exists():
            save_adapter(weights, file, base.family)
    return (
        [WeightedLora(str(files[0]), 0.7, 0.4), WeightedLora(str(files[1]), -0.5)],
        [LoadedLora(one, 0.7, 0.4), LoadedLora(two, -0.5)],
    )


def bits(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("name", NAMES)
def test_a_merged_base_is_the_live_base_with_the_adapters_bit_for_bit(bases, tmp_path, name, single):
    folder, file = bases(name)
    base = load_base(str(folder), CPU, torch.float32)
    files, live = ingredients(base, tmp_path)
    source = file if single else folder
    before = {path: bits(path) for path in ([file] if single else folder.rglob("*.safetensors"))}
    out = tmp_path / ("merged.safetensors" if single else "merged")
    told = []
    (said,) = merge_files_into_base(files, str(source), out, note=lambda *counts: told.append(counts))
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)]
    assert told
    assert said == f"{len(live[0].weights.layers)} layers of the base changed by 2 files."
    Merger(base.modules).apply(live)
    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    theirs = (
        kind.from_single_file(str(out), config=str(folder), local_files_only=True)
        if single
        else kind.from_pretrained(out, local_files_only=True)
    )
    for part, module in {**base.modules, "vae": base.vae}.items():
        other, mine = getattr(theirs, part).state_dict(), module.state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine), part
    assert before == {path: bits(path) for path in before}
    assert sorted(os.listdir(tmp_path)) == sorted(["one.safetensors", "two.safetensors", out.name])
    metadata = read_header(out if single else out / UNET).metadata
    rows = json.loads(metadata["lora_easel.merged"])
    assert [(row["name"], row["strength"], row["text_strength"]) for row in rows] == [
        ("one", 0.7, 0.4), ("two", -0.5, -0.5),
    ]  # fmt: skip
    assert rows[0]["sha256"] == bits(Path(files[0].file))[:12]
    assert metadata["modelspec.merged_from"] == f"{name}, one, two"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_each_tensor_keeps_its_number_type_and_the_rest_its_bytes(bases, tmp_path, dtype):
    folder, _ = bases("sd15")
    unet = load_file(folder / UNET)
    # One tensor in four is left in fp32: real files are mixed.
    mixed = {k: t if n % 4 == 0 else t.to(dtype) for n, (k, t) in enumerate(sorted(unet.items()))}
    base_folder = tmp_path / "base"
    shutil.copytree(folder, base_folder)
    save_file(mixed, base_folder / UNET, {"format": "pt", "modelspec.hash_sha256": "0xold", "author": "me"})
    base = load_base(str(folder), CPU, torch.float32)
    weights = AdapterWeights(
        {k: w for k, w in adapter(base, 1, 1.0, every=5).layers.items() if k[0] == "unet"}
    )
    save_adapter(weights, tmp_path / "one.safetensors", base.family, format="diffusers")
    merge_files_into_base(
        [WeightedLora(str(tmp_path / "one.safetensors"))], str(base_folder), tmp_path / "out"
    )
    after = load_file(tmp_path / "out" / UNET)
    header, old = read_header(tmp_path / "out" / UNET), read_header(base_folder / UNET)
    assert header.tensors == old.tensors
    assert header.metadata["author"] == "me"
    assert header.metadata["format"] == "pt"
    assert "modelspec.hash_sha256" not in header.metadata
    changed = {f"{path}.weight" for _, path in weights.layers}
    for key, tensor in mixed.items():
        expected = tensor
        if key in changed:
            # In double precision by hand; one rounding to the tensor's own type, and fp32's own error before.
            layer = weights.layers["unet", key.removesuffix(".weight")]
            product = layer.up.double().flatten(1) @ layer.down.double().flatten(1) / 2
            exact = tensor.double() + product.reshape(tensor.shape)
            near = torch.stack([(exact + d).to(tensor.dtype).double() for d in (-1e-6, 0, 1e-6)])
            assert (
                (after[key].double() >= near.amin(0) - 1e-6) & (after[key].double() <= near.amax(0) + 1e-6)
            ).all()
        else:
            same = after[key].view(-1).view(torch.uint8).equal(expected.view(-1).view(torch.uint8))
            assert same, key
        assert after[key].dtype == tensor.dtype
    for other in folder.rglob("*"):
        if other.is_file() and other != folder / UNET:
            assert bits(other) == bits(tmp_path / "out" / other.relative_to(folder))


def copied(folder, target):
    shutil.copytree(folder, target, copy_function=os.link)
    return target


def small(base, tmp_path, part="unet"):
    """An adapter file for the first layers of one part."""
    layers = {k: w for k, w in adapter(base, 3, 2.0, every=11).layers.items() if k[0] == part}
    path = tmp_path / "small.safetensors"
    save_adapter(AdapterWeights(layers), path, base.family)
    return path, AdapterWeights(layers)


def test_shards_and_half_precision_variants(bases, tmp_path):
    folder, _ = bases("sd15")
    base = load_base(str(folder), CPU, torch.float32)
    lora, weights = small(base, tmp_path)
    root = copied(folder, tmp_path / "base")
    unet = load_file(root / UNET)
    (root / UNET).unlink()
    names = sorted(unet)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    files = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file, keys in zip(files, halves, strict=True):
        save_file({key: unet[key] for key in keys}, root / "unet" / file, {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {k: f for f, keys in zip(files, halves, strict=True) for k in keys},
    }
    (root / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    save_file({key: t.half() for key, t in unet.items()}, root / half, {"format": "pt"})
    (root / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"the base as it was")
    (root / "v1-5-pruned.safetensors").write_bytes(b"the base as it was")
    (root / "made by me").mkdir()
    out = tmp_path / "out"
    merge_files_into_base([WeightedLora(str(lora))], str(root), out)
    Merger(base.modules).apply([LoadedLora(weights)])
    expected = base.denoiser.state_dict()
    merged = load_file(out / "unet" / files[0]) | load_file(out / "unet" / files[1])
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
    in_half = load_file(out / half)
    changed = {f"{path}.weight" for _, path in weights.layers}
    assert all(torch.equal(in_half[key], unet[key].half()) == (key not in changed) for key in expected)
    assert load_base(str(out), CPU, torch.float32).denoiser.state_dict().keys() == expected.keys()
    assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()}
    assert not (out / "unet" / "diffusion_pytorch_model.bin").exists()


def test_text_encoders_saved_with_and_without_the_old_level(bases, tmp_path):
    """transformers 5.6 and later write the names without `text_model.`, older ones with it."""
    folder, _ = bases("sd15")
    base = load_base(str(folder), CPU, torch.float32)
    lora, weights = small(base, tmp_path, "text_encoder")
    Merger(base.modules).apply([LoadedLora(weights, 2.0)])
    expected = {
        k.removeprefix("text_model."): t for k, t in base.text_encoders["text_encoder"].state_dict().items()
    }
    for prefix in ("", "text_model."):
        root = copied(folder, tmp_path / f"base{prefix}")
        file = root / "text_encoder" / "model.safetensors"
        state = {prefix + k.removeprefix("text_model."): t for k, t in load_file(file).items()}
        file.unlink()
        save_file(state, file, {"format": "pt"})
        out = tmp_path / f"out{prefix}"
        merge_files_into_base([WeightedLora(str(lora), 0.0, 2.0)], str(root), out)
        found = load_file(out / "text_encoder" / "model.safetensors")
        assert all(torch.equal(found[prefix + key], tensor) for key, tensor in expected.items())
        assert bits(out / UNET) == bits(root / UNET)


def test_block_weights(bases, tmp_path):
    _, file = bases("sd15")
    base = load_base(str(file), CPU, torch.float32)
    lora, weights = small(base, tmp_path)
    out = tmp_path / "out.safetensors"
    merge_files_into_base([WeightedLora(str(lora))], str(file), out, "unet=0,mid_block=0.5")
    mid = AdapterWeights({k: w for k, w in weights.layers.items() if "mid_block" in k[1]})
    assert 0 < len(mid.layers) < len(weights.layers)
    Merger(base.modules).apply([LoadedLora(mid, 0.5)])
    found = load_base(str(out), CPU, torch.float32)
    assert all(map(torch.equal, base.denoiser.state_dict().values(), found.denoiser.state_dict().values()))


def test_a_dora_is_merged_exactly(bases, tmp_path):
    """Rows of W0 + update are scaled to the magnitudes: no SVD is needed where weights are written."""
    _, file = bases("sd15")
    base = load_base(str(file), CPU, torch.float32)
    lora, weights = small(base, tmp_path)
    tensors = load_file(lora)
    for stem in {key.partition(".")[0] for key in tensors}:
        up = tensors[f"{stem}.lora_up.weight"]
        tensors[f"{stem}.dora_scale"] = torch.full((up.shape[0], *(1,) * (up.dim() - 1)), 0.25)
    dora, out = tmp_path / "dora.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, dora, read_header(lora).metadata)
    merge_files_into_base([WeightedLora(str(dora))], str(file), out)
    found = load_base(str(out), CPU, torch.float32)
    for key in weights.layers:
        rows = found.modules[key[0]].get_submodule(key[1]).weight.flatten(1)
        torch.testing.assert_close(rows.norm(dim=1), torch.full((len(rows),), 0.25))


@pytest.fixture(scope="module")
def sd15(bases):
    return load_base(str(bases("sd15")[1]), CPU, torch.float32)


@pytest.fixture
def place(bases, sd15, tmp_path):
    folder, file = bases("sd15")
    lora, weights = small(sd15, tmp_path)
    return folder, file, lora, weights, tmp_path


def refused(place, words, lora=None, base=None, out=None, error=LoraError, strength=1.0):
    _, file, good, _, tmp_path = place
    out = out or tmp_path / "out.safetensors"
    there = out.exists()
    with pytest.raises(error, match=words) as caught:
        merge_files_into_base([WeightedLora(str(lora or good), strength)], str(base or file), out)
    assert "\n" not in str(caught.value)
    assert out.exists() == there
    assert not [name for name in os.listdir(tmp_path) if "draft" in name]


def test_layers_that_the_base_lacks(place):
    _, _, _, weights, tmp_path = place
    lora = tmp_path / "other.safetensors"
    layers = weights.layers | {
        ("text_encoder", f"text_model.encoder.layers.{n}.mlp.fc1"): LayerWeights(
            torch.ones(1, 768), torch.ones(48, 1), 1.0
        )
        for n in (3, 4, 5)
    }
    save_adapter(AdapterWeights(layers), lora, FAMILIES["sd15"])
    refused(place, r"encoder\.layers\.3\.mlp\.fc1 and 2 more; it is for another base", lora)


def test_layers_of_other_widths(place):
    folder, _, _, weights, tmp_path = place
    key = ("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.2")
    layers = weights.layers | {key: LayerWeights(torch.ones(1, 300), torch.ones(64, 1), 1.0)}
    lora = tmp_path / "other.safetensors"
    save_adapter(AdapterWeights(layers), lora, FAMILIES["sd15"])
    refused(place, r"has the shape \[64, 300\] in the file and \[64, 256\] in the base", lora)
    refused(place, r"has the shape \[64, 300\]", lora, folder, tmp_path / "out")


def test_an_adapter_for_another_family(place):
    lora = place[-1] / "xl.safetensors"
    key = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    layer = LayerWeights(torch.ones(1, 2048), torch.ones(64, 1), 1.0)
    save_adapter(AdapterWeights({key: layer}), lora, FAMILIES["sdxl"])
    refused(place, "is for Stable Diffusion XL, the base is the Stable Diffusion 1.x", lora)


def test_places_that_do_not_fit(place):
    folder, file, _, _, tmp_path = place
    refused(place, "already exists", out=file)
    refused(place, "already exists", base=folder, out=tmp_path)
    refused(place, "should be one too", base=folder)
    refused(place, r"should end in \.safetensors", out=tmp_path / "out")
    refused(place, "cannot be written", out=tmp_path / "none" / "out.safetensors")
    refused(place, "does not exist", base=tmp_path / "none")
    refused(place, "nothing of the base would change", strength=0.0)
    ckpt = tmp_path / "model.ckpt"
    ckpt.write_bytes(b"PK\x03\x04")
    refused(place, r"is a \.ckpt; this needs", base=ckpt)


def test_what_the_base_cannot_hold(place):
    folder, _, _, _, tmp_path = place
    root = copied(folder, tmp_path / "base")
    unet = {key: t.half() for key, t in load_file(root / UNET).items()}
    (root / UNET).unlink()
    save_file(unet, root / UNET, {"format": "pt"})
    refused(place, "more than its dtype can; lower", base=root, out=tmp_path / "out", strength=1e6)
    broken = tmp_path / "nan.safetensors"
    tensors = load_file(place[2])
    next(t for k, t in tensors.items() if "lora_up" in k).fill_(float("nan"))
    save_file(tensors, broken, read_header(place[2]).metadata)
    refused(place, "not finite", broken)


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="a byte is changed behind the writer's back")
def test_a_file_that_comes_back_changed_is_not_called_done(place, monkeypatch):
    """A disk that loses a byte: what was written is read again before the name is given to it."""
    monkeypatch.setattr(os, "fsync", lambda handle: os.pwrite(handle, b"\x55", 5000) if handle else None)
    refused(place, "read back changed", error=ModelFileError)


def test_a_base_that_is_cut_short_meanwhile(place):
    _, file, _, _, tmp_path = place
    base = tmp_path / "cut.safetensors"
    base.write_bytes(file.read_bytes()[:-10])
    refused(place, "cut short", base=base)


def test_the_weights_of_the_base_are_found_in_both(bases):
    for name in NAMES:
        folder, file = (BaseWeights(str(path)) for path in bases(name))
        for part in FAMILIES[name].parts[1:]:
            for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
                key = (part, f"text_model.encoder.layers.1.self_attn.{leaf}")
                assert torch.equal(folder.weight(key), file.weight(key))
    with pytest.raises(ModelFileError, match=r"has no layer unet\.nothing"):
        folder.weight(("unet", "nothing"))
    assert file.places(("text_encoder_9", "nothing")) == []
    with pytest.raises(AdapterFileError, match="already exists"):
        merge_files_into_base([], str(folder.path), folder.path)


def test_a_full_disk_is_one_sentence(place, monkeypatch):
    folder, _, adapter, _, tmp_path = place

    def full(source, target, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    for name in ("copyfile", "copy2", "copystat"):
        monkeypatch.setattr(shutil, name, full)
    out = tmp_path / "out"
    with pytest.raises(ModelFileError) as caught:
        merge_files_into_base([WeightedLora(str(adapter))], str(folder), out)
    assert str(caught.value) == f"{out} cannot be written: {os.strerror(errno.ENOSPC)}."
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
