"""Concept sliders: what a step regresses on, what is measured and drawn, and what is refused before Start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from lora_core import api
from lora_core.errors import ConfigError, DatasetError
from lora_core.lora.inject import at_strength
from lora_core.model_files.header import read_header
from lora_core.model_files.starting_settings import is_slider
from lora_core.models.unet import NoiseSchedule
from lora_core.report.report import collect_data, run_evaluator, summary
from lora_core.runs import events
from lora_core.runs.preflight import preflight
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import SLIDER_STEPS, SLIDER_STRENGTHS, SliderSection
from lora_core.train.loop import sample_batch
from lora_core.train.objectives import SliderBatch, ddim_step, slider_loss
from lora_core.train.setup import RuntimePlan, TrainSession, prepare
from tests.tiny import flow_schedule
from tests.train.runs import Toy, notes, trained

PROMPTS = {"slider__positive": "a red dot", "slider__negative": "a blue dot"}
SHIFT: dict[str, Any] = {
    **PROMPTS, "slider__guidance": 100.0, "train__steps": 12, "train__batch_size": 1, "optimizer__lr": 1e-2,
    "optimizer__schedule": "constant", "save__every": 0, "validation__pictures": 1, "validation__every": 12,
    "validation__draws_per_image": 16,
    "validation__forgetting": 0, "sample__every": 12, "sample__prompts": ["a dot"],
}  # fmt: skip


def opened(toy: Toy, **changes: object) -> tuple[RunConfig, TrainSession]:
    run = toy.run("opened", **PROMPTS, **changes)
    config = run.config()
    return config, prepare(run, config, RuntimePlan.of(run, config), lambda *_: None)


def test_the_opposites_stand_behind_what_it_acts_on_and_what_is_left_alone_is_its_own_opposite() -> None:
    section = SliderSection(positive="old", negative="young", target=["a man", "a woman"], preserve=["a dog"])
    assert section.prompts() == [
        ("a man", "a man, old", "a man, young"), ("a woman", "a woman, old", "a woman, young"),
    ]  # fmt: skip
    assert section.kept() == [("a dog", "a dog", "a dog")]
    assert SliderSection(positive="old", negative="young").prompts() == [("", "old", "young")]
    assert not SliderSection().captions()


def test_half_of_the_rows_are_prompts_to_leave_alone(own_toy: Toy) -> None:
    _, session = opened(own_toy, slider__target=["a dot"], slider__preserve=["plain", "striped"])
    batches = [session.batches.batch(number) for number in range(100)]
    captions = [caption for batch in batches for caption in batch.captions]
    assert set(captions) == {"a dot", "plain", "striped"}
    assert 70 < captions.count("a dot") < 130
    assert all(
        (one.positive[row] == one.negative[row]) == (one.captions[row] != "a dot")
        for one in batches if isinstance(one, SliderBatch) for row in range(2)
    )  # fmt: skip
    assert session.batches.batch(7) == session.batches.batch(7)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_of_the_partial_denoising_is_ddims(prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    noisy, output = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    at = scheduler.timesteps[4]
    to = at - 100
    ours = ddim_step(NoiseSchedule.from_scheduler(scheduler), noisy, output, at.repeat(2), to.repeat(2))
    torch.testing.assert_close(ours, scheduler.step(output, at, noisy).prev_sample, atol=1e-5, rtol=1e-5)


def test_a_step_of_flow_keeps_latents_and_noise() -> None:
    clean, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    schedule, at, to = flow_schedule(100), torch.tensor([80, 99]), torch.tensor([20, 40])
    found = ddim_step(schedule, schedule.add_noise(clean, noise, at), noise - clean, at, to)
    torch.testing.assert_close(found, schedule.add_noise(clean, noise, to), atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_distance_from_the_shifted_prediction(
    own_toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained adapter is the base, so that what is left is the shift itself, in both directions; then
    the wanted prediction is worked out by hand, with an adapter that changes something."""
    config, session = opened(own_toy, slider__guidance=3.0)
    state, base = session.state, session.state.base
    batch, draw = sample_batch(state, session.batches, _step(config), 1)
    assert isinstance(batch, SliderBatch)
    assert (batch.direction, session.batches.batch(2).direction) == (-1.0, 1.0)
    for layer in state.injected.layers.values():
        torch.nn.init.normal_(layer.up, std=0.1, generator=torch.Generator().manual_seed(1))
    state.flat_params.mark_changed()
    seen = []
    predict = base.predict_noise

    def noted(*how: Any) -> torch.Tensor:
        seen.append((state.injected.strength, how))
        return predict(*how)

    monkeypatch.setattr(type(base), "predict_noise", lambda self, *how: noted(*how))
    found = slider_loss(state, session.text, batch, slice(0, 2), draw, config)
    assert [strength for strength, _ in seen] == [-1.0] * SLIDER_STEPS + [0.0] * 3 + [-1.0]
    noisy, at = seen[-1][1][:2]
    with torch.no_grad():
        texts = {words: session.text.embed_batch([words] * 2) for words in ("", "a red dot", "a blue dot")}
        with at_strength(state.injected, 0.0):
            target, red, blue = (predict(noisy, at, text) for text in texts.values())
        with at_strength(state.injected, -1.0):
            now = predict(noisy, at, texts[""])
    wanted = target - 3.0 * (red - blue)
    torch.testing.assert_close(found.detach(), (now - wanted).square().flatten(1).mean(1))


