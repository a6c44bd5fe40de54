"""Files into files: bit for bit there and back, in the precision that they have."""

import json

import pytest
import torch

from lora_core import api
from lora_core.errors import AdapterFileError
from lora_core.formats.io import AS_IT_IS, convert_adapter, load_adapter, read_tensors, save_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import FAMILIES
from tests.formats.odd_files import serialised

REAL = [name for name, family in FAMILIES.items() if family.portable]


def drawn(shape, rank, alpha, seed, dtype=torch.float32):
    out, inside, *kernel = shape
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inside, *kernel, generator=draw).to(dtype)
    return LayerWeights(down, torch.randn(out, rank, *(1 for _ in kernel), generator=draw).to(dtype), alpha)


def weights(family, alphas=(6.0,), ranks=(4,), every=29, dtype=torch.float32):
    """Some layers of each part, convolutions too, alphas and ranks in turn."""
    layers = {}
    every = every if family.portable else 5
    for number, (key, shape) in enumerate(list(family_layout(family).items())[::every]):
        how = (ranks[number % len(ranks)], alphas[number % len(alphas)])
        layers[key] = drawn(shape, *how, number, dtype)
    assert {part for part, _ in layers} == set(family.parts)
    return AdapterWeights(layers)


def same_tensors(one, two):
    before, after = read_tensors(one)[0], read_tensors(two)[0]
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert tensor.shape == after[key].shape
        assert tensor.view(-1).view(torch.uint8).equal(after[key].view(-1).view(torch.uint8)), key


@pytest.mark.parametrize("alphas", [(6.0,), (6.0, 0.7, 16.0)])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(tmp_path, name, alphas):
    family = FAMILIES[name]
    start, middle, end = (tmp_path / f"{name}.safetensors" for name in ("start", "middle", "end"))
    save_adapter(
        weights(family, alphas, (4, 8, 1)), start, family, metadata={"ss_seed": "1"}, keep_alphas=True
    )
    assert "only diffusers" in convert_adapter(start, middle, "diffusers")[0]
    told = convert_adapter(middle, end, "kohya", keep_alphas=True)
    assert bool(told) == (len(alphas) > 1)
    same_tensors(start, end)
    metadata = read_tensors(end)[1]
    assert metadata["ss_seed"] == "1"
    assert metadata["ss_base_model_version"] == family.base_version
    assert metadata["modelspec.architecture"] == family.modelspec


def test_without_keep_alphas_a_file_of_one_alpha_is_bit_exact(tmp_path):
    family = FAMILIES["sd15"]
    start, middle, end = (tmp_path / f"{name}.safetensors" for name in ("start", "middle", "end"))
    save_adapter(weights(family, (0.3,), (4, 8)), start, family, format="diffusers", dtype="fp16")
    assert convert_adapter(start, middle, "kohya") == []
    convert_adapter(middle, end, "diffusers")
    same_tensors(start, end)


def test_different_alphas_become_one_and_it_is_said(tmp_path):
    family = FAMILIES["sd15"]
    start, end = tmp_path / "start.safetensors", tmp_path / "end.safetensors"
    save_adapter(weights(family, (6.0, 6.0, 1.0)), start, family, format="diffusers")
    (told,) = convert_adapter(start, end, "kohya")
    assert "--keep-alphas" in told
    before, after = load_adapter(start), load_adapter(end)
    assert {layer.alpha for layer in after.layers.values()} == {6.0}
    for key, layer in before.layers.items():
        torch.testing.assert_close(after.layers[key].delta(), layer.delta())


def test_who_misreads_kept_alphas_is_said(tmp_path):
    family = FAMILIES["sd2"]
    start, end = tmp_path / "start.safetensors", tmp_path / "end.safetensors"
    save_adapter(weights(family, (6.0, 1.0)), start, family, format="diffusers")
    (told,) = convert_adapter(start, end, "kohya", keep_alphas=True)
    assert "diffusers reads at the wrong strength" in told


def test_each_factor_keeps_its_own_precision(tmp_path):
    family = FAMILIES["sd15"]
    mixed = weights(family)
    for number, (key, layer) in enumerate(mixed.layers.items()):
        down, up = ((torch.float16, torch.float32), (torch.bfloat16, torch.float64))[number % 2]
        mixed.layers[key] = LayerWeights(layer.down.to(down), layer.up.to(up), layer.alpha)
    start, middle, end = (tmp_path / f"{name}.safetensors" for name in ("start", "middle", "end"))
    save_adapter(mixed, start, family, dtype=AS_IT_IS)
    convert_adapter(start, middle, "diffusers")
    convert_adapter(middle, end, "kohya")
    same_tensors(start, end)
    assert {t.dtype for k, t in read_tensors(end)[0].items() if "lora_up" in k} == {
        torch.float32,
        torch.float64,
    }


def test_other_spellings_become_the_usual_one(tmp_path):
    """SDXL's UNet in diffusers' block names, which A1111 reads only in part where there are convolutions."""
    family = FAMILIES["sdxl"]
    usual, other, back = (tmp_path / f"{name}.safetensors" for name in ("usual", "other", "back"))
    some = weights(family)
    save_adapter(some, usual, family)
    tensors = {}
    for (part, path), layer in some.layers.items():
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
        stem = f"{prefix}_{path.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = layer.down
        tensors[f"{stem}.lora_up.weight"] = layer.up
        tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha)
    other.write_bytes(serialised(tensors, {"ss_base_model_version": "sdxl_base_v1-0"}))
    convert_adapter(other, back, "kohya")
    same_tensors(usual, back)
    assert any("input_blocks" in key for key in read_tensors(back)[0])


