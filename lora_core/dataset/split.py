"""Which pictures are kept out of training, to measure on."""

from lora_core.dataset.folder import ImageRecord


def held_out(
    records: list[ImageRecord], pictures: float, seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """The records to train on, and those to measure on."""
    raise NotImplementedError
