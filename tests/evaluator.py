"""A judge of adapters that shares no code with the project: diffusers opens base and file, and all else is
a dozen lines of plain arithmetic. Its timesteps and noise are its own."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image


class Evaluator:
    """Losses of adapters on a folder of pictures with captions beside them, on the same looks each time."""

    def __init__(self, base: Path, pictures: Path, looks: int = 16, seed: int = 20_000) -> None:
        self.base = base
        self.pipe = self._opened()
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for path in sorted(pictures.glob("*.png")):
            pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
            with torch.no_grad():
                encoded = self.pipe.vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean
            latents = encoded * self.pipe.vae.config.scaling_factor
            timesteps = torch.randint(0, self.steps, (looks,), generator=generator)
            noise = torch.randn(looks, *latents.shape[1:], generator=generator)
            self.rows.append((latents, timesteps, noise, path.with_suffix(".txt").read_text().strip()))

    @property
    def steps(self) -> int:
        return int(self.pipe.scheduler.config.num_train_timesteps)

    def losses(self, adapter: Path | None = None, strength: float = 1.0) -> torch.Tensor:
        """The squared error of the prediction for each look, (pictures, looks)."""
        with self._wearing(adapter, strength):
            return torch.stack([self._losses(*row) for row in self.rows])

    def gains(self, adapter: Path, strength: float = 1.0) -> torch.Tensor:
        """The base's loss less the adapter's, for each look, (pictures, looks)."""
        return self.losses() - self.losses(adapter, strength)

    def _losses(
        self, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor, caption: str
    ) -> torch.Tensor:
        scheduler = self.pipe.scheduler
        many = latents.expand_as(noise)
        noisy = scheduler.add_noise(many, noise, timesteps)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(many, noise, timesteps) if velocity else noise
        with torch.no_grad():
            context = self.pipe.encode_prompt(caption, "cpu", 1, False)[0].expand(len(noise), -1, -1)
            predicted = self.pipe.unet(noisy, timesteps, encoder_hidden_states=context).sample
        return (predicted - target).double().square().flatten(1).mean(1)

    @contextlib.contextmanager
    def _wearing(self, adapter: Path | None, strength: float) -> Iterator[None]:
        if adapter is None:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pipe.load_lora_weights(str(adapter), adapter_name="judged")
            self.pipe.set_adapters(["judged"], [strength])
        try:
            yield
        finally:
            # What was worn leaves no trace: the base is opened anew.
            self.pipe = self._opened()

    def _opened(self) -> StableDiffusionPipeline:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return StableDiffusionPipeline.from_pretrained(
                self.base, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
            )


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean of (pictures, looks) values and its standard error, clustered by picture."""
    means = values.mean(1)
    return float(means.mean()), float(means.std() / len(means) ** 0.5)
