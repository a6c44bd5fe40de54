"""Toy runs on the simulated device: what a step costs, resumes, memory that runs out anywhere, MPS."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.errors import LoraError
from lora_core.generate.pipeline import generate_image
from lora_core.generate.request import GenerationRequest
from lora_core.models.load import load_base
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.schema import OPTIMIZERS, SAMPLERS
from tests.simulated.device import SimulatedDevice
from tests.train.runs import (
    RANDOM,
    SAMPLED,
    Toy,
    broken_at,
    check_story,
    check_whole,
    notes,
    result,
    toy,
    trained,
)

STEPS = {"train__steps": 4, "save__every": 2}
DROPOUT = {key.replace(".", "__"): value for key, value in RANDOM.items()}
OLD = {"capability": (7, 5)}
"""A card without bf16."""


@dataclass(frozen=True)
class Case:
    """A kind of run, and what one of its steps costs at most.

    Attributes:
        settings: of the run.
        syncs: times that the host waits for the device in a step.
        uploads: copies to the device in a step.
        launches: kernels in a step.
        card: of the device.
    """

    settings: dict[str, object]
    syncs: int
    uploads: int
    launches: int
    card: dict[str, Any]


def case(syncs: int, uploads: int, launches: int, card: Any = None, **settings: object) -> Case:
    return Case(settings, syncs, uploads, launches, card or {})


# Upper bounds of one step: syncs, uploads, launches. Whoever makes a step cheaper lowers them.
CASES = {
    "fp32": case(1, 5, 370, train__precision="fp32"),
    "bf16 dropout nadam": case(1, 5, 1870, train__precision="bf16", optimizer__name="nadam", **DROPOUT),
    "fp16 average adam": case(2, 5, 390, OLD, train__precision="auto", optimizer__name="adam", save__ema=0.9),
    "int8 checkpointing radam": case(
        1, 5, 610, train__precision="bf16", train__quantize_base="int8", train__gradient_checkpointing=True,
        optimizer__name="radam",
    ),
    "offload adafactor": case(
        66, 95, 970, train__precision="fp16", train__offload=True, optimizer__name="adafactor"
    ),
    "sgd": case(1, 5, 375, optimizer__name="sgd", optimizer__lora_plus=4.0),
    "lion": case(1, 5, 385, train__precision="bf16", optimizer__name="lion"),
    "prodigy": case(3, 5, 382, optimizer__name="prodigy", optimizer__lr=1.0),
    "dadapt_adam": case(5, 5, 388, optimizer__name="dadapt_adam"),
    "came": case(1, 5, 965, optimizer__name="came"),
    "schedule free": case(1, 5, 385, train__precision="bf16", optimizer__name="adamw_schedule_free"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy(tmp_path_factory.mktemp("simulated"))


@dataclass(frozen=True)
class Unbroken:
    """A finished run, the device it was on, and what its last step cost, by kind."""

    run: RunFolder
    card: SimulatedDevice
    costs: dict[str, Any]


@pytest.fixture(scope="module")
def unbroken(place: Toy) -> Callable[[str], Unbroken]:
    """Train a case once."""
    known: dict[str, Unbroken] = {}

    def get(name: str) -> Unbroken:
        if name in known:
            return known[name]
        needs = OPTIMIZERS[str(CASES[name].settings.get("optimizer__name", "adamw"))]
        pytest.importorskip(needs.load.partition(":")[0])
        card, costs = SimulatedDevice(**CASES[name].card), {}
        run = place.run(f"unbroken {name}", **STEPS, **CASES[name].settings)

        def on_event(event: events.Event) -> None:
            # Nothing is saved after step 3, so that the next event comes one step later.
            if isinstance(event, events.StepDone) and event.step == 3:
                card.clear()
            if isinstance(event, events.StepDone) and event.step == 4:
                costs.update(card.report(), where=dict(card.syncs), up=dict(card.uploads))

        with card:
            trained(run, on_event)
        return known.setdefault(name, Unbroken(run, card, costs))

    return get


def test_every_optimizer_has_a_case() -> None:
    named = {case.settings.get("optimizer__name", "adamw") for case in CASES.values()}
    # The kernels of bitsandbytes are not torch's.
    assert named == set(OPTIMIZERS) - {"adamw_8bit"}


@pytest.mark.parametrize("name", CASES)
def test_a_step_costs_no_more_than_its_budget(name: str, unbroken: Callable[[str], Unbroken]) -> None:
    limit, costs = CASES[name], unbroken(name).costs
    assert costs["syncs"] <= limit.syncs, costs["where"]
    assert costs["uploads"] <= limit.uploads, costs["up"]
    assert costs["launches"] <= limit.launches


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumed_on_a_card_ends_as_an_unbroken_one(
    name: str, unbroken: Callable[[str], Unbroken], place: Toy
) -> None:
    wanted = unbroken(name)
    assert wanted.card.draws == {}
    run = place.run(f"broken {name}", **STEPS, **CASES[name].settings)
    with SimulatedDevice(**CASES[name].card) as card:
        broken_at(run, events.StepDone, 3)
        trained(run)
    assert result(run) == result(wanted.run)
    names = run.name, wanted.run.name
    assert [note.replace(names[0], names[1]) for note in notes(run)] == notes(wanted.run)
    assert card.live == 0


def test_a_run_without_a_fused_optimizer_has_the_bits_of_a_processor(
    unbroken: Callable[[str], Unbroken], place: Toy
) -> None:
    run = place.run("processor", **STEPS, **CASES["sgd"].settings)
    trained(run)
    assert result(unbroken("sgd").run) == result(run)


def test_no_step_of_a_sampler_waits(place: Toy) -> None:
    with SimulatedDevice() as card:
        base = load_base(str(place.base), card.device, torch.float32)

        def syncs(sampler: str, steps: int) -> int:
            card.clear()
            request = GenerationRequest(prompt="a dot", sampler=sampler, steps=steps, width=16, height=16)
            generate_image(base, request)
            return card.syncs.total()

        waits = {name: (syncs(name, 4) - syncs(name, 2)) / 2 for name in SAMPLERS}
    assert {name: wait for name, wait in waits.items() if wait} == {}


@pytest.fixture(scope="module")
def allocations(place: Toy, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many a run makes that also validates and samples, with nothing cached."""
    own = replace(place, home=tmp_path_factory.mktemp("all"))
    with SimulatedDevice() as card:
        trained(own.run("all", **STEPS, **SAMPLED))
    return card.allocations


