"""Trains the UNet and the text encoder together on cached latents of the frozen VAE.

v-prediction on a noise schedule that ends in pure noise (zero terminal SNR, Lin et al. 2023), plain mean
square error: a min-SNR weight would be 0 at the last timestep.

    python assets/base/make/unet.py --build BUILD --minutes 60
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from catalog import BACKGROUNDS, STYLES, THINGS, WHITE_SHARE, caption, training_caption
from diffusers import DDIMScheduler, UNet2DConditionModel
from pictures import Icons, jittered, laid_on, load_icons, placed
from tokenizer import END, START
from torch import Tensor, nn
from training import Clock, log_to, optimizers, save, share, start_workers, update
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from whitening import trained_vae

BATCH = 20  # of each worker
AVERAGE = 0.998  # of the moving average of the weights, the weights that are shipped
WIDTH = 128  # of the text encoder
LATENT_SIDE = 16
VARIANTS = 2  # cached latents of each image on each background


def new_unet() -> UNet2DConditionModel:
    """Returns the untrained UNet; captions are attended to at 8 x 8 and 4 x 4, where shapes are decided."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=[64, 96, 96],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns the untrained text encoder for this tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        projection_dim=WIDTH,
        bos_token_id=tokenizer.convert_tokens_to_ids(START),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    encoder = CLIPTextModel(config)
    nn.init.normal_(encoder.get_input_embeddings().weight, std=0.1)
    return encoder


