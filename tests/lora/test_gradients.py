"""Our layers against PEFT's: the same factors must give the same output and the same gradients."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lora_core.lora.inject import Injected, inject, target_modules
from lora_core.lora.layer import LoraSpec
from lora_core.model_files.families import KOHYA, LOCON, Targets
from tests.tiny import tiny_text_encoder, tiny_unet

SHAPE = LoraSpec(rank=4, alpha=6.0)


def _factors(injected: Injected) -> None:
    """Random factors in place of the zero start, so that both of them get a gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in injected.parameters():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


def _peft_twin(module: nn.Module, part: str, injected: Injected, targets: Targets) -> dict[str, nn.Module]:
    """PEFT's layers in `module` with our factors, by our layer names."""
    found = target_modules(part, module, targets)
    config = LoraConfig(
        r=SHAPE.rank, lora_alpha=SHAPE.alpha, target_modules=[path for path, _ in found.values()]
    )
    inject_adapter_in_model(config, module)
    twins = {}
    for name, (path, _) in found.items():
        twin = module.get_submodule(path)
        ours = injected.layers[part, name]
        with torch.no_grad():
            twin.lora_A["default"].weight.copy_(ours.down)
            twin.lora_B["default"].weight.copy_(ours.up)
        twins[name] = twin
    return twins


def large_base_unet() -> UNet2DConditionModel:
    """Three levels as in SDXL: none, one and two transformer blocks, linear projections, time ids and pooled
    text."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )


def _large_base_loss(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 7, 32, generator=generator)
    more = {
        "text_embeds": torch.randn(2, 12, generator=generator),
        "time_ids": torch.tensor([[64.0, 48, 0, 2, 16, 16], [100, 100, 3, 0, 16, 16]]),
    }
    return unet(latents, torch.tensor([10, 700]), context, added_cond_kwargs=more).sample.square().mean()


def _unet_loss(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 7, 32, generator=generator)
    return unet(latents, torch.tensor([10, 700]), context).sample.square().mean()


def _text_loss(encoder: nn.Module) -> torch.Tensor:
    return encoder(input_ids=torch.arange(20).reshape(2, 10)).last_hidden_state[..., :5].square().mean()


CASES = {
    # Transformers: two on the way up, one each elsewhere; twelve layers each, and two layers of text with
    # six.
    "unet": ("unet", tiny_unet, _unet_loss, KOHYA, 4 * 12),
    "text encoder": ("text_encoder", tiny_text_encoder, _text_loss, KOHYA, 2 * 6),
    # And eight resnets of three layers, five of them with a shortcut, and a change of size each way.
    "unet, convolutions": ("unet", tiny_unet, _unet_loss, LOCON, 4 * 12 + 8 * 3 + 5 + 2),
    # Two levels down, the middle, two transformers at each of two levels up, of one or two blocks.
    "large base": (
        "unet",
        large_base_unet,
        _large_base_loss,
        KOHYA,
        7 * 2 + 10 * (1 + 2 + 2 + 2 * 2 + 2 * 1),
    ),
}


@pytest.mark.parametrize(("part", "build", "loss_of", "targets", "count"), CASES.values(), ids=CASES)
def test_gradients_equal_pefts(part, build, loss_of, targets, count):
    ours, theirs = build(), build()
    for module in (ours, theirs):
        module.requires_grad_(False)
    injected = inject({part: ours}, [part], targets, SHAPE, seed=0)
    assert len(injected.layers) == count
    _factors(injected)
    twins = _peft_twin(theirs, part, injected, targets)
    our_loss, their_loss = loss_of(ours), loss_of(theirs)
    our_loss.backward()
    their_loss.backward()
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    kinds = set()
    for name, twin in twins.items():
        layer = injected.layers[part, name]
        kinds.add(type(layer.base).__name__)
        for mine, other in ((layer.down, twin.lora_A["default"]), (layer.up, twin.lora_B["default"])):
            assert other.weight.grad.abs().max() > 0
            error = (mine.grad - other.weight.grad).norm() / other.weight.grad.norm()
            assert error < 1e-4, (name, float(error))
    assert kinds == ({"Linear", "Conv2d"} if build is tiny_unet else {"Linear"})
    if targets is LOCON:
        strides = {
            layer.base.stride for layer in injected.layers.values() if isinstance(layer.base, nn.Conv2d)
        }
        assert strides == {(1, 1), (2, 2)}
