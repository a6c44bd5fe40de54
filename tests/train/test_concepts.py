"""What a concept has in place of the run's settings reaches training, and looks are shared out as shown."""

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_core.data.audit import TrainingView, concept_rows
from lora_core.data.concepts import balance_looks
from lora_core.data.dataset import apply_settings, scan
from lora_core.data.images import Bucket, Concept, Dataset, ImageRecord
from lora_core.errors import InputsChanged
from lora_core.evaluate.validator import EvalImage
from lora_core.model_files.header import read_header
from lora_core.runs import events
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import DatasetSection
from lora_core.train.data import Batch, Batches
from lora_core.train.setup import RuntimePlan, assign_buckets, prepare
from tests.data.test_concepts import images, written
from tests.train.runs import RANDOM, Toy, broken_at, result, trained


class Mirrored:
    """Stands in for the cache: latents of -1 where an image is mirrored, else of 1."""

    def latents(self, record: ImageRecord, bucket: Bucket, flip: bool) -> torch.Tensor:
        return torch.full((4, bucket.height // 8, bucket.width // 8), -1.0 if flip else 1.0)


def looks(folder: Path, config: RunConfig, count: int = 40) -> list[Batch]:
    """The first micro-batches, of one image each, of a dataset."""
    dataset = scan(folder)
    assert dataset.problems == []
    train, reg = balance_looks(apply_settings(dataset.records, config), apply_settings(dataset.reg, config))
    items = assign_buckets([*train, *reg], 64, 8)
    batches = Batches(items, Mirrored(), config.dataset, 1, config.seed)  # type: ignore[arg-type]
    return [batches.batch(number) for number in range(count)]


def captions(batches: list[Batch], name: str) -> set[str]:
    return {
        caption for one in batches for caption, of in zip(one.captions, one.names, strict=True) if of == name
    }


@pytest.mark.parametrize(
    ("cat", "dog"),
    # What captions "a, x, y" of two concepts become, where the run has the trigger zwx and drops none.
    [
        ("", {"zwx, dog, x, y"}),
        ('custom_attributes = { trigger = "bello" }', {"bello, dog, x, y"}),
        ("caption_dropout_rate = 1.0", {""}),
        ("caption_tag_dropout_rate = 1.0", {"zwx"}),
        ("caption_tag_dropout_rate = 1.0\nkeep_tokens = 2", {"zwx, dog, x"}),
        ("shuffle_caption = true\nkeep_tokens = 1", {"zwx, dog, x, y", "zwx, dog, y, x"}),
        ('caption_prefix = "photo of"\ncaption_suffix = "outside"', {"zwx, photo of dog, x, y outside"}),
        ("is_reg = true", {"dog, x, y"}),
        ('caption_extension = ".caption"', {"zwx, other"}),
    ],
)
def test_the_captions_of_a_concept_follow_its_own_rules(tmp_path: Path, cat: str, dog: set[str]) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "cat/a.txt").write_text("cat, x, y")
    (tmp_path / "dog/b.txt").write_text("dog, x, y")
    (tmp_path / "dog/b.caption").write_text("other")
    written(tmp_path, 'image_dir = "cat"', f'image_dir = "dog"\n{cat}')
    config = RunConfig().changed({"dataset.trigger": "zwx", "dataset.caption_dropout": 0.0})
    seen = looks(tmp_path, config)
    assert captions(seen, "a.png") == {"zwx, cat, x, y"}
    assert captions(seen, "b.png") == dog


def test_flips_masks_class_tokens_and_weights_are_those_of_the_concept(tmp_path: Path) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png", "bare/c.png")
    for name in ("cat/a", "dog/b"):
        mask = torch.zeros(64, 64, dtype=torch.uint8)
        mask[:, :32] = 255
        Image.fromarray(mask.numpy()).save(tmp_path / f"{name}-masklabel.png")
    written(
        tmp_path,
        'image_dir = "cat"\nflip_aug = true\ncustom_attributes = { masks = "off" }',
        'image_dir = "dog"',
        'image_dir = "bare"\nclass_tokens = "an animal"\nis_reg = true',
    )
    config = RunConfig().changed({"loss.unmasked_weight": 0.0, "dataset.reg_weight": 0.5})
    seen: dict[str, list[Batch]] = {}
    for batch in looks(tmp_path, config.changed({"dataset.caption_dropout": 0.0})):
        seen.setdefault(batch.names[0], []).append(batch)
    mirrored = {name: {float(one.latents.mean()) for one in batches} for name, batches in seen.items()}
    assert mirrored == {"a.png": {-1.0, 1.0}, "b.png": {1.0}, "c.png": {1.0}}
    assert all(one.weights is None for one in seen["a.png"])
    assert all(one.weights is not None and float(one.weights[..., -1].max()) == 0.0 for one in seen["b.png"])
    assert all(one.weights is not None and float(one.weights.mean()) == 0.5 for one in seen["c.png"])
    assert captions(seen["c.png"], "c.png") == {"an animal"}


def random_records(draw: random.Random) -> tuple[list[ImageRecord], int]:
    """Some concepts with repeats or shares, of images of several shapes, and a batch size."""
    share = draw.random() < 0.6
    records = []
    for number in range(draw.randint(2, 4)):
        of = {"share": draw.uniform(0.2, 3.0)} if share else {"repeats": draw.randint(1, 9)}
        concept = Concept(f"concept {number}", role="regularisation" if number == 3 else "subject", **of)
        if concept.role == "regularisation" and draw.random() < 0.5:
            concept = replace(concept, share=0.0)
        for image in range(draw.randint(2, 12)):
            side = draw.choice((64, 96, 128))
            path, reg = Path(f"{number}-{image}.png"), concept.role == "regularisation"
            caption = concept.name
            records.append(ImageRecord(path, side, 64, caption, concept.repeats, concept=concept, reg=reg))
    return records, draw.randint(1, 4)


@pytest.mark.parametrize("seed", range(5))
def test_looks_are_shared_out_as_shown_and_go_on_exactly_after_a_resume(seed: int) -> None:
    records, size = random_records(random.Random(seed))
    dataset = Dataset([r for r in records if not r.reg], [], reg=[r for r in records if r.reg])
    shown = {
        row["name"]: row
        for row in concept_rows(dataset, TrainingView(64, 8, None, "", size, reg=dataset.reg))
    }
    train, reg = balance_looks(dataset.records, dataset.reg)
    rules = DatasetSection(caption_dropout=0.0)

    def batches() -> Batches:
        items = assign_buckets([*train, *reg], 64, 8)
        return Batches(items, Mirrored(), rules, size, seed)  # type: ignore[arg-type]

    one, seen, counts = batches(), [], Counter[str]()
    # What fills up the last batches is chance, of which little is left in so many looks.
    while counts.total() < 20_000:
        seen.append(one.captions(len(seen)))
        counts.update(seen[-1])
    measured = {name: count / counts.total() for name, count in counts.items()}
    assert measured == pytest.approx({name: row["share"] for name, row in shown.items()}, rel=0.02)
    assert sum(measured.values()) == pytest.approx(1.0)
    # From any micro-batch on, as a process that has seen none of those before.
    start = random.Random(seed).randrange(len(seen) - 50)
    other = batches()
    assert [other.captions(number) for number in range(start, start + 50)] == seen[start : start + 50]


def test_shares_are_held_within_one_percent_by_the_fewest_repeats() -> None:
    def repeats(*of: tuple[int, float]) -> list[int]:
        concepts = [(Concept(str(n), share=share), count) for n, (count, share) in enumerate(of)]
        records = [
            ImageRecord(Path("a"), 64, 64, "", concept=one) for one, count in concepts for _ in range(count)
        ]
        found = {one.concept: one.repeats for one in balance_looks(records, [])[0]}
        return [found[one] for one, _ in concepts]

    assert repeats((10, 1), (20, 1)) == [2, 1]
    assert repeats((30, 1), (17, 1)) == [4, 7]  # 120 and 119 looks
    assert repeats((10, 1), (10, 3)) == [1, 3]
    assert repeats((3, 2), (7, 5), (2, 1)) == [16, 17, 12]  # 48, 119 and 24 looks


def in_concepts(place: Toy, folder: Path) -> Toy:
    """The toy's images in two concepts with all that one may have, and regularisation."""
    for name, numbers in (("cat", (0, 1)), ("dog", (2, 3)), ("class", (1,))):
        (folder / name).mkdir(parents=True)
        for number in numbers:
            for ending in ("png", "txt"):
                shutil.copy(place.pictures / f"{number}.{ending}", folder / name)
    own = 'custom_attributes = { share = 1, trigger = "zwx" }\nshuffle_caption = true\nflip_aug = true'
    written(
        folder,
        f'image_dir = "cat"\n{own}',
        'image_dir = "dog"\ncustom_attributes = { share = 3, role = "style" }\ncaption_dropout_rate = 0.5',
        'image_dir = "class"\nis_reg = true',
    )
    return replace(place, pictures=folder)


def test_a_run_on_concepts_that_was_killed_ends_with_the_same_bits(own_toy: Toy, tmp_path: Path) -> None:
    place = in_concepts(own_toy, tmp_path / "concepts")
    changes = {name.replace(".", "__"): value for name, value in RANDOM.items()}
    more = {"train__steps": 4, "save__every": 2}
    whole, broken = (place.run(name, **changes, **more) for name in ("whole", "broken"))
    trained(whole)
    broken_at(broken, events.StepDone, 3)
    file = place.pictures / "dataset.toml"
    text = file.read_text()
    file.write_text(text.replace("share = 3", "share = 2"))
    with pytest.raises(InputsChanged, match=r"the image dog/2\.png"):
        trained(broken)
    # Another order or comment changes nothing that is trained on.
    file.write_text(f"# mine\n{text}")
    trained(broken)
    assert result(broken) == result(whole)


def test_validation_prompts_and_header_have_the_triggers_of_the_concepts(
    own_toy: Toy, tmp_path: Path
) -> None:
    place = in_concepts(own_toy, tmp_path / "concepts")
    asked = ["ZWX on a mat", "a dot"]
    changes = {
        "validation__pictures": 1,
        "validation__every": 2,
        "dataset__trigger": "run",
        "train__steps": 2,
    }
    run = place.run("one", **changes, sample__prompts=asked)
    config = run.config()
    session = prepare(run, config, RuntimePlan.of(run, config), lambda *_: None)
    assert session.prompts == ["ZWX on a mat", "run, a dot"]
    found: list[EvalImage] = [*session.validation_sets.held_out, *session.validation_sets.training]
    assert found
    assert all(one.caption.startswith(("zwx, dot", "run, dot")) for one in found)
    trained(run)
    words = read_header(run.exports / "one.safetensors").metadata["modelspec.trigger_phrase"]
    assert set(words.split(", ")) <= {"zwx", "run"}