@pytest.mark.parametrize("share", [0.002, 0.08, 0.3, 0.55, 0.8, 0.95])
def test_an_allocation_that_fails_costs_a_rung_or_ends_in_a_sentence(
    share: float, allocations: int, place: Toy, tmp_path: Path
) -> None:
    run = replace(place, home=tmp_path).run("failing", **STEPS, **SAMPLED)
    with SimulatedDevice() as card:
        card.fail_at = max(1, int(share * allocations))
        try:
            trained(run)
            sentence = ""
        except LoraError as error:
            sentence = str(error)
        assert run.progress().reason == sentence
        assert ("memory" in sentence) == (run.status() != "done")
        assert card.failures
        check_whole(run)
        check_story(run)
        if run.status() != "done":
            trained(run)
    assert run.status() == "done"
    assert card.live == 0


def test_a_mac_encodes_trains_validates_and_samples(place: Toy, tmp_path: Path) -> None:
    tokens = {"adapter__new_tokens": ["zwx*2 = dot"], "dataset__trigger": "zwx"}
    run = replace(place, home=tmp_path).run("mac", **STEPS, **SAMPLED, **tokens)
    with SimulatedDevice("mps") as card:
        trained(run)
    assert run.status() == "done"
    assert notes(run) == []
    assert run.progress().validations
    assert run.progress().previews
    assert card.launches.total() > 1000
