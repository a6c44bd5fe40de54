"""One side of a comparison of steps: a process of its own that takes a training step whenever it is told to.

    python -m tests.benchmarks.sides NAME FORMAT

It says "ready" when it has taken two steps, then reads a line for each step and answers with the seconds of
processor time that it took. All sides have the weights of one seed, one picture's latents, noise, timestep
and text, the same factors of rank 16 on q, k, v and out of all transformer blocks, AdamW and a clipped norm.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from lora_core.backends.onednn import choose_layout, prepack
from lora_core.lora.inject import inject
from lora_core.lora.layer import FlatParams, LoraSpec
from lora_core.model_files.families import ATTENTION
from lora_core.models.device import keep_freed_memory
from lora_core.models.load import streamline

RANK = 16
TIMESTEP = 500
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], None]
Sides = tuple[Step, Callable[[], torch.Tensor]]
"""What takes a step, and what tells the gradient of the first one."""
ENDINGS = ("to_q", "to_k", "to_v", "to_out.0")


def unet_of(dtype: torch.dtype) -> UNet2DConditionModel:
    """The architecture of Stable Diffusion 1.5 with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
    )
    return unet.to(dtype).requires_grad_(False).train()


def target_paths(unet: nn.Module) -> list[str]:
    """The 128 layers that are adapted, in the UNet's order."""
    return [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(ENDINGS)
    ]


def start_of(down: torch.Tensor, up: torch.Tensor, number: int) -> None:
    """Random factors in place, so that both have a gradient."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for factor in (down, up):
            factor.copy_(0.02 * torch.randn(factor.shape, generator=generator))


class Given:
    """What a step is made of."""

    def __init__(self, dtype: torch.dtype, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, 4, size, size, generator=generator)
        self.noise = torch.randn(1, 4, size, size, generator=generator)
        self.context = torch.randn(1, 77, 768, generator=generator).to(dtype)
        self.timesteps = torch.tensor([TIMESTEP])
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
        kept = (1 - betas).cumprod(0)[TIMESTEP]
        self.noisy = (kept.sqrt() * self.latents + (1 - kept).sqrt() * self.noise).to(dtype)

    def loss(self, unet: nn.Module) -> torch.Tensor:
        """The squared error of the predicted noise, in fp32."""
        predicted = unet(self.noisy, self.timesteps, self.context, return_dict=False)[0]
        return nn.functional.mse_loss(predicted.float(), self.noise)


def limit(dtype: torch.dtype) -> Sides:
    """The frozen base alone, with a gradient for its input."""
    unet, given = unet_of(dtype), Given(dtype)
    given.noisy.requires_grad_()

    def step() -> None:
        given.noisy.grad = None
        given.loss(unet).backward()

    return step, lambda: torch.zeros(0)


def plain_step(unet: nn.Module, given: Given, factors: list[nn.Parameter]) -> Sides:
    optimizer = torch.optim.AdamW(factors, 1e-4, weight_decay=1e-2)

    def step() -> None:
        optimizer.zero_grad()
        given.loss(unet).backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()

    def gradient() -> torch.Tensor:
        given.loss(unet).backward()
        return torch.cat([factor.grad.float().flatten() for factor in factors if factor.grad is not None])

    return step, gradient


def peft_parts(dtype: torch.dtype) -> tuple[nn.Module, list[nn.Parameter]]:
    """A UNet with diffusers' and PEFT's layers, and their factors, in fp32 as its scripts have them."""
    from peft import LoraConfig

    unet = unet_of(dtype)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ENDINGS)))
    factors: list[nn.Parameter] = []
    wrapped = [layer for layer in unet.modules() if hasattr(layer, "lora_A")]
    for number, layer in enumerate(wrapped):
        pair = [getattr(layer, name)["default"].float().weight for name in ("lora_A", "lora_B")]
        start_of(*pair, number)
        factors += pair
    return unet, factors


def peft(dtype: torch.dtype) -> Sides:
    """diffusers with PEFT; autocast where the base is shorter than fp32."""
    unet, factors = peft_parts(dtype)
    given = Given(dtype)
    if dtype != torch.float32:
        plain = given.loss

        def loss(unet: nn.Module) -> torch.Tensor:
            with torch.autocast("cpu", dtype):
                return plain(unet)

        given.loss = loss
    return plain_step(unet, given, factors)


def kohya(dtype: torch.dtype) -> Sides:
    """kohya's module, from a checkout of sd-scripts that the variable SD_SCRIPTS names."""
    sys.path.insert(0, os.environ["SD_SCRIPTS"])
    module = importlib.import_module("networks.lora").LoRAModule
    unet, given = unet_of(dtype), Given(dtype)
    factors: list[nn.Parameter] = []
    for number, path in enumerate(target_paths(unet)):
        lora = module(path.replace(".", "_"), unet.get_submodule(path), 1.0, RANK, RANK)
        start_of(lora.lora_down.weight, lora.lora_up.weight, number)
        lora.apply_to()
        factors += [lora.lora_down.weight, lora.lora_up.weight]
    return plain_step(unet, given, factors)


def easel_parts(dtype: torch.dtype, prepacked: bool = True) -> tuple[nn.Module, FlatParams]:
    """A UNet with LoRA Easel's layers, and where their factors lie."""
    unet = unet_of(dtype)
    streamline(unet)
    order = target_paths(unet)
    injected = inject({"unet": unet}, ["unet"], ATTENTION, LoraSpec(RANK, float(RANK)), 0)
    layers: list[Any] = [unet.get_submodule(path) for path in order]
    assert len(layers) == len(injected.layers)
    for number, layer in enumerate(layers):
        start_of(layer.down, layer.up, number)
    storage = FlatParams([layers])
    if prepacked:
        prepack(unet, choose_layout([unet]))
    return unet, storage


def easel(dtype: torch.dtype) -> Sides:
    """LoRA Easel's own layers and step."""
    unet, storage = easel_parts(dtype)
    return easel_step(unet, storage, Given(dtype))


def easel_step(unet: nn.Module, storage: FlatParams, given: Given) -> Sides:
    """A step over all numbers at once, as `train/loop.py` takes it."""
    optimizer = torch.optim.AdamW(storage.groups, 1e-4, weight_decay=1e-2)

    def step() -> None:
        storage.zero_grad()
        given.loss(unet).backward()
        storage.flush_grads()
        factor = 1.0 / (torch.linalg.vector_norm(storage.grads) + 1e-6)
        if factor < 1.0:
            storage.grads.mul_(factor)
        optimizer.step()

    def gradient() -> torch.Tensor:
        given.loss(unet).backward()
        storage.flush_grads()
        return storage.grads.clone()

    return step, gradient


SIDES = {"limit": limit, "peft": peft, "kohya": kohya, "easel": easel}


def main() -> None:
    """Serve steps."""
    name, kind, *more = sys.argv[1:]
    torch.set_num_threads(1)
    side, _, keeping = name.partition("+")
    if side == "easel" or keeping:
        keep_freed_memory()
    step, gradient = SIDES[side](FORMATS[kind])
    found = gradient()
    if more:
        torch.save(found, Path(more[0]))
    for _ in range(2):
        step()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        began = time.process_time()
        step()
        sys.stdout.write(f"{time.process_time() - began}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
