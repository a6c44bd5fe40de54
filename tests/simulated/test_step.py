"""What a training step asks of a card: launches, copies and waits, as numbers that may only fall."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers.initialization import no_init_weights

from lora_core.lora.inject import inject
from lora_core.lora.layer import FlatParams, LoraSpec
from lora_core.model_files.families import ATTENTION, FAMILIES
from lora_core.models.load import streamline
from lora_core.system.files import FAMILY_CONFIGS
from lora_core.train.loop import StepSettings, training_steps
from lora_core.train.setup import RuntimePlan, prepare
from tests.simulated.device import SimulatedDevice
from tests.train.conftest import one_thread
from tests.train.runs import toy

DROPOUT = {"adapter__dropout": 0.2, "adapter__rank_dropout": 0.1, "adapter__module_dropout": 0.1}
STEPS = 3


@pytest.mark.parametrize(
    ("capability", "settings", "launches"),
    [
        ((8, 6), {}, 380),
        ((8, 6), DROPOUT, 765),
        ((7, 5), {"save__ema": 0.9}, 390),
        ((8, 6), {"train__gradient_accumulation_steps": 2}, 755),
    ],
    ids=["bf16", "dropout", "fp16", "accumulate"],
)
def test_a_step_waits_once_and_copies_twice_for_each_batch(
    tmp_path: Path, capability: tuple[int, int], settings: dict[str, object], launches: int
) -> None:
    with one_thread(), SimulatedDevice(capability=capability, gib=4) as card:
        run = toy(tmp_path).run("one", **{"train__precision": "auto", "loss__min_snr": 5.0, **settings})
        config = run.config()
        session = prepare(run, config, RuntimePlan.of(run, config), lambda *_: None)
        plan = StepSettings(config, STEPS + 1)
        steps = training_steps(session.state, session.batches, session.text, plan, 0)
        next(steps)
        card.clear()
        for _ in steps:
            pass
        seen = card.report()
    assert seen["syncs"] == seen["downloads"] == STEPS, card.syncs
    assert seen["uploads"] == 2 * STEPS * config.train.gradient_accumulation_steps, card.uploads
    assert seen["draws"] == 0, card.draws
    assert seen["launches"] <= launches * STEPS, card.launches


def test_launches_of_a_step_of_stable_diffusion_at_512_px() -> None:
    """Rank 16 on attention, bf16, batch 1. The frozen base's own passes take about 1,400."""
    family = FAMILIES["sd15"]
    config = UNet2DConditionModel.load_config(FAMILY_CONFIGS / family.configs / "unet")
    with SimulatedDevice(numbers=False) as card:
        with init_empty_weights(include_buffers=False), no_init_weights():
            unet = UNet2DConditionModel.from_config(config)
        for name, shape in [(name, weight.shape) for name, weight in unet.named_parameters()]:
            parent, _, leaf = name.rpartition(".")
            weight = torch.empty(shape, dtype=torch.bfloat16, device=card.device)
            setattr(unet.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
        streamline(unet)
        injected = inject({"unet": unet}, ["unet"], ATTENTION, LoraSpec(16, 16.0), 0)
        storage = FlatParams([list(injected.layers.values())])
        optimizer = torch.optim.AdamW(storage.groups, fused=True)
        noisy, target = (torch.zeros(1, 4, 64, 64).to(card.device) for _ in range(2))
        timesteps, context = torch.zeros(1).to(card.device), torch.zeros(1, 77, 768).to(card.device)

        def step() -> None:
            storage.zero_grad()
            given = (noisy.bfloat16(), timesteps, context.bfloat16())
            output = unet.train()(*given, return_dict=False)[0]
            nn.functional.mse_loss(output.float(), target).backward()
            storage.flush_grads()
            torch.linalg.vector_norm(storage.grads)
            storage.grads.mul_(0.5)
            storage.step(optimizer)

        step()
        card.clear()
        step()
        assert card.report()["launches"] <= 2000, card.launches
        assert not card.syncs
