"""Pictures on a card: what a step waits for, what a new strength costs, and what is done where memory is
short."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from app.worker_client import WorkerClient
from lora_core.backends.compact import WeightPolicy, quantized_bits
from lora_core.generate import pipeline as module
from lora_core.generate.pipeline import Pipeline, sample_latents
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.lora.inject import target_modules
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES, named_targets
from lora_core.models.load import ASIDE, INT8, RESIDENT, BaseModel, load_base
from lora_core.models.prompts import encode_prompts
from lora_core.models.unet import NoiseSchedule
from lora_core.models.vae import decode_latents
from lora_core.settings.schema import SAMPLERS
from lora_core.system.files import CLIP_TOKENIZER, FAMILY_CONFIGS
from tests.simulated.device import GIB, SimulatedDevice
from tests.waiting import PATIENCE
from tests.warm import program

SHOT = GenerationRequest(prompt="owl", seed=4, steps=3, cfg=3.0, width=64, height=64)
CPU = torch.device("cpu")


def adapter(base: BaseModel, parts: tuple[str, ...] = ("unet",), rank: int = 4) -> AdapterWeights:
    draw = torch.Generator().manual_seed(1)
    layers = {}
    for part in parts:
        found = target_modules(part, base.modules[part], named_targets("kohya", base.family))
        for name, (_, layer) in found.items():
            out, inside, *kernel = layer.weight.shape
            layers[part, name] = LayerWeights(
                torch.randn(rank, inside, *kernel, generator=draw) * 0.02,
                torch.randn(out, rank, *[1] * len(kernel), generator=draw) * 0.2,
                float(rank),
            )
    return AdapterWeights(layers)


def pipeline_with(base: BaseModel, weights: AdapterWeights, kept: int = RESIDENT) -> Pipeline:
    made = Pipeline(base, lambda same, rank: same, kept)
    made._load = lambda lora: ((lora.file, 0, 0, 0), weights)  # type: ignore[method-assign]
    return made


def drawn(pipeline: Pipeline, strength: float) -> "np.ndarray[Any, Any]":
    loras = (WeightedLora("x", strength),) if strength else ()
    return np.asarray(pipeline(replace(SHOT, loras=loras)), float)


@pytest.fixture(scope="module")
def on_processor() -> BaseModel:
    return load_base("demo", CPU, torch.float32)


def test_a_step_of_a_sampler_waits_for_nothing(on_processor: BaseModel) -> None:
    def latents(base: BaseModel, name: str) -> torch.Tensor:
        with torch.no_grad():
            text, negative = encode_prompts(base, "owl")
        card.clear()
        request = GenerationRequest(
            seed=3, steps=4, cfg=3.0, sampler=name, width=64, height=64, cfg_rescale=0.7
        )
        return sample_latents(base, request, text, negative)

    with SimulatedDevice() as card:
        base = load_base("demo", card.device, torch.float32)
        for name in SAMPLERS:
            found = latents(base, name)
            assert card.report()["syncs"] == 0, (name, card.syncs)
            assert card.report()["draws"] == 0, name
            assert torch.equal(found.cpu(), latents(on_processor, name)), name


def test_a_picture_is_the_merged_one_and_depends_on_no_earlier_strength(on_processor: BaseModel) -> None:
    parts = ("unet", "text_encoder")
    weights = adapter(on_processor, parts)
    merged = pipeline_with(on_processor, weights)
    wanted = {strength: drawn(merged, strength) for strength in (0.0, 0.8, 1.0)}
    merged.set_adapters(())
    with SimulatedDevice() as card:
        pipeline = pipeline_with(load_base("demo", card.device, torch.float32), weights)
        first = {strength: drawn(pipeline, strength) for strength in (0.8, 1.0, 0.0)}
        for strength, image in first.items():
            assert np.abs(image - wanted[strength]).max() <= 1, strength
        assert (first[0.0] == wanted[0.0]).all()
        assert np.abs(first[0.8] - first[0.0]).mean() > 2
        held = card.live
        for strength in (-1.0, 2.0, 0.0, 0.8):
            last = drawn(pipeline, strength)
        assert (last == first[0.8]).all()
        assert card.live <= held + 2**20, "no weight is there twice"


def test_a_new_strength_copies_no_weights_and_reads_no_prompt_again(
    on_processor: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = module.encode_prompts
    monkeypatch.setattr(module, "encode_prompts", lambda *a: (read.append(a[1]), real(*a))[1])
    for parts, again in ((("unet",), 1), (("unet", "text_encoder"), 2)):
        with SimulatedDevice() as card:
            pipeline = pipeline_with(
                load_base("demo", card.device, torch.float32), adapter(on_processor, parts)
            )
            read.clear()
            drawn(pipeline, 0.8)
            card.clear()
            pipeline.set_adapters((WeightedLora("x", 0.3),))
            assert (card.uploaded, card.report()["launches"], card.report()["syncs"]) == (0, 0, 0)
            drawn(pipeline, 0.3)
            assert len(read) == again, parts


def test_a_card_that_runs_out_draws_on_in_less_memory(on_processor: BaseModel) -> None:
    """Whichever allocation fails first, the picture comes, and is the same as long as the weights are."""
    weights = adapter(on_processor)
    wanted = drawn(pipeline_with(on_processor, weights), 0.8)
    pipeline_with(on_processor, weights).set_adapters(())
    with SimulatedDevice() as card:
        bases = load_base("demo", card.device, torch.float32)
        pipeline = pipeline_with(bases, weights)
        before = card.allocations
        drawn(pipeline, 0.8)
        taken = card.allocations - before
        for share in (0.05, 0.5, 0.9):
            pipeline = pipeline_with(bases, weights)
            for part in bases.text_encoders:
                bases.put(part, card.device)
            card.fail_at = card.allocations + round(share * taken)
            assert np.abs(drawn(pipeline, 0.8) - wanted).max() <= 1
            assert pipeline.kept == ASIDE
            assert next(bases.text_encoders["text_encoder"].parameters()).device.type == "cpu"
        card.fail_at = card.allocations + 50
        assert np.abs(drawn(pipeline, 0.8) - wanted).mean() < 8
        assert (pipeline.kept, quantized_bits(bases.denoiser)) == (INT8, 8)
        assert "8 bits" in pipeline.note
        card.fail_at = card.allocations + 50
        with pytest.raises(torch.OutOfMemoryError):
            drawn(pipeline, 0.8)


def test_a_picture_is_decoded_by_tiles_where_it_does_not_fit_whole(on_processor: BaseModel) -> None:
    latents = torch.randn(1, 4, 48, 40, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for _ in range(3):
            latents = nn.functional.avg_pool2d(latents, 3, 1, 1)
        latents = latents / latents.std()
    whole = decode_latents(on_processor, latents)
    with SimulatedDevice() as card:
        base = load_base("demo", card.device, torch.float32)
        card.clear()
        decode_latents(base, latents.to("cuda"))
        peak = card.peak
        card.limit = peak - 2**20
        tiled = decode_latents(base, latents.to("cuda"))
        assert base.decode_tile == 256
        card.clear()
        assert torch.equal(decode_latents(base, latents.to("cuda")), tiled)
        assert card.failures == 1, "it is not tried again"
        assert card.peak < peak
        # A VAE that waits on the processor comes to the card, or decodes there if that does not fit.
        base.put("vae", CPU)
        for limit, at_work in ((card.total, True), (card.live + 2**20, False)):
            card.limit = limit
            card.clear()
            assert torch.equal(decode_latents(base, latents.to("cuda")), tiled)
            assert (card.launches["convolution"] > 20) == at_work
            assert base.vae.device.type == "cpu"
        # Where not even a tile fits on the card, the processor decodes as it would have.
        base.decode_tile = 0
        card.limit = card.live + sum(tensor.nbytes for tensor in base.vae.parameters()) + 2**20
        assert torch.equal(decode_latents(base, latents.to("cuda")), whole)
        assert base.decode_tile == 0
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.03


def test_the_drawing_process_gives_way_and_draws_the_same_when_it_comes_back(tmp_path: Path) -> None:
    command = [program("engine"), "-m", "tests.simulated.device", "--gib", "2", "serve"]
    worker = WorkerClient(command, dict(os.environ), tmp_path / "log.txt")
    asked = {**asdict(SHOT), "do": "generate", "steps": 2, "strengths": [1], "out": str(tmp_path)}
    try:
        first = worker.ask(asked, PATIENCE)
        assert (first.message, worker.device, worker.holds_memory) == ("", "cuda", True)
        process = worker._process
        assert process is not None
        worker.release()
        assert process.poll() is not None
        again = worker.ask(asked, PATIENCE)
        images = [Path(reply.images[0]["file"]).read_bytes() for reply in (first, again)]
        assert images[0] == images[1]
    finally:
        worker.close()


def test_an_sdxl_lora_is_seen_under_seven_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """At true shapes, 1024 px, bf16, kohya's layers at rank 16; all of it took 13.7 GiB once."""
    with SimulatedDevice(gib=7, numbers=False) as card, torch.no_grad():
        weights = adapter(shapes_of("sdxl", WeightPolicy()), rank=16)
        monkeypatch.setattr("lora_core.models.load.open_base", lambda *asked: shapes_of("sdxl", asked[5]))
        pipeline = module.open_pipeline(GenerationRequest(), lambda same, rank: same)
        pipeline._load = lambda lora: ((lora.file, 0, 0, 0), weights)  # type: ignore[method-assign]
        shot = GenerationRequest(
            prompt="owl", steps=1, width=1024, height=1024, loras=(WeightedLora("x", 0.8),)
        )
        pipeline(shot)
        assert (pipeline.kept, pipeline.base.decode_tile, len(weights.layers)) == (ASIDE, 512, 722)
        card.clear()
        pipeline(replace(shot, loras=(WeightedLora("x", 0.5),)))
        assert card.uploaded < 2**20
        assert card.peak < 6.1 * GIB


