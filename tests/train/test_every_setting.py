"""Every setting changes what a run does: the bits of its adapter, its measurements, its files or its plan.

One short run for each setting, next to one that differs in nothing else. What is compared is what the run
did, never what it was asked: a setting that is declared and read nowhere makes its row fail.
"""

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_core.errors import ConfigError
from lora_core.model_files.families import FAMILIES
from lora_core.models.device import use_device
from lora_core.models.load import BaseModel, load_base
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import FIELDS, RunConfig
from lora_core.train import setup
from lora_core.train.callbacks import chosen_boards
from lora_core.train.setup import part_rates
from tests.train.conftest import one_thread
from tests.train.runs import Toy, notes, tensors, trained

Changes = dict[str, Any]
SHORT: Changes = {"train.steps": 2, "save.every": 0}
HELD: Changes = {"validation.pictures": 1, "validation.every": 1, "validation.draws_per_image": 1}
HOT: Changes = {
    **HELD, "optimizer.lr": 5.0, "train.steps": 6, "validation.draws_per_image": 4, "validation.patience": 0,
    "validation.forgetting": 0, "validation.memorization": False,
}  # fmt: skip
SAMPLED: Changes = {"sample.every": 1, "sample.cfg": 3.0, "train.steps": 1}
V: Changes = {"model.prediction": "v_prediction"}
TEXT: Changes = {"optimizer.text_encoder_lr": 5e-4}
FIRST: Changes = {"dataset.shuffle_tags": True}
SLIDER: Changes = {"slider.positive": "a red dot", "slider.negative": "a blue dot"}
MASKED: Changes = {"dataset.path": "<masked>"}
HUBER: Changes = {"loss.type": "huber"}
LOGIT: Changes = {"loss.timesteps": "logit_normal"}
CASES: dict[str, tuple[Any, Changes]] = {
    "name": ("another", {}),
    "seed": (1, {}),
    "model.base": ("<base>", {}),
    "model.vae": ("<vae>", {}),
    "model.prediction": ("v_prediction", {}),
    "model.zero_terminal_snr": ("on", V),
    "adapter.kind": ("dora", {}),
    "adapter.rank": (3, {}),
    "adapter.auto_rank": (True, {}),
    "adapter.alpha": (3.0, {}),
    "adapter.rslora": (True, {}),
    "adapter.conv_rank": (1, {"adapter.targets": "locon"}),
    "adapter.conv_alpha": (1.0, {"adapter.targets": "locon"}),
    "adapter.targets": ("kohya", {}),
    "adapter.init": ("<lora>", {}),
    "adapter.block_ranks": ({"mid_block": 1}, {}),
    "adapter.block_alphas": ({"mid_block": 1.0}, {}),
    "adapter.dropout": (0.3, {}),
    "adapter.rank_dropout": (0.3, {}),
    "adapter.module_dropout": (0.3, {}),
    "adapter.new_tokens": (["zwx = dot"], {"dataset.trigger": "zwx"}),
    "adapter.max_norm": (1e-4, {}),
    "dataset.path": ("<pictures>", {}),
    "dataset.trigger": ("zwx", {}),
    "dataset.flip": (True, {}),
    "dataset.resolutions": ([16, 32], {}),
    "dataset.random_crop": (0.5, {}),
    "dataset.color_aug": (0.5, {}),
    "dataset.variants": (3, {"dataset.random_crop": 0.5}),
    "dataset.caption_dropout": (1.0, {}),
    "dataset.tag_dropout": (0.5, {}),
    "dataset.shuffle_tags": (True, {}),
    "dataset.keep_tags": (2, FIRST),
    "dataset.masks": ("off", MASKED),
    "dataset.background": ("black", MASKED),
    "dataset.reg_weight": (0.5, MASKED),
    "slider.positive": ("a red dot", {"slider.negative": "a blue dot"}),
    "slider.negative": ("a blue dot", {"slider.positive": "a red dot"}),
    "slider.target": (["a dot"], SLIDER),
    "slider.preserve": (["plain"], SLIDER),
    "slider.guidance": (3.0, SLIDER),
    "train.steps": (3, {}),
    "train.epochs": (3, {}),
    "train.batch_size": (1, {}),
    "train.gradient_accumulation_steps": (2, {}),
    "train.resolution": (32, {}),
    "train.device": ("cuda:7", {}),
    "train.precision": ("bf16", {}),
    "train.gradient_checkpointing": (True, {}),
    "train.quantize_base": ("int8", {}),
    "train.offload": (True, {}),
    "train.deterministic": (True, {}),
    "train.clip_skip": (2, {}),
    "train.max_token_length": (150, {}),
    "optimizer.name": ("sgd", {}),
    "optimizer.args": ({"weight_decay": 10.0}, {}),
    "optimizer.lr": (1e-2, {}),
    "optimizer.range_test": (True, {}),
    "optimizer.text_encoder_lr": (1e-3, {}),
    "optimizer.text_encoder_2_lr": (1e-3, {}),
    "optimizer.token_lr": (0.1, {"adapter.new_tokens": ["zwx = dot"], "dataset.trigger": "zwx"}),
    "optimizer.stop_text_encoder_at": (0.5, TEXT),
    "optimizer.block_lr": ({"mid_block": 0.0}, {}),
    "optimizer.lora_plus": (4.0, {}),
    "optimizer.schedule": ("constant", {"train.steps": 4}),
    "optimizer.warmup": (1.0, {}),
    "optimizer.max_grad_norm": (1e-4, {}),
    "loss.type": ("l1", {}),
    "loss.huber_delta": (0.5, HUBER),
    "loss.huber_schedule": ("constant", HUBER),
    "loss.min_snr": (1.0, {}),
    "loss.debias": (True, {}),
    "loss.noise_offset": (0.1, {}),
    "loss.multires_noise": (3, {}),
    "loss.multires_discount": (0.8, {"loss.multires_noise": 3}),
    "loss.input_perturbation": (0.1, {}),
    "loss.timesteps": ("logit_normal", {}),
    "loss.timestep_mean": (2.0, LOGIT),
    "loss.timestep_std": (0.1, LOGIT),
    "loss.timestep_shift": (3.0, {}),
    "loss.min_timestep": (900, {}),
    "loss.max_timestep": (100, {}),
    "loss.prior_preservation": (1.0, {}),
    "loss.unmasked_weight": (0.5, MASKED),
    "validation.every": (2, HELD),
    "validation.every_epochs": (2, {**HELD, "train.steps": 6}),
    "validation.pictures": (2, HELD),
    "validation.draws_per_image": (2, HELD),
    # After the first validation there has to be a step whose time counts.
    "validation.max_time_share": (1e-9, {**HELD, "validation.every": 2, "train.steps": 6}),
    "validation.memorization": (False, HELD),
    "validation.forgetting": (0, HELD),
    "validation.patience": (1, HOT),
    "sample.every": (0, SAMPLED),
    "sample.every_epochs": (1, {**SAMPLED, "train.steps": 4}),
    "sample.prompts": (["two dots"], SAMPLED),
    "sample.negative_prompt": ("red", SAMPLED),
    "sample.seed": (5, SAMPLED),
    "sample.steps": (2, SAMPLED),
    "sample.cfg": (9.0, SAMPLED),
    "sample.cfg_rescale": (0.0, {**SAMPLED, **V, "model.zero_terminal_snr": "on"}),
    "sample.sampler": ("euler_a", {**SAMPLED, "sample.steps": 2}),
    "save.every": (1, {}),
    "save.every_epochs": (1, {"train.steps": 6}),
    "save.keep_last": (1, {"save.every": 1}),
    "save.keep_best": (False, {**HOT, "save.every": 1, "save.keep_last": 1}),
    "save.ema": (0.5, {}),
    "save.tensorboard": (True, {}),
    "save.wandb": (True, {}),
}
"""Setting: another value, and what has to be set with it for both runs."""
ELSEWHERE: dict[str, Callable[[RunConfig], Any]] = {
    # The toy has one text encoder.
    "optimizer.text_encoder_2_lr": lambda config: part_rates(FAMILIES["sdxl"], config.optimizer),
    # Its package is not installed with the tests; tests/train/test_board.py has what it writes.
    "save.wandb": lambda config: chosen_boards(config.save),
    "train.device": lambda config: device_or_problem(config.train.device),
}