def _step(config: RunConfig) -> Any:
    from lora_core.train.loop import StepSettings

    return StepSettings(config, config.train.steps)


def test_a_run_learns_the_shift_in_both_directions_and_draws_strips(own_toy: Toy) -> None:
    run = own_toy.run("slider", **SHIFT)
    trained(run)
    story = events.read_events(run.events_file)[0]
    (measured,) = [event for event in story if isinstance(event, events.Validated)]
    assert measured.on == events.WANTED_CHANGE
    assert measured.gain > 2 * measured.standard_error
    first, last = (run.path / e.files[0] for e in story if isinstance(e, events.PreviewDone))
    with Image.open(first) as base, Image.open(last) as strip:
        assert strip.width > len(SLIDER_STRENGTHS) * base.width
        assert "strength=-2,-1,0,1,2" in strip.info["parameters"]
    file = run.exports / "slider.safetensors"
    header = read_header(file).metadata
    assert is_slider(file)
    assert "from “a blue dot” (-1) to “a red dot” (1)" in header["modelspec.description"]
    assert (header["ss_num_train_images"], header["ss_tag_frequency"]) == ("0", "{}")
    with pytest.raises(DatasetError, match="trained without images"):
        run_evaluator(run, run.config())
    assert notes(run) == []
    verdict = summary(collect_data(run, False, lambda *_: None))[0]
    assert verdict.startswith("It learned: the wanted change is predicted")


def problems(tmp_path: Path, **changes: object) -> list[tuple[str, bool]]:
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    config = RunConfig().changed({"optimizer.text_encoder_lr": 0.0, **settings})
    return [
        (p.sentence, p.blocking) for p in preflight(config, tmp_path, card=lambda: None) if p.kind != "memory"
    ]


def test_before_start(tmp_path: Path) -> None:
    assert problems(tmp_path, **PROMPTS, dataset__path="", validation__pictures=5.0) == []
    for changes, words, blocks in (
        ({"slider__positive": "a"}, "slider.negative is empty", True),
        ({"slider__positive": "a ", "slider__negative": "a"}, "both 'a '; give opposite prompts", True),
        ({**PROMPTS, "optimizer__range_test": True}, "give optimizer.lr a number", True),
        ({**PROMPTS, "adapter__auto_rank": True}, "give adapter.rank a number", True),
        ({**PROMPTS, "optimizer__text_encoder_lr": 1e-4}, "changes other prompts too", False),
        ({**PROMPTS, "dataset__flip": True, "dataset__trigger": "zwx"}, "trigger, dataset.flip can", False),
        ({**PROMPTS, "loss__input_perturbation": 0.1}, "loss.input_perturbation can do nothing", False),
        ({**PROMPTS, "loss__unmasked_weight": 0.5}, "loss.unmasked_weight can do nothing", False),
        ({**PROMPTS, "slider__target": ["very " * 90]}, "longer than the 75 tokens", False),
        ({"slider__preserve": ["a"]}, "slider.preserve has no effect", False),
    ):  # fmt: skip
        ((sentence, blocking),) = problems(tmp_path, **changes)
        assert words in sentence
        assert blocking == blocks


def test_a_slider_takes_no_dataset_and_its_own_preset() -> None:
    prompts = {"slider.positive": "a", "slider.negative": "b"}
    config = api.run_config(settings=prompts)
    assert (config.dataset.path, config.adapter.rank, config.name[-6:]) == ("", 4, "slider")
    high = api.run_config(settings=prompts, preset="high")
    assert high.train.steps == 1000
    with pytest.raises(ConfigError, match="leave out the dataset demo"):
        api.run_config("demo", settings=prompts)
    with pytest.raises(ConfigError, match="Give a dataset, or the two prompts"):
        api.run_config()
