"""Splits a dataset into training and validation images.

The user's own list decides where there is one. Otherwise each image is ranked by a hash of seed and name,
so adding images hardly changes the split. Near-duplicates stay on one side: a validation image that is a
copy of a training image would reward memorization.
"""

import hashlib

from lora_core.data.near_duplicates import compute_fingerprints, group_near_duplicates
from lora_core.data.scan import ImageRecord, fold_name
from lora_core.errors import DatasetError

_FEWEST_TO_TRAIN_ON = 2


def split_holdout(
    records: list[ImageRecord], pictures: float, seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """The records to train on, and those to measure on, each in their old order.

    Args:
        records: all records.
        pictures: a share if below 1, else a number of pictures. Where near-duplicates would have to be
        separated, it is fewer. Ignored where the user listed images.
        seed: of the choice.

    Raises:
        DatasetError: fewer than two pictures would be left to train on.
    """
    if any(record.held_out for record in records):
        return _split_by_list(records)
    wished = num_holdout(len(records), pictures)
    if not wished:
        return list(records), []
    groups: dict[int, list[int]] = {}
    for index, first in enumerate(_groups(records)):
        groups.setdefault(first, []).append(index)
    chosen: set[int] = set()
    for members in sorted(groups.values(), key=lambda members: _rank(records[members[0]], members[0], seed)):
        if len(chosen) + len(members) <= wished:
            chosen.update(members)
    train = [record for index, record in enumerate(records) if index not in chosen]
    return train, [record for index, record in enumerate(records) if index in chosen]


def num_holdout(count: int, pictures: float) -> int:
    """How many of `count` pictures are to be held out, 0 for none.

    Args:
        count: all there are.
        pictures: a share if below 1, else a number of pictures.

    Raises:
        DatasetError: fewer than two would be left to train on.
    """
    wished = round(pictures * count) if pictures < 1 else int(pictures)
    if wished <= 0:
        return 0
    most = count - _FEWEST_TO_TRAIN_ON
    if wished > most:
        raise DatasetError(
            f"Holding out {wished} of {count} pictures leaves fewer than {_FEWEST_TO_TRAIN_ON} to train on;"
            f" set validation.pictures to at most {max(0, most)}."
        )
    return wished


def _split_by_list(records: list[ImageRecord]) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """The user's choice and its near-duplicates, which would otherwise be trained on."""
    groups = _groups(records)
    chosen = {group for group, record in zip(groups, records, strict=True) if record.held_out}
    train = [record for group, record in zip(groups, records, strict=True) if group not in chosen]
    held = [record for group, record in zip(groups, records, strict=True) if group in chosen]
    if len(train) < _FEWEST_TO_TRAIN_ON:
        raise DatasetError(
            f"Holding out {len(held)} of {len(records)} pictures, those that look the same included, leaves"
            f" fewer than {_FEWEST_TO_TRAIN_ON} to train on; choose fewer of them by hand."
        )
    return train, held


def _groups(records: list[ImageRecord]) -> list[int]:
    """For each record the index of the first one of its group: the same file, or one that looks the same."""
    by_look = group_near_duplicates(compute_fingerprints(record.path for record in records))
    first: dict[str, int] = {}
    return [by_look[first.setdefault(str(record.path), index)] for index, record in enumerate(records)]


def _rank(record: ImageRecord, index: int, seed: int) -> tuple[str, int]:
    name = fold_name(record.path.name)
    return hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogatepass")).hexdigest(), index