def test_layers_get_the_shapes_that_the_base_has(tmp_path):
    """Projections of SD 1.x as linear layers: kohya and diffusers refuse them."""
    family, key = FAMILIES["sd15"], ("unet", "mid_block.attentions.0.proj_in")
    to_k = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    layer = drawn((1280, 1280), 2, 2.0, 0)
    source, target = tmp_path / "f.safetensors", tmp_path / "g.safetensors"
    both = AdapterWeights({key: layer, to_k: drawn((1280, 768), 2, 2.0, 1)})
    save_adapter(both, source, family, format="diffusers")
    (note,) = convert_adapter(source, target, "kohya")
    assert "1 x 1" in note
    found = load_adapter(target).layers[key]
    assert found.down.shape == (2, 1280, 1, 1)
    assert found.up.flatten(1).equal(layer.up)


@pytest.mark.parametrize("version", ["sd_v2", "sd_v2_v"])
def test_the_header_keeps_saying_which_kind_of_sd2(tmp_path, version):
    family = FAMILIES["sd2"]
    source, middle, end = (tmp_path / f"{name}.safetensors" for name in "abc")
    tensors = {}
    for (part, path), layer in weights(family).layers.items():
        stem = f"{'lora_unet' if part == 'unet' else 'lora_te'}_{path.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
    source.write_bytes(serialised(tensors, {"ss_base_model_version": version}))
    convert_adapter(source, middle, "diffusers")
    convert_adapter(middle, end, "kohya")
    for path in (middle, end):
        metadata = read_tensors(path)[1]
        assert metadata["ss_base_model_version"] == version
        assert ("768-v" in metadata["modelspec.architecture"]) == (version == "sd_v2_v")


def test_a_tucker_layer_is_told(tmp_path):
    source, target = tmp_path / "f.safetensors", tmp_path / "g.safetensors"
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(2, 320, 1, 1, generator=draw),
        f"{stem}.lora_mid.weight": torch.randn(2, 2, 3, 3, generator=draw),
        f"{stem}.lora_up.weight": torch.randn(320, 2, 1, 1, generator=draw),
    }
    source.write_bytes(serialised(tensors, {"ss_base_model_version": "sd_v1"}))
    (note,) = convert_adapter(source, target, "kohya")
    assert "three factors" in note
    down, mid, up = tensors.values()
    expected = torch.einsum("op,pqkl,qi->oikl", up.flatten(1), mid, down.flatten(1))
    ((_, layer),) = load_adapter(target).layers.items()
    torch.testing.assert_close(layer.delta(), expected, rtol=1e-4, atol=1e-4)


KEYS = {
    "LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
    "LoKr": ["lokr_w1", "lokr_w2"],
    "DoRA": ["lora_down.weight", "lora_up.weight", "dora_scale"],
}


@pytest.mark.parametrize("kind", KEYS)
def test_other_kinds_are_refused_with_the_offer_of_a_merge(tmp_path, kind):
    source, target = tmp_path / "mine.safetensors", tmp_path / "g.safetensors"
    source.write_bytes(serialised({f"lora_unet_mid_x.{leaf}": torch.ones(2, 2) for leaf in KEYS[kind]}, {}))
    for format in ("kohya", "diffusers"):
        with pytest.raises(AdapterFileError, match=rf"{kind}.*merge mine.safetensors .*--rank") as refused:
            convert_adapter(source, target, format)
        assert ("--base" in str(refused.value)) == (kind == "DoRA")
    assert not target.exists()


def test_a_file_for_no_known_family_is_refused(tmp_path):
    source = tmp_path / "f.safetensors"
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 1536), f"{stem}.lora_up.weight": torch.ones(5, 2)}
    source.write_bytes(serialised(tensors, {}))
    with pytest.raises(AdapterFileError, match="1536 channels wide"):
        convert_adapter(source, tmp_path / "g.safetensors", "diffusers")
    assert not (tmp_path / "g.safetensors").exists()


def test_a_diffusers_header_says_each_alpha(tmp_path):
    """The header that PEFT reads, worked out by hand for two layers."""
    family = FAMILIES["sd15"]
    one, two = (
        ("unet", f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{leaf}") for leaf in ("k", "v")
    )
    adapter = AdapterWeights({one: drawn((1280, 768), 4, 4.0, 0), two: drawn((1280, 768), 8, 2.0, 1)})
    source, target = tmp_path / "f.safetensors", tmp_path / "g.safetensors"
    save_adapter(adapter, source, family, keep_alphas=True)
    convert_adapter(source, target, "diffusers")
    values = json.loads(read_tensors(target)[1]["lora_adapter_metadata"])
    alphas = {values["unet.lora_alpha"], *values["unet.alpha_pattern"].values()}
    assert alphas == {4, 2}
    back = load_adapter(target)
    assert (back.layers[one].alpha, back.layers[two].alpha) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [("g.txt", "should end in .safetensors"), ("none/g.safetensors", "its folder does not exist")],
)
def test_a_target_that_no_tool_would_find_is_refused(tmp_path, name, words):
    family = FAMILIES["sd15"]
    key = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    source, target = tmp_path / "f.safetensors", tmp_path / name
    save_adapter(AdapterWeights({key: drawn((1280, 768), 4, 4.0, 0)}), source, family)
    with pytest.raises(AdapterFileError) as error:
        api.convert(source, target, "kohya")
    assert str(error.value).startswith(f"{target} ")
    assert words in str(error.value)
    assert not target.exists()