def shapes_of(family_name: str, policy: WeightPolicy) -> BaseModel:
    """A base at its true shapes, bf16, whose weights are read onto the card with nothing in them."""
    family = FAMILIES[family_name]
    configs = FAMILY_CONFIGS / family.configs
    with init_empty_weights(include_buffers=False), no_init_weights():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae"))
        encoders: dict[str, Any] = {
            one.part: (CLIPTextModelWithProjection if one.pooled else CLIPTextModel)(
                CLIPTextConfig.from_pretrained(configs / one.part, local_files_only=True)
            )
            for one in family.text_encoders
        }
    tokenizers = {
        one.part: CLIPTokenizer.from_pretrained(
            CLIP_TOKENIZER, pad_token=one.pad_token, local_files_only=True
        )
        for one in family.text_encoders
    }

    def read(module: Any, dtype: torch.dtype) -> None:
        for name, parameter in list(module.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            held = torch.empty(parameter.shape, dtype=dtype, device="cuda")
            setattr(module.get_submodule(parent), leaf, nn.Parameter(held, requires_grad=False))
            if policy and module is unet and leaf == "weight":
                policy.apply_to_layer(module, parent)
        module.to("cuda")

    parts = {"unet": unet, "vae": vae, **encoders}
    waiting = {
        part: (
            lambda module=module, part=part: read(module, torch.float32 if part == "vae" else torch.bfloat16)
        )
        for part, module in parts.items()
    }
    scheduler = json.loads((configs / "scheduler" / "scheduler_config.json").read_text())
    facts: Any = SimpleNamespace(resolution=1024, scheduler=scheduler, cfg_rescale=lambda asked: 0.0)
    return BaseModel(
        family_name, Path(), family, unet.eval(), vae.eval(), {k: v.eval() for k, v in encoders.items()},
        tokenizers, NoiseSchedule.from_scheduler(DDPMScheduler.from_config(scheduler)),
        torch.device("cuda"), torch.bfloat16, facts, waiting,
    )  # fmt: skip
