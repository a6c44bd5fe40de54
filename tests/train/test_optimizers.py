"""Every optimizer learns with a base in every number format, however it writes what it has learned."""

import importlib.machinery
import re
import sys
import types
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_core.lora.inject import EMA, Injected, LayerPlan, adapter_weights, load_weights
from lora_core.lora.layer import DropoutState, FlatParams, LoraLayer, LoraSpec
from lora_core.model_files.families import FAMILIES
from lora_core.runs.folder import RunFolder
from lora_core.settings.schema import OPTIMIZERS, OptimizerChoice, OptimizerSection
from lora_core.train.autotune import FALLBACKS, MemoryFallback
from lora_core.train.checkpoint import load_checkpoint
from lora_core.train.loop import TrainState, optimizer_step
from lora_core.train.setup import AdapterPlan, RuntimePlan, build_optimizer
from tests.train.runs import Toy, asked_at, notes, result, trained, trouble

KEY = ("unet", "x")
RATES = {name: 1.0 for name, row in OPTIMIZERS.items() if row.one_rate} | {"came": 0.02}
STEPS = 100
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ByHand(torch.optim.Optimizer):
    """Gradient descent; the rows below differ in how they write."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.write(p, p.grad.detach(), group["lr"])

    def write(self, p: nn.Parameter, grad: torch.Tensor, lr: float) -> None:
        raise NotImplementedError


class ThroughData(ByHand):
    def write(self, p, grad, lr):
        p.data.add_(grad, alpha=-lr)


class OwnKernel(ByHand):
    """Writes to memory that torch sees no change of, as a compiled extension does."""

    def write(self, p, grad, lr):
        numbers = p.detach().numpy()
        numbers -= lr * grad.numpy()


class NewTensor(ByHand):
    def write(self, p, grad, lr):
        p.data = p.data - lr * grad


class Replaced(ByHand):
    """An 8-bit optimizer as far as a run sees it: other arguments, and a kernel of its own."""

    def __init__(self, params: Any, lr: float = 0.1, **rest: Any) -> None:
        super().__init__(params, lr)

    write = OwnKernel.write


ODD = {
    "through .data": OptimizerChoice("", "", f"{__name__}:ThroughData"),
    "own kernel": OptimizerChoice("", "", f"{__name__}:OwnKernel"),
    "new tensor": OptimizerChoice("", "", f"{__name__}:NewTensor"),
    "new tensor for each factor": OptimizerChoice("", "", f"{__name__}:NewTensor", by_matrix=True),
}


def trainee_of(
    name: str,
    dtype: torch.dtype,
    rate: float,
    lora_plus: float = 1.0,
    on: str = "cpu",
    sides: tuple[int, int] = (12, 10),
) -> TrainState:
    """One layer with its optimizer, as a run has them."""
    torch.manual_seed(0)
    shape = LoraSpec(4, 4.0)
    layer = LoraLayer(nn.Linear(*sides).to(dtype).requires_grad_(False), "x", shape, DropoutState(), 0)
    injected = Injected({KEY: layer}, DropoutState())
    base: Any = SimpleNamespace(family=FAMILIES["sd15"], device=torch.device(on), dtype=dtype)
    optim = OptimizerSection(name=name, lr=rate, text_encoder_lr=0.0, lora_plus=lora_plus)
    plan = AdapterPlan({KEY: LayerPlan(shape, rate)}, None, "", [])
    optimizer, storage = build_optimizer(injected, plan, base, optim)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    return TrainState(base, injected, optimizer, storage, scaler)


def learned(state: TrainState, steps: int = STEPS) -> float:
    """Train on a task of rank 2; the loss at the end as a share of that at the start, in what is exported."""
    layer = state.injected.layers[KEY]
    generator = torch.Generator().manual_seed(1)
    width, out = layer.base.in_features, layer.base.out_features
    sizes = ((64, width), (width, 2), (2, out))
    x, inner, outer = (torch.randn(size, generator=generator) for size in sizes)
    x = x.to(state.base.dtype)
    update = x.float() @ inner @ outer / width**0.5
    target = layer.base(x).float() + update
    for step in range(steps):
        state.flat_params.zero_grad()
        loss = (layer(x).float() - target).square().mean()
        state.scaler.scale(loss).backward()
        state.flat_params.flush_grads()
        _, ok = optimizer_step(state, 1.0, [loss.detach()[None]], step + 1)
        assert ok
    seen = float((layer(x).float() - target).square().mean().detach())
    weights = adapter_weights(state.injected).layers[KEY]
    exported = float((x.float() @ weights.delta().T - update).square().mean())
    begun = float(update.square().mean())
    assert seen == pytest.approx(exported, rel=0.1, abs=0.02 * begun), "the layer computes with other numbers"
    return exported / begun


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [*OPTIMIZERS, *ODD])
def test_learns(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for row in ODD:
        monkeypatch.setitem(OPTIMIZERS, row, ODD[row])
    if OPTIMIZERS[name].package == "bitsandbytes":
        request.getfixturevalue("bitsandbytes")
    pytest.importorskip(OPTIMIZERS[name].load.partition(":")[0])
    assert learned(trainee_of(name, PRECISIONS[precision], RATES.get(name, 0.1))) < 0.2


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.load.startswith("torch.")])
def test_a_card_takes_a_fused_step_where_there_is_one(name: str) -> None:
    kinds = [bool(trainee_of(name, torch.float32, 0.1, on=on).optimizer.defaults.get("fused"))
             for on in ("cpu", "cuda")]  # fmt: skip
    assert kinds == [False, name in ("adam", "adamw")]


@pytest.mark.parametrize("name", ["adafactor", "own kernel", "new tensor"])
def test_learns_with_factors_kept_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in ODD:
        monkeypatch.setitem(OPTIMIZERS, row, ODD[row])
    assert learned(trainee_of(name, torch.bfloat16, 0.05, lora_plus=2.0)) < 0.2


def test_the_8_bit_rung_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("bitsandbytes")
    package.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    module: Any = types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = Replaced
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    state = trainee_of("adamw", torch.bfloat16, 0.1)
    MemoryFallback(state, 1, [("8-bit optimizer", 0)]).apply_until(0)
    assert isinstance(state.optimizer, Replaced)
    assert learned(state) < 0.2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bitsandbytes_learns(bitsandbytes: Any, precision: str) -> None:
    state = trainee_of("adamw", PRECISIONS[precision], 0.04, sides=(600, 500))
    MemoryFallback(state, 1, [("8-bit optimizer", 0)]).apply_until(0)
    assert type(state.optimizer) is bitsandbytes.optim.AdamW8bit
    assert learned(state, 40) < 0.2
    (kept,) = state.optimizer.state.values()
    assert (kept["state1"].dtype, kept["state2"].dtype) == (torch.uint8, torch.uint8)
    assert kept["state1"].numel() == state.flat_params.data.numel() == 4 * (600 + 500)


def test_a_run_beside_a_base_in_four_bits_resumes_bit_for_bit(bitsandbytes: Any, own_toy: Toy) -> None:
    how = {"train__steps": 4, "train__quantize_base": "nf4", "validation__every": 2}
    whole, broken, eight = (
        own_toy.run("whole", **how),
        own_toy.run("broken", **how),
        own_toy.run("eight", **(how | {"train__quantize_base": "int8"})),
    )
    trained(whole)
    asked_at(broken, "pause", 3)
    trained(broken)
    trained(eight)
    assert result(broken) == result(whole) != result(eight)


def test_a_run_with_bitsandbytes_resumes_bit_for_bit(bitsandbytes: Any, own_toy: Toy) -> None:
    how = {"train__steps": 4, "save__every": 2, "adapter__rank": 32, "train__precision": "bf16"}

    def rungs(name: str) -> RunFolder:
        run = own_toy.run(name, **how)
        plan = RuntimePlan.of(run, run.config())
        plan.rungs.append(("8-bit optimizer", 0))
        plan.write(run)
        return run

    whole, broken = rungs("whole"), rungs("broken")
    trained(whole)
    asked_at(broken, "pause", 3)
    assert broken.checkpoint_steps() == [2, 3]
    kept = load_file(broken.checkpoint(3) / "optimizer.safetensors")
    assert torch.uint8 in {tensor.dtype for tensor in kept.values()}
    trained(broken)
    assert result(broken) == result(whole)
    # Without the package its checkpoints cannot be read, which is said.
    again = rungs("again")
    asked_at(again, "pause", 3)
    with mock.patch.dict(sys.modules, {"bitsandbytes": None}):
        assert "AdamW in 8 bits, which this run has begun with, needs the package" in trouble(again)


def test_a_run_that_chose_8_bits_resumes_bit_for_bit(bitsandbytes: Any, own_toy: Toy) -> None:
    how: dict[str, object] = {"train__steps": 4, "save__every": 2, "adapter__rank": 32}
    how |= {"optimizer__name": "adamw_8bit", "optimizer__args": {"betas": [0.9, 0.99]}}
    whole, broken = own_toy.run("whole", **how), own_toy.run("broken", **how)
    trained(whole)
    asked_at(broken, "pause", 3)
    kept = load_file(broken.checkpoint(3) / "optimizer.safetensors")
    assert torch.uint8 in {tensor.dtype for tensor in kept.values()}
    trained(broken)
    assert result(broken) == result(whole)


def test_an_8_bit_optimizer_without_code_for_the_device_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutKernel(Replaced):
        def write(self, p, grad, lr):
            raise NotImplementedError("bitsandbytes::optimizer_update_8bit_blockwise")

    package, module = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    package.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    state = trainee_of("adamw", torch.float32, 0.1)
    for found in (None, WithoutKernel):
        if found:
            monkeypatch.setattr(module, "AdamW8bit", found, raising=False)
        (rung,) = (each for each in FALLBACKS if each.name == "8-bit optimizer")
        assert not rung.possible(MemoryFallback(state, 1, []))


def test_whatever_writes_the_factors_is_seen() -> None:
    """A checkpoint, the average in the adapter's place and back, the end of a range test."""
    state = trainee_of("adamw", torch.bfloat16, 0.1)
    layer, storage = state.injected.layers[KEY], state.flat_params
    x = torch.randn(3, 12).bfloat16()

    def current() -> bool:
        plain = layer.base(x) + (x.float() @ layer.down.T @ layer.up.T).bfloat16()
        return bool(torch.allclose(layer(x), plain, rtol=0.05, atol=0.05))

    start = adapter_weights(state.injected)
    average = EMA(state.injected, storage, 0.9)
    before = layer(x)
    assert learned(state) < 0.2
    assert current()
    assert (layer(x) - before).abs().max() > 0.5
    with average.in_place():
        assert torch.equal(layer(x), before)
    assert current()
    load_weights(state.injected, start)
    assert torch.equal(layer(x), before)
    with storage.mutate() as numbers:
        numbers.numpy()[:] = 1.0
    assert current()


