"""LoRA beside what it replaces: the whole UNet trained, as DreamBooth does, with and without kept priors.

All start from the embedded base and see the same pictures, captions, timesteps and noise; the text encoder
stays as it is. Full training gets the best of several rates. Gain is measured on pictures of things that none
of them saw, forgetting on pictures of the base's own, on which a loss that rises is something lost.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lora_core.data.dataset import open_dataset
from lora_core.evaluate.validator import EvalImage, encode_eval_images, eval_losses, eval_noise
from lora_core.generate.pipeline import sample_latents
from lora_core.generate.request import GenerationRequest
from lora_core.lora.inject import inject
from lora_core.lora.layer import FlatParams, LoraSpec
from lora_core.model_files.families import LOCON
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel, load_base
from lora_core.models.unet import PromptEmbeds
from lora_core.settings.schema import LossSection
from lora_core.train.loop import diffusion_loss, sample_noise
from tests.counting import kept_bytes

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo"
STEPS, EVERY, BATCH, RANK, LOOKS = 120, 15, 8, 8, 8
LORA_RATE, FULL_RATES = 3e-3, (1e-5, 3e-5, 1e-4)
PRIOR_WEIGHT = 1.0
CLASS_PICTURES, PRIOR_PICTURES = 24, 8
PLAIN = LossSection(min_snr=0.0)
MEGABYTE = 1e6


@dataclass(frozen=True)
class Given:
    """What all train on and are judged by: latents and conditions of the pictures and of the class pictures,
    held-out pictures, and the base's own pictures."""

    train: list[tuple[torch.Tensor, PromptEmbeds]]
    classes: list[tuple[torch.Tensor, PromptEmbeds]]
    held_out: list[EvalImage]
    prior: list[EvalImage]


@dataclass
class Story:
    """What a training gave: its size, and after every so many steps the seconds, gain and forgetting."""

    name: str
    numbers: int
    kept: int
    seconds: list[float] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    forgotten: list[float] = field(default_factory=list)
    step: float = 0.0

    @property
    def best(self) -> int:
        """The place of the largest gain."""
        return max(range(len(self.gains)), key=self.gains.__getitem__)

    def until(self, gain: float) -> str:
        """Seconds of training to the first gain of so much."""
        found = [s for s, g in zip(self.seconds, self.gains, strict=True) if g >= gain]
        return f"{found[0]:.0f} s" if found else "never"

    def line(self, target: float) -> str:
        """A row of the table."""
        state = 3 * 4 * self.numbers
        cells = [
            self.name,
            f"{self.numbers / 1e6:.2f} M",
            f"{state / MEGABYTE:.1f} MB",
            f"{self.kept / MEGABYTE:.0f} MB",
            f"{self.step:.3f} s",
            f"{2 * self.numbers / MEGABYTE:.1f} MB",
            f"{self.gains[self.best]:.4f} at step {(self.best + 1) * EVERY}",
            self.until(target),
            f"{self.forgotten[self.best]:+.4f}, at the end {self.forgotten[-1]:+.4f}",
        ]
        return f"| {' | '.join(cells)} |\n"


HEAD = (
    "| | trained numbers | gradient and optimizer | kept for the backward pass | a step | file (fp16) | best"
    " gain | to 95% of the LoRA's best | lost on the base's own images, at the best |\n"
    f"|{'---|' * 9}\n"
)


def _condition(base: BaseModel, caption: str) -> PromptEmbeds:
    with torch.no_grad():
        return encode_prompt(base, [caption])


def _own_pictures(base: BaseModel, count: int, first_seed: int) -> Iterator[tuple[torch.Tensor, str]]:
    prompts = base.family.prior_prompts
    side = base.resolution
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        how = GenerationRequest(seed=first_seed + number, steps=10, cfg=3.0, width=side, height=side)
        yield sample_latents(base, how, _condition(base, prompt), _condition(base, ""))[0], prompt