def device_or_problem(name: str) -> str:
    try:
        return str(use_device(name))
    except ConfigError as error:
        return str(error)
    finally:
        use_device("auto")


class Runs:
    """Runs on the toy, and what each of them did, once for each kind of settings."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self._known: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        self._bases: dict[str, BaseModel] = {}
        self._opened: list[BaseModel] = []

    def place(self, mark: str) -> str:
        """The folder or file that a mark such as `<vae>` stands for, made at its first use."""
        if mark not in self._places:
            target = self.toy.home / mark.strip("<>")
            if mark == "<pictures>":
                shutil.copytree(self.toy.pictures, target)
                for picture in sorted(target.glob("*.png"))[:2]:
                    picture.unlink()
            elif mark == "<masked>":
                shutil.copytree(self.toy.pictures, target)
                for picture in target.glob("*.png"):
                    image = Image.open(picture).convert("RGBA")
                    image.putpixel((0, 0), (0, 0, 0, 0))
                    image.save(picture)
                    mask = Image.linear_gradient("L").resize(image.size)
                    mask.save(picture.with_name(f"{picture.stem}-masklabel.png"))
                shutil.copytree(self.toy.pictures, target / "reg" / "1_dot")
            elif mark == "<lora>":
                run, _ = self.run({})
                shutil.copy(next(run.exports.glob("*.safetensors")), target)
            else:
                part = {"<base>": "unet", "<vae>": "vae"}[mark]
                shutil.copytree(self.toy.base if part == "unet" else self.toy.base / "vae", target)
                (weights,) = (target / "unet" if part == "unet" else target).glob("*.safetensors")
                save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights)
            self._places[mark] = str(target)
        return self._places[mark]

    def run(self, changes: Changes) -> tuple[RunFolder, BaseModel]:
        """A run, trained to its end; the one before it is gone."""
        meant = {
            key: self.place(value) if str(value).startswith("<") else value
            for key, value in {**SHORT, **changes}.items()
        }
        shutil.rmtree(self.toy.home / "runs", ignore_errors=True)
        run = self.toy.run(meant.pop("name", "one"), **meant)
        trained(run)
        return run, self._opened[-1]

    def open(self, *how: Any) -> BaseModel:
        """As `open_base`, but each base is read once; a run gets copies of what it changes."""
        if how[5]:
            # Packed weights are on disk or bound to their layer.
            base = load_base(*how)
        else:
            key = repr(how[:5] + how[6:])
            if key not in self._bases:
                self._bases[key] = load_base(*how)
            base = self._bases[key]
            parts = {
                name: copy.deepcopy(getattr(base, name)) for name in ("denoiser", "vae", "text_encoders")
            }
            base = replace(base, **parts)
        self._opened.append(base)
        return base

    def did(self, changes: Changes) -> str:
        """What a run with these settings did, as text."""
        key = repr(sorted(changes.items()))
        if key not in self._known:
            self._known[key] = story(*self.run(changes))
        return self._known[key]


def story(run: RunFolder, base: BaseModel) -> str:
    """What a run did: losses, rates, measurements, bits and names of its files, its plan, and how the base is
    kept. Nothing of it is copied from the settings."""
    told = []
    for event in events.read_events(run.events_file)[0]:
        values = {key: value for key, value in vars(event).items() if key not in ("time", "seconds")}
        if isinstance(event, events.StepDone | events.Validated | events.PreviewDone):
            told.append([event.kind, values])
    last = run.checkpoint(run.checkpoint_steps()[-1]) / "adapter.safetensors"
    exports = sorted(run.exports.glob("*.safetensors"))
    plan = json.loads(run.plan_file.read_text())
    unet = base.denoiser
    files = sorted(p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file())
    found = {
        "told": told,
        "bits": {name: digest(data) for path in (last, *exports) for name, data in tensors(path).items()},
        "samples": [digest(path.read_bytes()) for path in sorted(run.previews.glob("*.png"))],
        "files": [re.sub(r"tfevents.*", "tfevents", name) for name in files],
        "plan": plan,
        "kept": [
            unet.is_gradient_checkpointing,
            sorted({type(module).__name__ for module in unet.modules()}),
        ],
    }
    return json.dumps(found, indent=1, default=str)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


@pytest.fixture(scope="module")
def runs(shared_toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(Toy(shared_toy.base, shared_toy.pictures, tmp_path_factory.mktemp("settings")))
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "open_base", made.open)
        yield made


def test_every_setting_has_a_row() -> None:
    assert list(CASES) == list(FIELDS)


@pytest.mark.parametrize("name", CASES)
def test_the_setting_changes_the_run(runs: Runs, name: str) -> None:
    value, more = CASES[name]
    if name in ELSEWHERE:
        usual = RunConfig()
        assert ELSEWHERE[name](usual) != ELSEWHERE[name](usual.changed({name: value}))
        return
    assert runs.did({**more, name: value}) != runs.did(more)


def test_what_is_compared_is_what_a_run_did(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose settings are not read does what the plain one does, whatever its settings file says."""
    plain = runs.did({})
    one = runs.run({})[0].config()
    monkeypatch.setattr(RunFolder, "config", lambda self: one)
    asked = {name: value for name, (value, more) in CASES.items() if not more and name not in ELSEWHERE}
    # These two would not go together, were they read.
    del asked["adapter.init"], asked["optimizer.range_test"], asked["name"]
    assert runs.did(asked) == plain


def test_a_run_of_an_earlier_version_goes_on_and_says_what_is_no_longer_used(runs: Runs) -> None:
    run = runs.toy.run("older", **SHORT)
    text = run.config_file.read_text().replace("[dataset]", "[dataset]\nrepeats = 10")
    run.config_file.write_text(text)
    trained(run)
    assert run.status() == "done"
    assert [note for note in notes(run) if "repeats" in note] == run.retired_settings()