def test_a_run_that_changes_nothing_says_so(own_toy: Toy) -> None:
    moved, still = (own_toy.run(name, train__steps=1) for name in ("moved", "still"))
    start = trained(moved).export
    with mock.patch.object(FlatParams, "step"):
        trained(still)
        continued = own_toy.run("continued", train__steps=1, adapter__init=str(start))
        trained(continued)
    assert not [note for note in notes(moved) if note.startswith("The adapter")]
    assert [note for note in notes(still) if note.startswith("The adapter changes nothing: ")]
    assert [note for note in notes(continued) if note.startswith("The adapter is unchanged since the start")]


SCHEDULE_FREE = {"optimizer__name": "adamw_schedule_free", "optimizer__schedule": "constant"}


@pytest.mark.parametrize("name", ["adamw_schedule_free", "dadapt_adam", "came", "adafactor"])
def test_a_run_with_an_optimizer_and_its_arguments_resumes_bit_for_bit(name: str, own_toy: Toy) -> None:
    row = OPTIMIZERS[name]
    pytest.importorskip(row.load.partition(":")[0])
    how = {
        "train__steps": 4,
        "save__every": 2,
        "optimizer__name": name,
        "optimizer__args": {"weight_decay": 0.1},
    }
    if not row.one_rate:
        how["optimizer__lr"] = 1e-2
    whole, broken = own_toy.run("whole", **how), own_toy.run("broken", **how)
    trained(whole)
    asked_at(broken, "pause", 3)
    trained(broken)
    assert result(broken) == result(whole)
    groups = load_checkpoint(whole.checkpoint(4))[1].optimizer["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.1}


def test_schedule_free_is_measured_and_exported_where_it_averages_to(own_toy: Toy) -> None:
    """x = y + (1 - 1 / beta1) (z - y) (Defazio et al. 2024, equation 3), and looking at x changes no bit of
    y."""
    pytest.importorskip("pytorch_optimizer")
    seldom = own_toy.run("seldom", train__steps=4, **SCHEDULE_FREE)
    often = own_toy.run(
        "often", train__steps=4, save__every=1, **SCHEDULE_FREE, sample__every=1, validation__every=1,
        validation__pictures=1,
    )  # fmt: skip
    both = own_toy.run("both", train__steps=4, save__every=1, validation__pictures=1, **SCHEDULE_FREE)
    for run in (seldom, often, both):
        trained(run)
    assert result(often) == result(both)
    folder = often.checkpoint(4)
    y, x = (load_file(folder / name) for name in ("factors.safetensors", "adapter.safetensors"))
    (z,) = [t for name, t in load_file(folder / "optimizer.safetensors").items() if name.endswith("z")]
    flat = torch.cat([y[name].flatten() for name in y if not name.endswith("alpha")])
    assert flat.numel() == z.numel()
    assert float(flat.double().sum()) != float(z.double().sum())
    factors = {name: tensor for name, tensor in x.items() if not name.endswith("alpha")}
    moved = torch.cat([factors[name].flatten() for name in factors])
    wanted = flat.double().sum() + (1 - 1 / 0.9) * (z.double().sum() - flat.double().sum())
    assert float(moved.double().sum()) == pytest.approx(float(wanted), rel=1e-4)
    exported = load_file(next(often.exports.glob("often.safetensors")))
    assert all(torch.equal(exported[name], x[name].half()) for name in factors)


def test_a_class_by_name_is_trained_with_or_refused_in_a_sentence(own_toy: Toy) -> None:
    run = own_toy.run("class", train__steps=2, optimizer__name="torch.optim:Adamax", optimizer__lr=1e-2)
    trained(run)
    assert run.status() == "done"
    for name, words in (
        ("torch.optim:LBFGS", "cannot take a step on the device cpu"),
        ("torch.optim:NoSuch", "torch.optim has no NoSuch"),
        ("json:JSONDecoder", "is not an optimizer"),
        ("no_such_package:Adam", "needs the package no_such_package"),
    ):
        sentence = trouble(own_toy.run(re.sub(r"\W", "-", name), train__steps=1, optimizer__name=name))
        assert words in sentence
        assert name in sentence