def new_models(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Returns what is trained here, as one module."""
    return nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})


def new_scheduler() -> DDIMScheduler:
    """Returns the noise schedule and sampler that the base is trained for and shipped with."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


@torch.no_grad()
def cached_latents(build: Path, icons: Icons) -> Tensor:
    """Returns scaled latents (things, styles, backgrounds, VARIANTS, 4, 16, 16), encoded on first call."""
    path = build / "latents.pt"
    if not path.exists():
        vae, generator = trained_vae(build), torch.Generator().manual_seed(1)
        rows = np.array([icons.index(label, name) for label in THINGS.values() for name in STYLES.values()])
        parts = []
        for ground in list(BACKGROUNDS.values()) * VARIANTS:
            parts.append(encoded(vae, icons.rgba[rows], [ground] * len(rows), generator).half())
        cube = torch.stack(parts).unflatten(1, (len(THINGS), len(STYLES)))
        cube = cube.unflatten(0, (VARIANTS, len(BACKGROUNDS)))
        save(path, {"latents": cube.permute(2, 3, 1, 0, 4, 5, 6).contiguous()})
    return torch.load(path, weights_only=True)["latents"]


@torch.no_grad()
def encoded(vae: nn.Module, rgba: np.ndarray, grounds: list, generator: torch.Generator) -> Tensor:
    """Returns the scaled latents of drawings laid on grounds."""
    pictures = laid_on(placed(rgba, generator), jittered(grounds, generator))
    with torch.autocast("cpu", torch.bfloat16):
        means = [vae.encode(part).latent_dist.mean.float() for part in pictures.split(24)]
    return torch.cat(means) * vae.config.scaling_factor


class Samples:
    """Draws latents and captions from the cache."""

    def __init__(self, latents: Tensor, tokenizer: CLIPTokenizer, seed: int):
        """Keeps the names beside the cube's axes."""
        self.latents, self.chance = latents, random.Random(seed)
        self.names = [list(THINGS), list(STYLES), list(BACKGROUNDS)]
        self.tokenizer, self._ids = tokenizer, {}

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns latents (count, 4, 16, 16) and token ids (count, 77)."""
        chosen, captions = [], []
        for _ in range(count):
            at = [self.chance.randrange(len(names)) for names in self.names]
            if self.chance.random() < WHITE_SHARE:
                at[2] = 0
            chosen.append(self.latents[*at, self.chance.randrange(VARIANTS)])
            named = [names[i] for names, i in zip(self.names, at, strict=True)]
            captions.append(training_caption(*named, self.chance))
        return torch.stack(chosen).float(), self.ids(captions)

    def ids(self, captions: list[str]) -> Tensor:
        """Returns the padded token ids, tokenising each caption only once."""
        for text in set(captions) - set(self._ids):
            whole = self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
            self._ids[text] = whole.input_ids
        return torch.cat([self._ids[text] for text in captions])


def spread_timesteps(count: int, generator: torch.Generator, total: int = 1000) -> Tensor:
    """Returns one random timestep from each of `count` equal parts of the schedule."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) * total / count).long()


def v_loss(models: nn.ModuleDict, latents: Tensor, ids: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Returns |v - v'|^2 per sample with v = sqrt(a) noise - sqrt(1 - a) latents."""
    alphas = new_scheduler().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    target = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    with torch.autocast("cpu", torch.bfloat16):
        states = models["text_encoder"](ids).last_hidden_state
        guess = models["unet"](noisy, timesteps, states).sample
    return (guess.float() - target).square().mean(dim=(1, 2, 3))


class Validation:
    """The loss on every taught image in a new place on a new background, with fixed noise."""

    def __init__(self, build: Path, icons: Icons, samples: Samples):
        """Encodes one image a (thing, style), none of which is in the cache."""
        generator, chance = torch.Generator().manual_seed(99), random.Random(99)
        pairs = [(thing, style) for thing in THINGS for style in STYLES]
        grounds = [chance.choice(list(BACKGROUNDS)) for _ in pairs]
        rows = np.array([icons.index(THINGS[thing], STYLES[style]) for thing, style in pairs])
        colours = [BACKGROUNDS[ground] for ground in grounds]
        self.latents = encoded(trained_vae(build), icons.rgba[rows], colours, generator)
        self.ids = samples.ids([caption(*pair, ground) for pair, ground in zip(pairs, grounds, strict=True)])
        shuffled = torch.randperm(len(pairs), generator=generator)
        self.timesteps = spread_timesteps(len(pairs), generator)[shuffled]
        self.noise = torch.randn(self.latents.shape, generator=generator)

    @torch.no_grad()
    def loss(self, models: nn.ModuleDict) -> float:
        """Returns the mean loss of the models as they are."""
        parts = zip(*(t.split(54) for t in (self.latents, self.ids, self.timesteps, self.noise)), strict=True)
        return float(torch.cat([v_loss(models, *part) for part in parts]).mean())


class Average:
    """An exponential moving average of the weights, quick to follow at the start."""

    def __init__(self, models: nn.ModuleDict):
        """Starts as a copy."""
        self.weights = {name: value.detach().clone() for name, value in models.named_parameters()}

    @torch.no_grad()
    def follow(self, models: nn.ModuleDict, step: int) -> None:
        """Moves towards the weights after one step."""
        keep = min(AVERAGE, (1 + step) / (10 + step))
        names, values = zip(*models.named_parameters(), strict=True)
        torch._foreach_lerp_([self.weights[name] for name in names], list(values), 1 - keep)


class Run:
    """One worker's share of the training: models, optimizers, averaged weights, clock; kept in `unet.pt`."""

    def __init__(self, build: Path, minutes: float, tokenizer: CLIPTokenizer, seed: int):
        """Starts anew, or where the checkpoint is."""
        torch.manual_seed(seed)
        self.models = new_models(tokenizer)
        self.optimizers = optimizers(self.models, {"lr": 5e-3, "weight_decay": 0.02}, {"lr": 1.5e-3})
        self.clock, self.average, self.path = Clock(minutes), Average(self.models), build / "unet.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.models.load_state_dict(state["models"])
            self.average.weights = state["average"]
            for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(held)
            self.clock = Clock(minutes, state["spent"], state["step"])

    def step(self, samples: Samples, generator: torch.Generator) -> float:
        """Trains on one batch and returns its loss."""
        latents, ids = samples.draw(BATCH)
        timesteps, noise = spread_timesteps(BATCH, generator), torch.randn(latents.shape, generator=generator)
        loss = v_loss(self.models, latents, ids, timesteps, noise).mean()
        loss.backward()
        self.clock.tick()
        share(self.models, self.clock)
        update(self.optimizers, self.models, self.clock.factor(warm_up=100))
        self.average.follow(self.models, self.clock.step)
        return loss.item()

    def save(self) -> None:
        """Writes the checkpoint."""
        held = {"models": self.models.state_dict(), "average": self.average.weights}
        spent = {"spent": self.clock.spent, "step": self.clock.step}
        save(self.path, {**held, **spent, "optimizers": [o.state_dict() for o in self.optimizers]})


def train(rank: int, build: Path, minutes: float, seed: int = 0) -> None:
    """Trains to the end of the budget as one of the workers; the first also measures, logs and saves."""
    tokenizer, icons = CLIPTokenizer.from_pretrained(build / "tokenizer"), load_icons(build)
    run = Run(build, minutes, tokenizer, seed)
    own_seed = seed + 1000 * run.clock.step + rank
    samples = Samples(cached_latents(build, icons), tokenizer, own_seed)
    generator, recent = torch.Generator().manual_seed(own_seed), 0.0
    if rank == 0:
        log, shadow = log_to(build / "unet.log"), new_models(tokenizer).eval()
        validation = Validation(build, icons, samples)
    while not run.clock.done:
        loss = run.step(samples, generator)
        recent = 0.98 * recent + 0.02 * loss if recent else loss
        if rank > 0:
            continue
        if run.clock.step % 100 == 0:
            log.info("step %d  %.0f s  loss %.4f", run.clock.step, run.clock.spent, recent)
        if run.clock.checkpoint_due():
            run.save()
            shadow.load_state_dict({**shadow.state_dict(), **run.average.weights})
            log.info("step %d  validation %.4f", run.clock.step, validation.loss(shadow))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, required=True, help="folder for caches and checkpoints")
    parser.add_argument("--minutes", type=float, default=60, help="budget of training time")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of one thread and BATCH samples each"
    )
    given = parser.parse_args()
    cached_latents(given.build, load_icons(given.build))
    start_workers(train, given.workers, given.build, given.minutes)
