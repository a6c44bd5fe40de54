"""The fused layer against the plain one that says what it means, and what it costs beside the frozen base."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from lora_core.backends.compact import WeightPolicy, quantize_int8
from lora_core.lora.inject import Injected, inject
from lora_core.lora.layer import DropoutState, FlatParams, LoraLayer, LoraSpec
from lora_core.model_files.families import ATTENTION, KOHYA, LOCON, Targets
from tests.counting import kept_bytes, launches
from tests.tiny import tiny_text_encoder, tiny_unet

SHAPE = LoraSpec(rank=4, alpha=6.0)


def layers_of(
    module: nn.Module, part: str, targets: Targets, stored: bool, std: float = 0.1, apart: bool = False
) -> tuple[Injected, FlatParams | None]:
    """Layers with factors that are not zero, in a storage or not."""
    module.requires_grad_(False)
    injected = inject({part: module}, [part], targets, SHAPE, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in injected.parameters():
            tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
    return injected, FlatParams([list(injected.layers.values())], apart) if stored else None


def unet_output(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    dtype = next(unet.parameters()).dtype
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    context = torch.randn(2, 7, 32, generator=generator).to(dtype)
    return unet(latents, torch.tensor([10, 700]), context).sample.float()


def text_output(encoder: nn.Module) -> torch.Tensor:
    return encoder(input_ids=torch.arange(20).reshape(2, 10)).last_hidden_state.float()[..., :5]


def gradient(injected: Injected) -> torch.Tensor:
    return torch.cat([t.grad.flatten() for t in injected.parameters() if t.grad is not None])


Output = Callable[[nn.Module], torch.Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("part", "build", "output", "targets"),
    [
        ("unet", tiny_unet, unet_output, ATTENTION),
        ("unet", tiny_unet, unet_output, KOHYA),
        ("unet", tiny_unet, unet_output, LOCON),
        ("text_encoder", tiny_text_encoder, text_output, KOHYA),
    ],
    ids=["attention", "every linear layer", "convolutions too", "text"],
)
def test_it_equals_the_plain_layers(
    part: str, build: Callable[[], nn.Module], output: Output, targets: Targets, dtype: torch.dtype
) -> None:
    found = []
    for stored in (False, True):
        module = build().to(dtype)
        injected, storage = layers_of(module, part, targets, stored)
        made = []
        for scale in (1.0, 0.5):  # gradients add up
            made.append(output(module))
            (scale * made[-1].square().mean()).backward()
            if storage is not None:
                storage.flush_grads()
        found.append((made[0].detach(), gradient(injected)))
    near = 1e-5 if dtype == torch.float32 else 0.03
    for plain, fused in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert (fused - plain).norm() <= near * plain.norm()


def test_kept_apart_they_are_the_same_numbers() -> None:
    found = []
    for apart in (False, True):
        unet = tiny_unet()
        injected, storage = layers_of(unet, "unet", ATTENTION, stored=True, apart=apart)
        unet_output(unet).square().mean().backward()
        found.append(gradient(injected))
    assert torch.equal(*found)
    layers = injected.layers.values()
    assert storage is not None
    downs, ups = storage.groups
    assert torch.equal(downs, torch.cat([layer.down.flatten() for layer in layers]))
    assert torch.equal(ups, torch.cat([layer.up.flatten() for layer in layers]))
    assert torch.equal(ups.grad, torch.cat([layer.up.grad.flatten() for layer in layers]))


def test_it_equals_the_plain_layers_twice_computed() -> None:
    found = []
    for stored in (False, True):
        unet = tiny_unet()
        injected, _ = layers_of(unet, "unet", ATTENTION, stored)
        unet.train()
        unet.enable_gradient_checkpointing()
        unet_output(unet).square().mean().backward()
        found.append(gradient(injected))
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()


@pytest.mark.parametrize("targets", [ATTENTION, LOCON], ids=["attention", "convolutions too"])
def test_beside_a_base_in_eight_bits(targets: Targets) -> None:
    found = []
    for stored in (False, True):
        unet = tiny_unet()
        WeightPolicy(quantize_int8).apply_to(unet)
        injected, _ = layers_of(unet, "unet", targets, stored)
        unet_output(unet).square().mean().backward()
        found.append(gradient(injected))
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()


def test_strength_and_no_gradient() -> None:
    plain, fused = tiny_unet(), tiny_unet()
    injected = [
        layers_of(unet, "unet", ATTENTION, stored)[0] for unet, stored in ((plain, False), (fused, True))
    ]
    bare = unet_output(tiny_unet().requires_grad_(False))
    for strength in (-0.5, 0.7):
        for one in injected:
            one.set_strength(strength)
        with torch.no_grad():
            torch.testing.assert_close(unet_output(fused), unet_output(plain), rtol=1e-4, atol=1e-5)
    injected[1].set_strength(0.0)
    assert torch.equal(unet_output(fused), bare)


def test_dropout_takes_the_plain_way() -> None:
    layer = LoraLayer(
        nn.Linear(6, 5), "x", LoraSpec(2, 2.0, dropout=0.5), DropoutState(first=0, last=3, rows=3), 0
    )
    nn.init.normal_(layer.up)
    x = torch.randn(3, 6)
    before = layer(x)
    FlatParams([[layer]])
    assert torch.equal(layer(x), before)
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + x @ layer.down.T @ layer.up.T)


def test_a_storage_keeps_all_bits_and_shows_every_change() -> None:
    layers = [LoraLayer(nn.Linear(6, 5), str(n), LoraSpec(2, 2.0), DropoutState(), 0) for n in range(3)]
    before = [(layer.down.detach().clone(), layer.up.detach().clone()) for layer in layers]
    storage = FlatParams([layers[:1], layers[1:2]])
    for layer, (down, up) in zip(layers, before, strict=True):
        assert torch.equal(layer.down, down)
        assert torch.equal(layer.up, up)
    assert layers[2].param_view is None
    assert [len(group) for group in storage.groups] == [22, 22]
    assert torch.equal(storage.cast(torch.bfloat16).values, storage.data.detach().bfloat16())
    with storage.mutate():
        layers[1].up.data.fill_(7.0)
    assert storage.data[-10:].tolist() == [7.0] * 10
    assert storage.cast(torch.bfloat16).values[-1] == 7.0
    storage.groups[1].grad.fill_(2.0)
    storage.step(torch.optim.SGD(storage.groups[1:], lr=1.0))
    assert layers[1].up.flatten().tolist() == [5.0] * 10
    assert storage.cast(torch.bfloat16).values[-1] == 5.0
    layers[1].up.data.fill_(6.0)
    storage.zero_grad()
    assert storage.cast(torch.bfloat16).values[-1] == 6.0
    assert layers[1].up.grad is not None
    assert not layers[1].up.grad.any()


def narrow_unet() -> UNet2DConditionModel:
    """The blocks of Stable Diffusion 1.5, an eighth as wide: it launches the same operations."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 128, 128), cross_attention_dim=48, norm_num_groups=8,
        attention_head_dim=4,
    ).requires_grad_(False)  # fmt: skip


def test_what_it_costs_beside_the_frozen_base() -> None:
    """A step's forward and backward pass in which the frozen base has a gradient for its input alone."""
    latents = torch.randn(1, 4, 8, 8)
    context = torch.randn(1, 7, 48)

    def forward(unet: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return unet(x, torch.tensor([500]), context).sample.square().mean()

    bare = narrow_unet()
    leaf = latents.clone().requires_grad_()
    base = launches(lambda: forward(bare, leaf).backward())
    adapted = copy.deepcopy(bare)
    layers_of(adapted, "unet", ATTENTION, True)
    fused = launches(lambda: forward(adapted, latents).backward())
    assert fused <= 1.55 * base, (fused, base)
    weights = {p.untyped_storage().data_ptr() for unet in (bare, adapted) for p in unet.parameters()}
    ratio = kept_bytes(lambda: forward(adapted, latents), weights) / kept_bytes(
        lambda: forward(bare, leaf), weights
    )
    assert ratio <= 1.1, ratio
