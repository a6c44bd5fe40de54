"""Prior preservation without class images: the base's own predictions on images that it makes itself."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from lora_core.data.captions import class_captions
from lora_core.data.images import ImageRecord
from lora_core.runs import events
from lora_core.runs.preflight import preflight
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import PRIOR_IMAGES, DatasetSection
from lora_core.train import objectives
from lora_core.train.loop import StepSettings, accumulate_gradients, sample_batch, sample_noise
from lora_core.train.setup import RuntimePlan, TrainSession, prepare
from tests.train.runs import RANDOM, Toy, broken_at, result, trained


@pytest.mark.parametrize(
    ("captions", "trigger", "expected"),
    [
        (["apple, zwx style, on white", "zwx style"], "zwx style", ["apple, on white"]),
        (["a photo of ZWX dog", "zwxs"], " zwx ", ["a photo of dog", "zwxs"]),
        (["a cat", "a cat"], "zwx", ["a cat"]),
        (["a cat"], "", []),
    ],
)
def test_the_trigger_is_taken_out_of_captions(captions: list[str], trigger: str, expected: list[str]) -> None:
    records = [ImageRecord(Path(f"{number}.png"), 64, 64, one) for number, one in enumerate(captions)]
    assert class_captions(records, DatasetSection(trigger=trigger)) == expected


def prepared(place: Toy, name: str, **changes: object) -> tuple[TrainSession, RunConfig]:
    run = place.run(name, **changes)
    config = run.config()
    return prepare(run, config, RuntimePlan.of(run, config), lambda *_: None), config


def test_the_loss_is_the_distance_from_the_base_and_pulls_back_to_it(own_toy: Toy) -> None:
    session, config = prepared(own_toy, "one", dataset__trigger="dot", loss__prior_preservation=2.0)
    state = session.state
    assert state.prior is not None
    batch = state.prior.batch(3)
    assert {caption.partition(",")[0] for caption in batch.captions} <= {f"number {n}" for n in range(4)}
    assert torch.equal(state.prior.batch(3).latents, batch.latents)
    assert len(state.prior._made) == PRIOR_IMAGES

    def loss() -> torch.Tensor:
        return state.prior.loss(state, session.text, slice(0, 2), 3, config)

    short = mock.patch.object(type(session.text), "embed_batch", side_effect=MemoryError)
    with short, pytest.raises(MemoryError):
        loss()
    assert state.injected.strength == 1.0, "the step is done again with less memory"
    assert not loss().any()
    parameters = state.flat_params.data.detach()
    parameters.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    first = loss()
    assert (first > 0).all()
    # Its noise and timesteps are others than those of the images of the micro-batch.
    drawn = []
    record = lambda *given: drawn.append(sample_noise(*given)) or drawn[0]  # noqa: E731
    with mock.patch.object(objectives, "sample_noise", record):
        loss()
    own, images = drawn[0], sample_batch(state, session.batches, StepSettings(config, 12), 3)[1]
    assert not torch.equal(own.timesteps, images.timesteps)
    assert not torch.isin(own.noise, images.noise).any()
    half = config.model_copy(update={"loss": config.loss.model_copy(update={"prior_preservation": 1.0})})
    found = state.prior.loss(state, session.text, slice(0, 2), 3, half)
    torch.testing.assert_close(first, 2.0 * found)
    # Its gradient is added to that of the images.
    step = (session.batches, session.text, StepSettings(config, 12), 1)
    losses, grads = accumulate_gradients(state, *step), state.flat_params.grads.clone()
    kept, state.prior = state.prior, None
    without = accumulate_gradients(state, *step)
    alone = state.flat_params.grads.clone()
    assert torch.equal(torch.stack(losses), torch.stack(without))
    state.flat_params.zero_grad()
    more = kept.loss(state, session.text, slice(0, 2), 1, config)
    (more.sum() / 2).backward()
    state.flat_params.flush_grads()
    torch.testing.assert_close(grads, alone + state.flat_params.grads, rtol=1e-4, atol=1e-7)


def test_a_run_that_was_broken_off_ends_with_the_same_bits(own_toy: Toy) -> None:
    changes = {name.replace(".", "__"): value for name, value in RANDOM.items()}
    more = {"train__steps": 4, "save__every": 2, "loss__prior_preservation": 1.0}
    whole, broken = (own_toy.run(name, **changes, **more) for name in ("whole", "broken"))
    trained(whole)
    broken_at(broken, events.StepDone, 3)
    trained(broken)
    assert result(broken) == result(whole)


def test_what_it_does_is_said_before_the_start(own_toy: Toy, tmp_path: Path) -> None:
    config = RunConfig().changed({"dataset.path": str(own_toy.pictures), "model.base": "demo"})

    def said(**changes: object) -> list[str]:
        found = config.changed({name.replace("__", "."): value for name, value in changes.items()})
        problems = preflight(found, tmp_path, card=lambda: None)
        return [one.sentence for one in problems if one.kind == "prior"]

    assert said() == []
    first = f"Prior preservation: the base makes {PRIOR_IMAGES} images first, of"
    assert said(loss__prior_preservation=1.0)[0].startswith(f"{first} plain things, as there is no")
    found = said(loss__prior_preservation=1.0, dataset__trigger="dot")
    assert found == [f"{first} captions without the trigger word; a step takes about twice as long."]