def given_by(base: BaseModel) -> Given:
    """The demo's pictures, and some of the base's own."""
    records = open_dataset(str(DEMO / "train"), DEMO / "none").records
    looked = encode_eval_images(base, records, 2, 0)
    held_out = encode_eval_images(base, open_dataset(str(DEMO / "held_out"), DEMO / "none").records, LOOKS, 0)
    prior = [
        EvalImage(latents, eval_noise(f"{number}", latents, LOOKS, 0, base.noise.num_timesteps), prompt)
        for number, (latents, prompt) in enumerate(_own_pictures(base, PRIOR_PICTURES, 1000))
    ]
    classes = [
        (latents, _condition(base, prompt)) for latents, prompt in _own_pictures(base, CLASS_PICTURES, 0)
    ]
    train = [(one.latents, _condition(base, one.caption)) for one in looked]
    return Given(train, classes, held_out, prior)


def _loss(base: BaseModel, rows: list[tuple[torch.Tensor, PromptEmbeds]], number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    latents = torch.stack([latents for latents, _ in rows])
    text = PromptEmbeds.cat([condition for _, condition in rows])
    draw = sample_noise(latents, base.noise.num_timesteps, LossSection(), generator)
    return diffusion_loss(base, latents, text, draw, PLAIN).mean()


def _batch(
    rows: list[tuple[torch.Tensor, PromptEmbeds]], number: int
) -> list[tuple[torch.Tensor, PromptEmbeds]]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number)).tolist()
    return [rows[index] for index in order[:BATCH]]


def _losses(base: BaseModel, pictures: list[EvalImage]) -> float:
    base.denoiser.eval()
    found = float(eval_losses(base, pictures, lambda caption: _condition(base, caption)).mean())
    base.denoiser.train()
    return found


def trained(name: str, rate: float, preserve: bool) -> Story:
    """Train from the base as it is; `name` that begins with LoRA trains an adapter."""
    torch.manual_seed(0)
    base = load_base("demo", torch.device("cpu"), torch.float32)
    base.denoiser.requires_grad_(False)
    given = given_by(base)
    before = _losses(base, given.held_out), _losses(base, given.prior)
    if name.startswith("LoRA"):
        injected = inject({"unet": base.denoiser}, ["unet"], LOCON, LoraSpec(RANK, float(RANK)), 0)
        storage = FlatParams([list(injected.layers.values())])
        tensors: list[nn.Parameter] = list(storage.groups)
        clear = storage.zero_grad
    else:
        tensors = list(base.denoiser.requires_grad_(True).parameters())
        clear = base.denoiser.zero_grad
    optimizer = torch.optim.AdamW(tensors, rate, weight_decay=1e-2)
    base.denoiser.train()
    weights = {tensor.untyped_storage().data_ptr() for tensor in base.denoiser.state_dict().values()}
    rows = _batch(given.train, 0)
    kept = kept_bytes(lambda: _loss(base, rows, 0), weights) * (2 if preserve else 1)
    story = Story(name, sum(map(torch.numel, tensors)), kept)
    taken: list[float] = []
    for number in range(STEPS):
        began = time.process_time()
        clear()
        _loss(base, _batch(given.train, number), number).backward()
        if preserve:
            (PRIOR_WEIGHT * _loss(base, _batch(given.classes, number), number + STEPS)).backward()
        nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        taken.append(time.process_time() - began)
        if (number + 1) % EVERY == 0:
            story.seconds.append(sum(taken))
            story.gains.append(before[0] - _losses(base, given.held_out))
            story.forgotten.append(_losses(base, given.prior) - before[1])
    story.step = statistics.median(taken)
    sys.stderr.write(f"{name} at {rate:g}: {story.gains[story.best]:.4f}\n")
    return story


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    lora = trained(f"LoRA, rank {RANK}, all layers", LORA_RATE, False)
    stories = [lora, trained(f"LoRA, rank {RANK}, prior preserved", LORA_RATE, True)]
    for name, preserve in (("whole UNet", False), ("whole UNet, prior preserved", True)):
        tried = {rate: trained(name, rate, preserve) for rate in FULL_RATES}
        rate = max(tried, key=lambda rate: tried[rate].gains[tried[rate].best])
        tried[rate].name = f"{name}, rate {rate:g}"
        stories.append(tried[rate])
    target = 0.95 * lora.gains[lora.best]
    sys.stdout.write(HEAD + "".join(story.line(target) for story in stories))


if __name__ == "__main__":
    main()
