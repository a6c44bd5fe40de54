"""The report of a run: one file that asks for nothing, tells no places, and survives whatever is missing or
hostile."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_core.__main__ import main
from lora_core.errors import RunError
from lora_core.lora.weights import AdapterWeights
from lora_core.report import report as story_module
from lora_core.report.plots import content_policy, load_scripts
from lora_core.report.report import (
    collect_data,
    report_html,
    sample_rows,
    saved_image_rows,
    summary,
    without_paths,
    write_report,
)
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from tests.tools.planted import TEXT, TINY, TO_K, TO_Q, dense, random_layer, saved

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>'


def quiet(words: str, done: int, total: int) -> None:
    """Nobody listens."""


def validated(step: int, gain: float, **more: Any) -> events.Validated:
    numbers = {"standard_error": 0.01, "base_loss": 0.5, "adapted_loss": 0.5 - gain, "best": True}
    return events.Validated(step=step, gain=gain, **{**numbers, **more})


def made_run(path: Path, *more: events.Event, **settings: Any) -> RunFolder:
    """A run of 100 steps by hand, with a checkpoint of rank 4 that has two directions."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    run = RunFolder.create(path, RunConfig().changed({"adapter.rank": 4, "adapter.alpha": 4.0, **changes}))
    lines: list[events.Event] = [events.Started(steps=100, pid=1, device="cpu", threads=1, versions={})]
    lines += [events.StepDone(step=n, loss=1 / n, lr=1e-4, seconds=0.1) for n in range(1, 101)]
    write(run, *lines, *more, events.Finished(step=100, export="export/a.safetensors"))
    folder = run.checkpoint(100)
    folder.mkdir(parents=True)
    layers = {key: random_layer(key, 2, 2.0, seed) for seed, key in enumerate((TO_K, TO_Q, TEXT))}
    saved(layers, folder / "adapter.safetensors")
    return run


def write(run: RunFolder, *lines: events.Event) -> None:
    run.events_file.write_text("".join(map(events.to_line, lines)), encoding="utf-8")


def previews(run: RunFolder, steps: list[int], prompts: list[str], side: int) -> list[events.Event]:
    """Samples of noise, which no format makes small."""
    draw = np.random.default_rng(0)
    made: list[events.Event] = []
    for step in steps:
        files = []
        for number in range(len(prompts)):
            file = run.previews / f"{step}-{number}.png"
            pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, compress_level=1)
            files.append(f"previews/{file.name}")
        made.append(events.PreviewDone(step=step, files=files, prompts=prompts))
    return made


