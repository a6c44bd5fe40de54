"""A picture on disk as the tensor that the VAE takes."""

import numpy as np
import torch

from lora_core.dataset.buckets import Bucket, fit
from lora_core.dataset.folder import ImageRecord
from lora_core.dataset.pictures import open_rgb


def picture_pixels(record: ImageRecord, bucket: Bucket, flip: bool = False) -> torch.Tensor:
    """The picture cropped and scaled to its bucket, (3, H, W) in [-1, 1], fp32; mirrored if `flip`.

    Raises:
        DatasetError: the picture cannot be read any more.
    """
    pixels = np.asarray(fit(open_rgb(record.path), bucket), dtype=np.float32) / 127.5 - 1.0
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    return tensor.flip(-1) if flip else tensor
