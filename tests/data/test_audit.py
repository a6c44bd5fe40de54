"""Each finding on pictures made for it, and none on sound ones."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lora_core.data import audit as audits
from lora_core.data.audit import TrainingView, audit, common_phrases, kept_looks, sharpness
from lora_core.data.dataset import scan
from lora_core.system.files import DEMO_BASE
from tests.data.conftest import Draw, noise

WORDS = ("cat", "dog", "tree", "house", "boat", "lamp", "fish", "bird")


def kinds(folder: Path, tokenizer: Path | None = None) -> list[tuple[str, str]]:
    found = audit(scan(folder), TrainingView(64, 8, tokenizer))
    json.dumps(found)
    return [(Path(problem["picture"]).name, problem["kind"]) for problem in found["problems"]]


def test_sound_pictures_have_no_findings(tmp_path: Path, draw: Draw) -> None:
    for seed, word in enumerate(WORDS):
        draw(tmp_path / f"{seed}.png", (96, 64), seed, f"a {word}")
    assert kinds(tmp_path, DEMO_BASE / "tokenizer") == []


def test_each_finding(tmp_path: Path, draw: Draw) -> None:
    for seed, word in enumerate(WORDS):
        draw(tmp_path / f"{seed}.png", (96, 64), seed, f"a {word}")
    (tmp_path / "text.png").write_text("no image")
    draw(tmp_path / "small.png", (24, 20), 20, "small")
    draw(tmp_path / "twin.png", (192, 128), 3, "twin")
    draw(tmp_path / "silent.png", seed=21)
    draw(tmp_path / "wordy.png", seed=22, caption="word " * 76)
    noise(96, 64, 23).filter(ImageFilter.GaussianBlur(10)).save(tmp_path / "soft.png")
    (tmp_path / "soft.txt").write_text("soft")
    assert sorted(kinds(tmp_path, DEMO_BASE / "tokenizer")) == [
        ("silent.png", "no caption"),
        ("small.png", "tiny"),
        ("soft.png", "blurred"),
        ("text.png", "unreadable"),
        ("twin.png", "twins"),
        ("wordy.png", "long caption"),
    ]


def test_common_phrase(tmp_path: Path, draw: Draw) -> None:
    for seed, word in enumerate(WORDS):
        draw(tmp_path / f"{seed}.png", (96, 64), seed, f"A Photo of a {word}, at night")
    found = audit(scan(tmp_path), TrainingView(64, 8))
    assert [(p["picture"], p["kind"]) for p in found["problems"]] == [("", "common phrase")] * 2
    assert "“photo”" in found["problems"][1]["sentence"]
    assert "8 of 8" in found["problems"][1]["sentence"]


@pytest.mark.parametrize(
    ("captions", "wanted"),
    [
        (["a red hat on a cat", "the red hat, dog"], [("red hat", 2)]),
        # Four of five are 80%, which is not over 80%.
        (["x one"] * 4 + ["two"], []),
        (["x one"] * 9 + ["two"], [("x one", 9)]),
        # Small words alone say nothing; commas end a phrase.
        (["of the", "of the"], []),
        (["a cat, big", "a cat big"], [("big", 2), ("cat", 2)]),
    ],
)
def test_common_phrases(captions: list[str], wanted: list[tuple[str, int]]) -> None:
    assert common_phrases(captions) == wanted


def test_numbers(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "3_a" / "one.png", seed=1, caption="red, big")
    draw(tmp_path / "two.png", seed=2, caption="red")
    draw(tmp_path / "three.png", seed=3)
    found = audit(scan(tmp_path), TrainingView(64, 8))
    assert list(found) == ["pictures", "captions", "problems", "tags", "shares", "concepts", "learned"]
    assert found["pictures"] == 3
    assert found["captions"] == 2
    assert found["tags"] == [{"tag": "red", "pictures": 2}, {"tag": "big", "pictures": 1}]
    shares = {Path(row["picture"]).name: row["share"] for row in found["shares"]}
    assert shares == pytest.approx({"one.png": 0.6, "two.png": 0.2, "three.png": 0.2})


def test_nothing_at_all(tmp_path: Path) -> None:
    assert audit(scan(tmp_path), TrainingView(64, 8))["pictures"] == 0


def test_sharpness_falls_with_blur() -> None:
    image = noise(256, 256)
    values = [sharpness(image.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 4, 8)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.5
    assert values[3] < 0.15
    assert sharpness(Image.new("RGB", (64, 64), "navy")) == 1.0


def test_sharpness_is_that_of_sorted_pixels() -> None:
    for seed, size in enumerate(((96, 64), (33, 21), (16, 200))):
        image = noise(*size, seed).filter(ImageFilter.GaussianBlur(seed))
        grey = np.asarray(image.convert("L"), dtype=float)
        rises = np.concatenate([abs(np.diff(grey, axis=axis)).ravel() for axis in (0, 1)])
        dark, bright = np.percentile(grey, (0.5, 99.5))
        assert sharpness(image) == pytest.approx(np.percentile(rises, 99.9) / (bright - dark), abs=1e-12)


def test_an_audit_goes_on_where_another_was_cancelled(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(6):
        draw(tmp_path / "set" / f"{seed}.png", (64, 48), seed, f"number {seed}")
    opened: list[str] = []
    plain = audits.open_image
    monkeypatch.setattr(
        audits, "open_image", lambda one, *more: (opened.append(one.path.name), plain(one, *more))[1]
    )
    found, view, file = scan(tmp_path / "set"), TrainingView(32, 8), tmp_path / "cache" / "looks.npz"

    def cancel(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), kept_looks(file) as looks:
        audit(found, view, cancel, looks)
    assert len(opened) >= 3
    with kept_looks(file) as looks:
        first = audit(found, view, None, looks)
    # Each was opened once, whichever audit it was.
    assert sorted(opened) == [f"{seed}.png" for seed in range(6)]
    with kept_looks(file) as looks:
        assert audit(found, view, None, looks) == first
    assert len(opened) == 6
    assert first == audit(found, view)
    # What is kept of files that are gone goes, and a broken file counts as none.
    (tmp_path / "set" / "5.png").unlink()
    with kept_looks(file) as looks:
        audit(scan(tmp_path / "set"), view, None, looks)
        assert len(looks) == 5
    file.write_bytes(b"PK broken")
    with kept_looks(file) as looks:
        assert looks == {}


def test_looks_of_another_file_bucket_or_measurement_are_not_taken(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = draw(tmp_path / "set" / "a.png", (64, 48), 1, "one"), tmp_path / "looks.npz"
    opened: list[str] = []
    plain = audits.open_image
    monkeypatch.setattr(
        audits, "open_image", lambda one, *more: (opened.append(one.path.name), plain(one, *more))[1]
    )

    def looked(multiple: int = 8) -> bool:
        opened.clear()
        with kept_looks(file) as looks:
            audit(scan(tmp_path / "set"), TrainingView(32, multiple), None, looks)
        return bool(opened)

    assert [looked(), looked(), looked(16), looked(16)] == [True, False, True, False]
    stamp = path.stat()
    path.write_bytes(path.read_bytes() + b"more")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert [looked(), looked()] == [True, False]
    monkeypatch.setattr(audits, "MEASURE", audits.MEASURE + 1)
    assert [looked(), looked()] == [True, False]
    with np.load(file) as kept:
        old = {name: kept[name] for name in kept.files if name != "measure"}
    np.savez(file, **old)
    assert [looked(), looked()] == [True, False]


def test_phrases_of_rare_words_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    plain = audits._phrases_of
    monkeypatch.setattr(
        audits, "_phrases_of", lambda *given: (counted.append(len(found := plain(*given))), found)[1]
    )
    captions = [f"a red hat on number {n}, with words {n * 7} and {n * 11} of its own" for n in range(200)]
    assert common_phrases(captions)[0] == ("red hat on number", 200)
    # Of runs of common words alone; all runs of up to six words would be 50 a caption.
    assert max(counted) <= 12