class Tags(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        # Within a script there are no tags.
        if self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data


def page_of(run: RunFolder, measure: bool = False) -> Tags:
    out = run.path / "report.html"
    size = write_report(run, out, measure, quiet, 1.7e9)
    assert size == out.stat().st_size < 3e6
    page = Tags(out.read_text(encoding="utf-8"))
    # What draws the charts runs, and nothing else.
    assert "".join(page.scripts) == "".join(load_scripts())
    (policy,) = [a["content"] or "" for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == content_policy()
    assert len(re.findall("'sha256-[^']{44}'", policy.split("script-src")[1])) == len(load_scripts())
    for tag, attributes in page.tags:
        # Nothing is fetched: no handler, and an address only where it holds its own data.
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "href" not in attributes
        assert (attributes.get("src") or "data:image/webp;base64,").startswith("data:image/webp;base64,")
    return page


def test_a_page_of_all_there_is_stays_small(tmp_path: Path) -> None:
    run = made_run(tmp_path / "my run é")
    prompts = [f"a castle, number {n}" for n in range(9)]
    steps = list(range(0, 401, 20))
    bands = [{"from": 0, "to": 500, "gain": 0.1, "standard_error": 0.02}]
    rate = events.RateFound(rate=2e-4, rates=[1e-4, 2e-4, 4e-4], shares=[0.1, 0.2, 0.3])
    more = [rate, validated(50, 0.1, bands=bands), validated(100, 0.12, bands=bands)]
    lines = events.read_events(run.events_file)[0]
    write(run, *lines, *previews(run, steps, prompts, 256), *more)
    rows = [
        {"picture": "anna at home.png", "gain": n / 100, "standard_error": 0.01, "held_out": n < 3}
        for n in range(60)
    ]
    (run.path / "pictures.json").write_text(json.dumps({"step": 100, "rows": rows}))
    page = page_of(run)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4 * 7
    assert images[0]["alt"] == "base"
    assert all(attributes["alt"] for attributes in images)
    charts = [json.loads(a["data-chart"] or "") for _, a in page.tags if "data-chart" in a]
    plots = [chart["label"] for place in charts for chart in place]
    plots += [attributes.get("aria-label") or "" for tag, attributes in page.tags if tag == "table"]
    for words in (
        "Training loss",
        "Gain over the base, best +0.1200 at step 100",
        "noise level",
        "each image",
        "loss taken away by learning rate; 0.0002 was taken",
    ):
        assert any(words in label for label in plots), words
    assert "anna" not in page.text
    assert "my run é" in page.text
    assert "24% better than by the base, at the end" in page.text


def test_samples_keep_base_last_and_best(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a")
    lines = events.read_events(run.events_file)[0]
    steps = list(range(0, 210, 10))
    write(run, *lines, *previews(run, steps, ["x"], 8), validated(40, 0.2))
    ((_, row),) = sample_rows(collect_data(run, False, quiet))
    shown = [sample.step for sample in row]
    assert shown[0] == 0
    assert shown[-1] == 200
    assert 40 in shown
    assert len(shown) <= 7


def test_images_beside_the_run_stay_out_of_its_report(tmp_path: Path) -> None:
    """Its events may be a stranger's, who would get them back in the page."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "private.png")
    names = (str(tmp_path / "private.png"), "../private.png")
    stolen = [events.PreviewDone(step=100, files=[name], prompts=["x"]) for name in names]
    run = made_run(tmp_path / "run", *stolen)
    write_report(run, tmp_path / "a.html", False, quiet, 0)
    assert "data:image/webp" not in (tmp_path / "a.html").read_text("utf-8")


def test_samples_and_gain_of_the_raw_adapter_are_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a")
    lines = events.read_events(run.events_file)[0]
    base, last = previews(run, [0, 50], ["x"], 8)
    assert isinstance(last, events.PreviewDone)
    raw = {"raw_gain": 0.3, "raw_against": 0.1, "raw_against_error": 0.01}
    measured = dataclasses.replace(validated(50, 0.2), **raw)
    write(run, *lines, base, dataclasses.replace(last, raw_files=last.files), measured)
    story = collect_data(run, False, quiet)
    (_, row), (words, of_raw) = sample_rows(story)
    assert ([s.step for s in row], [s.step for s in of_raw]) == ([0, 50], [50])
    assert "raw adapter" in words
    page = report_html(story, 0.0)
    assert "The raw adapter gains more than its average, by 0.1000" in page
    assert "Held out, raw" in page


def test_what_people_and_files_say_is_text(tmp_path: Path) -> None:
    run = made_run(
        tmp_path / "x", sample__prompts=[HOSTILE], dataset__trigger=HOSTILE, model__base=f"/m/{HOSTILE}",
        adapter__block_ranks={HOSTILE.replace("/", ""): 3},
    )  # fmt: skip
    lines = events.read_events(run.events_file)[0][:-1]
    write(run, *lines, *previews(run, [0, 50], [HOSTILE], 16), events.Failed(step=100, reason=HOSTILE))
    renamed = tmp_path / HOSTILE.replace("/", "")
    run.path.rename(renamed)
    page = page_of(RunFolder(renamed))
    assert HOSTILE.replace("/", "") in page.text
    assert page.text.count("onerror=alert(1)") >= 5
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == ["base", "step 50"]


def test_no_place_of_the_computer_is_told(tmp_path: Path) -> None:
    run = made_run(
        tmp_path / "a", model__base="/home/anna meyer/models/my base.safetensors",
        dataset__path="C:\\Users\\anna\\images of tom", adapter__init="/home/anna/old.safetensors",
    )  # fmt: skip
    lines = events.read_events(run.events_file)[0][:-1]
    reason = f"The drive of {run.path}/checkpoints is full; see /home/anna/disk.txt."
    write(run, *lines, events.Paused(step=100, reason=reason))
    page = page_of(run, measure=True)
    assert "anna" not in page.text
    assert str(tmp_path) not in page.text
    assert "my base.safetensors" in page.text
    assert "old.safetensors" in page.text
    assert "It can no longer be measured." in page.text
    assert without_paths("see /home/anna/disk.txt, or a/b", run) == "see disk.txt, or a/b"


@pytest.mark.parametrize("missing", ["events", "checkpoint", "previews", "broken adapter", "broken images"])
def test_what_is_missing_is_a_sentence(tmp_path: Path, missing: str) -> None:
    run = made_run(tmp_path / "a")
    adapter = run.checkpoint(100) / "adapter.safetensors"
    said = {
        "events": "Nothing was trained yet.", "checkpoint": "The run has no checkpoint yet",
        "previews": "gone", "broken adapter": "adapter.safetensors", "broken images": "Spectrum",
    }  # fmt: skip
    if missing == "events":
        run.events_file.unlink()
    elif missing == "checkpoint":
        adapter.unlink()
    elif missing == "previews":
        lines = events.read_events(run.events_file)[0]
        write(run, *lines, events.PreviewDone(step=0, files=["previews/none.png"], prompts=["x"]))
    elif missing == "broken adapter":
        adapter.write_bytes(b"{}")
    else:
        (run.path / "pictures.json").write_text('[{"gain": "much"}, 7, {"gain": NaN, "standard_error": 1}]')
    assert said[missing] in page_of(run).text


def test_the_command_says_where_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "a")
    assert main(["report", str(run.path), "--no-measure"]) == 0
    assert capsys.readouterr().out.strip() == str(run.path / "report.html")
    assert "It was not measured for this report." in (run.path / "report.html").read_text(encoding="utf-8")
    out = tmp_path / "b.html"
    assert main(["report", str(run.path), "--no-measure", "--json", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(out), "bytes": out.stat().st_size}
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "is not a run" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"should end in \.html"):
        write_report(run, tmp_path / "a.pdf", False, quiet, 0)
    with pytest.raises(RunError, match="folder does not exist"):
        write_report(run, tmp_path / "no" / "a.html", False, quiet, 0)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([validated(50, 0.1), validated(100, 0.2)], "40% better than by the base, at the end"),
        ([validated(50, 0.015, best=False)], "is within noise"),
        ([validated(50, -0.1, best=False)], "It did not learn"),
        (
            [
                validated(100, 0.2),
                validated(150, 0.1, best=False, against_best=-0.1, against_best_error=0.02),
            ],
            "After that it became worse; take the file of step 100.",
        ),
        (
            [validated(60, 0.2), validated(100, 0.1, best=False, against_best=-0.1, against_best_error=0.02)],
            "After that it became worse.",
        ),
        ([], "no image was held out"),
        ([validated(100, 0.2, gauge=0.2, gauge_error=0.01, train_gain=0.4)], "Memorization: 50%"),
    ],
)
def test_verdicts(tmp_path: Path, found: list[events.Event], said: str) -> None:
    run = made_run(tmp_path / "a")
    write(run, *events.read_events(run.events_file)[0], *found)
    assert said in " ".join(summary(collect_data(run, False, quiet)))


class Planted:
    """A bench whose truth is known: a picture's gain falls with the squared distance from a best update."""

    def __init__(self, weights: AdapterWeights, best: float) -> None:
        self.target = {key: best * dense(layer) for key, layer in weights.layers.items()}
        self.norm = sum(float(d.square().sum()) for d in self.target.values())

    def gains(self, adapters: Any) -> torch.Tensor:
        (adapter,) = adapters
        away = 0.0
        for key, target in self.target.items():
            layer = adapter.weights.layers.get(key)
            delta = dense(layer, adapter.strength) if layer is not None else torch.zeros_like(target)
            away += float((target - delta).square().sum())
        pictures = torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64)
        return (pictures * (1 - away / self.norm))[:, None].expand(3, 4) * 0.1


def test_rank_and_strength_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted adapter is best at 0.8; cut to one direction it would lose more than 1% of its gain."""
    run = made_run(tmp_path / "a")
    file = run.checkpoint(100) / "adapter.safetensors"
    layers = {key: random_layer(key, 2, 2.0, seed) for seed, key in enumerate((TO_K, TO_Q, TEXT))}
    saved(layers, file)
    bench = Planted(AdapterWeights(layers), 0.8)
    found = SimpleNamespace(evaluator=bench, base=SimpleNamespace(family=TINY), pictures=3, note="Mind this.")
    monkeypatch.setattr(story_module, "run_evaluator", lambda *given: found)
    story = collect_data(run, True, quiet)
    assert story.strength is not None
    assert math.isclose(story.strength["strengths"][0], 0.8, abs_tol=0.011)
    assert story.rank is not None
    assert (story.rank["trained"], story.rank["rank"]) == (2, 2)
    text = page_of(run, measure=True).text
    assert re.search(r"gains most at strength 0\.[78]\d", text)
    assert "Measured on the 3 images that were held out. Mind this." in text
    assert "Trained at rank 2, needs 2" in text


def test_rows_of_pictures_are_sorted_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "pictures.json"
    good = [{"gain": 1, "standard_error": 0.1}, {"gain": 2.5, "standard_error": 0}]
    file.write_text(json.dumps({"rows": [*good, {"gain": True, "standard_error": 1}, {"gain": 3}]}))
    assert saved_image_rows(file) == [good[1], good[0]]
    file.write_text("[" * 100_000)
    assert saved_image_rows(file) == []
    assert saved_image_rows(tmp_path / "none.json") == []
