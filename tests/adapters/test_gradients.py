"""Our layers against PEFT's: the same factors must give the same output and the same gradients."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lora_core.adapters.inject import Injected, inject
from lora_core.adapters.lora import LoraShape
from lora_core.adapters.targets import KOHYA, target_modules
from tests.tiny import tiny_text_encoder, tiny_unet

SHAPE = LoraShape(rank=4, alpha=6.0)


def _factors(injected: Injected) -> None:
    """Random factors in place of the zero start, so that both of them get a gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in injected.parameters():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


def _peft_twin(module: nn.Module, part: str, injected: Injected) -> dict[str, nn.Module]:
    """PEFT's layers in `module` with our factors, by our layer names."""
    found = target_modules(part, module, KOHYA)
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


def _unet_loss(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 7, 32, generator=generator)
    return unet(latents, torch.tensor([10, 700]), context).sample.square().mean()


def _text_loss(encoder: nn.Module) -> torch.Tensor:
    return encoder(input_ids=torch.arange(20).reshape(2, 10)).last_hidden_state[..., :5].square().mean()


@pytest.mark.parametrize(
    ("part", "build", "loss_of", "count"),
    [("unet", tiny_unet, _unet_loss, 48), ("text_encoder", tiny_text_encoder, _text_loss, 12)],
)
def test_gradients_equal_pefts(part, build, loss_of, count):
    ours, theirs = build(), build()
    for module in (ours, theirs):
        module.requires_grad_(False)
    injected = inject({part: ours}, [part], KOHYA, SHAPE, seed=0)
    assert len(injected.layers) == count
    _factors(injected)
    twins = _peft_twin(theirs, part, injected)
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
    assert kinds == ({"Linear", "Conv2d"} if part == "unet" else {"Linear"})
