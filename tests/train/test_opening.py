"""Opening a base within little memory: in the order of need, and in a smaller way where it does not fit."""

import json
import weakref
from unittest import mock

import pytest
import torch

from lora_core.errors import OutOfMemory
from lora_core.evaluate.validator import encode_view
from lora_core.models import load
from lora_core.models.load import load_base, open_base
from lora_core.train import data, setup
from lora_core.train.setup import RuntimePlan
from tests.train.runs import Toy, notes, result, trained, trouble

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU, FP32 = torch.device("cpu"), torch.float32


def lacks_weights(module: torch.nn.Module) -> bool:
    return all(parameter.is_meta for parameter in module.parameters())


def test_a_deferred_base_has_the_weights_of_one_that_was_read_at_once(own_toy: Toy) -> None:
    whole = load_base(str(own_toy.base), CPU, FP32)
    base = open_base(str(own_toy.base), CPU, FP32)
    assert lacks_weights(base.vae)
    assert all(lacks_weights(module) for module in base.modules.values())
    base.load("vae")
    assert not lacks_weights(base.vae)
    assert lacks_weights(base.denoiser)
    base.load(*base.text_encoders, "unet")
    for name, module in {**whole.modules, "vae": whole.vae}.items():
        mine = base.component(name).state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(mine[key], tensor), (name, key)


def test_the_unet_is_read_when_everything_is_encoded(own_toy: Toy) -> None:
    seen: list[tuple[str, bool]] = []
    encoded, condition = data.encode_view, data.encode_prompt

    def picture(base, *more):
        seen.append(
            ("picture", lacks_weights(base.denoiser) and lacks_weights(base.text_encoders["text_encoder"]))
        )
        return encoded(base, *more)

    def text(base, *more):
        seen.append(("caption", lacks_weights(base.denoiser)))
        return condition(base, *more)

    with (
        mock.patch.object(data, "encode_view", picture),
        mock.patch.object(data, "encode_prompt", text),
    ):
        trained(own_toy.run("ordered", train__steps=1))
    assert {kind for kind, _ in seen} == {"picture", "caption"}
    assert all(absent for _, absent in seen)


def test_a_base_that_does_not_fit_is_opened_in_8_bits(own_toy: Toy) -> None:
    fill = load.fill

    def full_unless_compact(module, find, dtype, device, where, policy=None):
        if where.title == "UNet" and not (policy and policy.quantize):
            raise FULL
        return fill(module, find, dtype, device, where, policy)

    run = own_toy.run("small", train__steps=2)
    with mock.patch.object(load, "fill", full_unless_compact):
        trained(run)
    assert run.status() == "done"
    assert json.loads(run.plan_file.read_text())["rungs"] == [["int8", 0]]
    assert [note for note in notes(run) if note.startswith("The base does not fit into memory as it is.")]
    # A run that asks for 8 bits takes the same steps.
    asked = own_toy.run("asked", train__steps=2, train__quantize_base="int8")
    trained(asked)
    assert result(run)["adapter.safetensors"] == result(asked)["adapter.safetensors"]


def test_nothing_of_a_base_that_did_not_fit_stays_in_memory(own_toy: Toy) -> None:
    fill, unets, alive = load.fill, [], []

    def full_when_read(module, find, dtype, device, where, policy=None):
        fill(module, find, dtype, device, where, policy)
        if where.title == "UNet":
            alive.append([one() for one in unets if one() is not None] != [])
            unets.append(weakref.ref(module))
            if len(unets) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    with mock.patch.object(load, "fill", full_when_read):
        trained(own_toy.run("freed", train__steps=1))
    assert alive == [False, False]


def test_a_base_that_fits_in_no_way_says_so(own_toy: Toy) -> None:
    with mock.patch.object(load, "fill", side_effect=FULL):
        run = own_toy.run("full")
        sentence = trouble(run)
        with pytest.raises(OutOfMemory):
            load_base(str(own_toy.base), CPU, FP32)
    assert "does not fit into the memory that is free" in sentence
    assert "ownload" not in sentence
    assert run.progress().reason == sentence


def test_pictures_that_do_not_fit_the_card_are_encoded_on_the_processor(own_toy: Toy) -> None:
    moved: list[str] = []

    def encode(base, *view):
        if not moved:
            raise FULL
        return encode_view(base, *view)

    def put(base, part, device):
        moved.append(f"{part} {device}")

    plain, run = own_toy.run("plain", train__steps=1), own_toy.run("aside", train__steps=1)
    trained(plain)
    for file in (own_toy.home / "cache" / "latents").iterdir():
        file.unlink()
    with (
        mock.patch.object(data, "encode_view", encode),
        mock.patch.object(load.BaseModel, "put", put),
        mock.patch.object(setup, "is_on_cpu", return_value=False),
    ):
        trained(run)
    assert moved[0] == "vae cpu"
    assert result(run)["adapter.safetensors"] == result(plain)["adapter.safetensors"]


def test_a_run_of_a_card_is_resumed_elsewhere_only_if_that_is_accepted(own_toy: Toy) -> None:
    run = own_toy.run("moved", train__steps=2)
    plan = RuntimePlan.of(run, run.config())
    run.plan_file.write_text(json.dumps({**vars(plan), "device": "cuda", "precision": "bf16"}))
    sentence = trouble(run)
    assert "began on a graphics card, and this computer now computes on the processor" in sentence
    assert "--accept-changes" in sentence
    assert run.progress().changed == ["the device"]
    trained(run, accept_changes=True)
    assert run.status() == "done"
    assert json.loads(run.plan_file.read_text())["device"] == "cpu"


def test_a_device_that_is_not_there_is_named_with_those_that_are(own_toy: Toy) -> None:
    run = own_toy.run("elsewhere", train__steps=2, train__device="cuda:1")
    assert "train.device = cuda:1 does not exist; PyTorch sees cpu. Choose" in trouble(run)
    # A run that began on it goes on with what is there, if that is accepted.
    run.plan_file.write_text(json.dumps(vars(RuntimePlan("bf16", "cuda", 1))))
    trouble(run)
    trained(run, accept_changes=True)
    assert run.status() == "done"
