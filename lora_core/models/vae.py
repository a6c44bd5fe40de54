"""Files to pixels, and latents to images."""

from typing import Any

import torch

from lora_core.data.images import Bucket, ImageRecord, open_image
from lora_core.model_files.sizes import DECODE_TILES
from lora_core.models.device import out_of_memory, release_failed
from lora_core.models.load import BaseModel, to_pixels


def load_pixels(record: ImageRecord, bucket: Bucket, flip: bool = False) -> torch.Tensor:
    """An image file cropped and scaled to its bucket, (3, H, W) in [-1, 1], fp32; mirrored if `flip`.

    Raises:
        DatasetError: the file can no longer be read.
    """
    tensor = to_pixels(open_image(record), bucket)
    return tensor.flip(-1) if flip else tensor


def decode_latents(base: BaseModel, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1], fp32 on the CPU, from latents (B, C, h, w).

    If the decoder runs out of memory, this and all later images of this base are decoded in overlapping
    tiles: an image takes 3 GiB at 1024 px, a tile of 512 px a quarter. The colours of tiles differ a little.
    A VAE that waits on the CPU comes to the device for it, if it fits.
    """
    shift, scale = base.shift_and_scale
    unscaled = latents.to(base.device, base.vae.dtype) / scale + shift
    home, tile = base.vae.device, base.decode_tile
    with torch.no_grad():
        try:
            with base.on_device("vae"):
                pixels = _decode(base, unscaled)
        except (RuntimeError, MemoryError) as error:
            if home.type == base.device.type or not out_of_memory(error):
                raise
            release_failed(error, base.device)
            base.put("vae", home)
            base.decode_tile = tile
            pixels = _decode(base, unscaled.to(home))
    return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()


def _decode(base: BaseModel, unscaled: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], in one piece or in the largest tiles that fit."""
    vae: Any = base.vae
    while True:
        tile = base.decode_tile
        try:
            if not tile:
                return vae.decode(unscaled).sample
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // base.vae_scale_factor
            return vae.tiled_decode(unscaled).sample
        except (RuntimeError, MemoryError) as error:
            side = tile or max(unscaled.shape[-2:]) * base.vae_scale_factor
            smaller = next((each for each in DECODE_TILES if each < side), 0)
            if not smaller or not out_of_memory(error):
                raise
            release_failed(error, base.device)
        base.decode_tile = smaller
