"""The Preview tab's logic: its form, history, HTML and what a dropped picture says."""

import base64
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save, save_file

from app.preview import request_form as preview_form
from app.preview import sent_form
from app.preview import view as preview
from app.preview.history import FILE, GridState, History, HistoryEntry, sheet_info
from app.preview.render_queue import PreviewState, RenderQueue
from app.preview.request_form import ADDED, lora_groups
from app.preview.sent_form import save_form, take_rows
from app.preview.view import (
    STARTS,
    Infotext,
    apply_infotext,
    generate,
    infotext_table,
    open_file,
    open_tab,
    opened_folder,
    paint_mask,
    parse_infotext,
    read_infotext,
    redraw_loras,
    start_from,
)
from app.state import AppState, Snapshot, take_snapshot
from lora_core.errors import ConfigError, DatasetError, LoraError, RunError
from lora_core.generate.grid import make_axis
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.model_files.detect import BaseFacts
from lora_core.model_files.starting_settings import is_slider
from lora_core.projects.workspace import list_trash, restore
from lora_core.runs.events import EventWriter, PreviewDone
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.system.files import unused_path
from tests.faults import Fault, armed

HOSTILE = '"><img src=x onerror=alert(1)>{{7*7}}\u202e😀'


def run_with_file(app_state: AppState, name: str = "mine") -> tuple[RunFolder, Path]:
    """A run that has an export and two checkpoints, as far as the window looks."""
    config = RunConfig().changed({"sample.prompts": ["a house"], "sample.seed": 7, "sample.steps": 9})
    run = RunFolder.create(app_state.workspace / "runs" / name, config)
    for step in (50, 100):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "adapter.safetensors").write_bytes(b"x")
    run.exports.mkdir(exist_ok=True)
    file = run.exports / f"{name}.safetensors"
    file.write_bytes(b"x")
    return run, file


def picture(folder: Path, name: str = "a.png", text: str = "") -> Path:
    info = PngInfo()
    if text:
        info.add_text("parameters", text)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


# ---- history


def test_history_is_read_again_newest_first_and_put_back_exactly(tmp_path: Path) -> None:
    shot = GenerationRequest(
        prompt=HOSTILE, negative="n\nn", seed=2**40, loras=(WeightedLora("/x/é.safetensors", 0.8, 0.4, 4),)
    )
    history = History(tmp_path / "generated")
    first = HistoryEntry(picture(history.folder, "1/a.png"), shot)
    sheet = HistoryEntry(
        picture(history.folder, "1/b.png"),
        GenerationRequest(),
        make_axis("prompt", ["a, b"]),
        make_axis("seed", [1, 2]),
    )
    history.add(first)
    history.add(sheet)
    with open(history.folder / FILE, "ab") as file:
        file.write(
            b'{broken\n[1]\n{"file": "../../x.png"}\n{"file": "gone.png", "shot": {}}\n\xff\n{"half": '
        )
    again = History(tmp_path / "generated").newest()
    assert [(one.file, one.shot, one.rows, one.columns) for one in again] == [
        (one.file, one.shot, one.rows, one.columns) for one in (sheet, first)
    ]
    history = History(tmp_path / "generated")
    history.add(HistoryEntry(picture(history.folder, "1/c.png"), GenerationRequest()))
    names = [one.file.name for one in History(tmp_path / "generated").newest()]
    assert names == ["c.png", "b.png", "a.png"], "the half line did not swallow it"
    with armed(Fault("write", FILE, half=True)), pytest.raises(OSError, match="No space"):
        history.add(first)
    history.add(HistoryEntry(picture(history.folder, "1/d.png"), GenerationRequest()))
    assert History(tmp_path / "generated").newest()[0].file.name == "d.png", "nor that of a full disk"


def test_a_starred_image_keeps_its_place_and_stays_however_many_come_after_it(app_state: AppState) -> None:
    history = app_state.render_queue.history
    for name in "abc":
        history.add(HistoryEntry(picture(app_state.generated / "1", f"{name}.png"), GenerationRequest()))

    def listed(history: History, most: int) -> list[tuple[str, bool]]:
        return [(one.file.stem, one.starred) for one in history.newest(most)]

    preview.ACTIONS["star"](app_state, {"file": "a.png", "on": True})
    again = History(app_state.generated)
    assert listed(history, 2) == listed(again, 2) == [("c", False), ("b", False), ("a", True)]
    preview.ACTIONS["star"](app_state, {"file": "a.png", "on": False})
    assert listed(history, 2) == listed(History(app_state.generated), 2) == [("c", False), ("b", False)]
    assert not any(starred for _name, starred in listed(history, 3))
    with pytest.raises(RunError, match="no longer exists"):
        history.star("x.png", True)


def test_a_picture_goes_to_the_trash_and_comes_back(app_state: AppState) -> None:
    history = app_state.render_queue.history
    kept = HistoryEntry(picture(app_state.generated / "2026-01"), GenerationRequest())
    history.add(kept)
    history.add(
        HistoryEntry(picture(app_state.generated / "2026-01", "b.png"), GenerationRequest(), beside=True)
    )
    assert app_state.render_queue.view().shot == GenerationRequest()
    place = app_state.render_queue.forget("a.png", app_state.workspace)
    history.bring_back(place, app_state.workspace)
    assert [one.file for one in history.newest()] == [kept.file]
    with pytest.raises(RunError, match="no longer in the trash"):
        history.bring_back(place, app_state.workspace)
    app_state.render_queue.forget("a.png", app_state.workspace)
    assert not kept.file.exists()
    assert app_state.render_queue.view().shot is None, "it is not drawn anew"
    assert history.newest() == History(app_state.generated).newest() == []
    (one,) = list_trash(app_state.workspace)
    assert restore(one, app_state.workspace) == kept.file
    assert [one.file for one in History(app_state.generated).newest()] == [kept.file]
    with pytest.raises(RunError, match="no longer exists"):
        history.remove("../../draft.json", app_state.workspace)


def test_each_project_has_its_own(app_state: AppState) -> None:
    app_state.render_queue.history.add(HistoryEntry(picture(app_state.generated), GenerationRequest()))
    app_state.projects.new("another")
    assert app_state.render_queue.history.newest() == []


# ---- the form


def test_the_newest_lora_is_in_the_form_until_a_person_chooses(app_state: AppState) -> None:
    assert preview_form.lora_rows(take_snapshot(app_state))[0] == []
    run, file = run_with_file(app_state)
    assert preview_form.lora_rows(take_snapshot(app_state))[0] == [WeightedLora(str(file))]
    rows = [WeightedLora(str(file), 0.5), WeightedLora("/typed/é.safetensors", 2.5, 0.25)]
    first = sent_form.save_form(app_state.project, rows, True)
    assert preview_form.lora_rows(take_snapshot(app_state))[0] == rows
    assert sent_form.save_form(app_state.project, [], False) == first + 1
    assert preview_form.lora_rows(take_snapshot(app_state))[0] == [], "the base alone is a choice too"
    sent_form.save_form(app_state.project, [WeightedLora(str(run.path / "gone.safetensors"))], False)
    assert preview_form.lora_rows(take_snapshot(app_state))[0] == [WeightedLora(str(file))]
    # Another project begins with its own, of which there is none.
    app_state.projects.new("Other")
    assert preview_form.lora_rows(take_snapshot(app_state))[0] == []


def test_rows_from_a_page_are_checked() -> None:
    sent = [
        {"file": ' "/a b.safetensors" ', "strength": "0.5", "text": None},
        {"file": "x", "strength": float("nan"), "text": "1e99"},
        {"file": "", "strength": 1}, "no row", {"strength": 1}, None,
    ]  # fmt: skip
    assert sent_form.parse_rows(sent) == [
        WeightedLora("/a b.safetensors", 0.5),
        WeightedLora("x", 0.0, 20.0),
    ]


def test_a_page_sends_the_whole_form(app_state: AppState) -> None:
    fields = {"prompt": "a", "negative": "b", "sampler": "ddim", "steps": "9", "cfg": "4", "seed": "3"}
    sent = {
        "rows": [{"file": "x", "strength": 0.3, "text": None}], "apart": False, "fields": fields,
        "strip": {"values": "0, 0.5", "on": True},
        "grid": {"rows": {"kind": "none"}, "columns": {"kind": "seed", "values": ["1, 2"]}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="21 LoRAs are too many; the form takes up to 20"):
        sent_form.take_sent_form(app_state.project, {**sent, "rows": sent["rows"] * 21})
    rows, rev = sent_form.take_sent_form(app_state.project, sent)
    snapshot = take_snapshot(app_state)
    assert rows == preview_form.lora_rows(snapshot)[0] == [WeightedLora("x", 0.3)]
    data = preview_form.form_data(snapshot)
    assert data["rev"] == rev
    assert {name: data["fields"][name] for name in fields} == fields
    assert data["strip"] == sent["strip"]
    assert preview_form.take_sent_axes(app_state.project, sent) == [None, make_axis("seed", [1, 2])]
    assert preview_form.grid_axes(snapshot)["columns"]["values"] == ["1, 2"]
    assert preview_form.build_request(snapshot, data["fields"], rows).steps == 9
    # A number that is half typed, and what a page of another kind might send.
    sent_form.take_sent_form(app_state.project, {**sent, "strip": {"values": "0, x"}})
    assert sent_form.strip_values(app_state.project) == (0.0, 0.5)
    sent_form.take_sent_form(app_state.project, {"rows": [], "fields": {"prompt": ["a"]}, "grid": 3})
    assert "Without a LoRA" in preview_form.form_data(take_snapshot(app_state))["loras"]


@pytest.mark.parametrize(
    "sent",
    [{"what": "strip", "strip": "x"}, {"what": "strip", "strip": [1]}, {"fields": {"seed": 10**400}}],
    ids=["text", "list", "seed"],
)
def test_a_form_of_another_kind_is_refused_in_a_sentence(app_state: AppState, sent: dict[str, Any]) -> None:
    assert "rev" in generate(app_state, {"rows": [], **sent})
    assert app_state.render_queue.view().state == "error"


def test_a_moved_strength_draws_the_shown_image_anew(app_state: AppState, tmp_path: Path) -> None:
    sent = {"rows": [{"file": "x", "strength": 0.3}], "moved": True}
    assert not take_rows(app_state, sent)["drawn"], "nothing is shown yet"
    app_state.render_queue.want(GenerationRequest(loras=(WeightedLora("x", 1.0),)))
    assert take_rows(app_state, sent)["drawn"]
    shot = app_state.render_queue.view().shot
    assert shot is not None
    assert shot.loras == (WeightedLora("x", 0.3),)
    assert not take_rows(app_state, {"rows": [{"file": "y"}], "moved": True})["drawn"], "another file waits"


def test_a_lora_that_is_added_has_a_row_before_it_has_a_file(app_state: AppState) -> None:
    sent = {"rows": [{"file": "/a", "strength": 2.5}, {"strength": "x"}], "apart": True}
    html = redraw_loras(app_state, {**sent, "add": True})["html"]
    assert html == preview_form.form_data(take_snapshot(app_state))["loras"]
    assert html.count('role="group"') == 3
    assert 'value="2.5" data-part="text" data-typed aria-label="Text encoder of LoRA 1, typed"' in html
    assert preview_form.lora_rows(take_snapshot(app_state))[0] == [WeightedLora("/a", 2.5)]


def test_the_last_image_is_shown_after_a_restart(app_state: AppState) -> None:
    shot = GenerationRequest(prompt="a", loras=(WeightedLora("x", 0.5),))
    history = app_state.render_queue.history
    history.add(HistoryEntry(picture(app_state.generated, "a.png"), shot))
    alone = HistoryEntry(picture(app_state.generated, "b.png"), shot.alone(), beside=True)

    def reopened() -> PreviewState:
        return RenderQueue(app_state.worker, lambda: app_state.generated).view()

    assert reopened().shot is None, "the base's own image is missing"
    history.add(alone)
    assert [one.file.name for one in history.newest()] == ["a.png"]
    view = reopened()
    assert (view.state, view.shot) == ("idle", shot)
    assert view.images == {shot: app_state.generated / "a.png", shot.alone(): alone.file}
    lora = app_state.workspace / "x.safetensors"
    lora.touch()
    os.utime(lora, (2**33, 2**33))
    other = replace(shot, loras=(WeightedLora(str(lora), 0.5),))
    history.add(HistoryEntry(picture(app_state.generated, "c.png"), other))
    assert reopened().shot is None, "the LoRA was written after its image"


GIVEN = {"prompt": "a", "negative": "", "sampler": "ddim", "steps": 20, "cfg": 5.0, "seed": 3}


def test_a_seed_of_minus_one_is_drawn_by_lot(app_state: AppState) -> None:
    snapshot = take_snapshot(app_state)
    seeds = {preview_form.build_request(snapshot, {**GIVEN, "seed": -1}, []).seed for _ in range(5)}
    assert len(seeds) == 5
    assert min(seeds) >= 0
    assert preview_form.build_request(snapshot, {**GIVEN, "seed": 0}, []).seed == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"width": 100}, "not a multiple of 32; take 96 or 128"),
        ({"height": 8}, "take 32"),
        ({"steps": 0}, "Steps 0"),
        ({"cfg": 99}, "must be between 1 and 30"),
        ({"seed": -2}, "The seed -2"),
        ({"width": 10**9}, "out of range"),
        ({"cfg_rescale": "2"}, "CFG rescale 2 is out of range; it must be between 0 and 1"),
        ({"cfg_rescale": "much"}, "a number or auto"),
        ({"cfg_rescale": "nan"}, "out of range"),
        ({"steps": "many"}, "Steps should be a number, not 'many'"),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(app_state: AppState, more: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=r"\.$") as found:
        preview_form.build_request(take_snapshot(app_state), {**GIVEN, **more}, [])
    assert words in str(found.value)


def test_cfg_rescale_as_it_is_typed(app_state: AppState) -> None:
    snapshot = take_snapshot(app_state)
    for typed, meant in (("auto", "auto"), ("", "auto"), (None, "auto"), ("0,5", 0.5), (0, 0.0)):
        assert preview_form.build_request(snapshot, {**GIVEN, "cfg_rescale": typed}, []).cfg_rescale == meant


def test_a_sheet_says_its_rescale(app_state: AppState) -> None:
    assert "CFG Rescale: 0.7" in sheet_info(GridState(GenerationRequest(cfg_rescale=0.7), None, None, []))
    # The embedded base is drawn without, unless somebody asks for it.
    assert "Rescale" not in sheet_info(GridState(GenerationRequest(), None, None, []))


def test_a_lora_s_own_base_draws_it(app_state: AppState) -> None:
    run, file = run_with_file(app_state)
    shot = preview_form.build_request(
        take_snapshot(app_state), GIVEN, [WeightedLora("/elsewhere.safetensors"), WeightedLora(str(file))]
    )
    config = run.config()
    assert (shot.base, shot.clip_skip) == (config.model.base, config.train.clip_skip)


def test_settings_of_a_picture_go_into_the_form(app_state: AppState) -> None:
    _, file = run_with_file(app_state)
    info = Infotext(
        HOSTILE,
        "no",
        7,
        "Euler a",
        3.5,
        99,
        96,
        128,
        "demo",
        loras=(WeightedLora("mine", 0.8, 0.4), WeightedLora("away", 1)),
    )
    assert apply_infotext(take_snapshot(app_state), info) == ["away"]
    snapshot = take_snapshot(app_state)
    assert preview_form.load_fields(snapshot) == {
        "prompt": HOSTILE, "negative": "no", "sampler": "euler_a", "steps": 7, "cfg": 3.5, "seed": 99,
        "cfg_rescale": 0.0, "width": 96, "height": 128, "image": None, "denoising_strength": 0.6,
        "mask": None,
    }  # fmt: skip
    assert preview_form.lora_rows(snapshot)[0] == [WeightedLora(str(file), 0.8, 0.4)]


def test_other_tools_and_added_files_are_offered(
    app_state: AppState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ComfyUI" / "models" / "loras"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    monkeypatch.setattr(app_state.tools, "lora_folders", lambda: [("ComfyUI", folder)])
    _, file = run_with_file(app_state)
    added = app_state.project.path / ADDED / "y.safetensors"
    added.parent.mkdir()
    added.write_bytes(b"")
    assert unused_path(added.parent, "y", ".safetensors").name == "y-2.safetensors"
    groups = dict(lora_groups(take_snapshot(app_state)))
    assert groups["ComfyUI"] == [("sub/x", str(folder / "sub" / "x.safetensors"))]
    assert groups["Added here"] == [("y", str(added))]
    assert groups["Runs"][0] == ("mine", str(file))


# ---- opening the tab


def test_the_strip_of_a_run_is_drawn_once(app_state: AppState, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[tuple[GenerationRequest, object]] = []
    monkeypatch.setattr(app_state.render_queue, "want", lambda shot, strip: wanted.append((shot, strip)))
    assert open_tab(app_state) == {"fill": False, "drawn": False}
    _, file = run_with_file(app_state)
    app_state.project.update_draft(preview_strip="mine")
    assert open_tab(app_state)["fill"]
    ((shot, strip),) = wanted
    assert (shot.loras, shot.seed, shot.steps) == ((WeightedLora(str(file)),), 7, 9)
    assert strip == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert preview_form.load_fields(take_snapshot(app_state))["seed"] == 7
    assert not open_tab(app_state)["fill"]
    assert len(wanted) == 1
    app_state.project.update_draft(preview_strip="deleted")
    open_tab(app_state)
    assert app_state.render_queue.view().state == "error"
    assert "deleted" in app_state.render_queue.view().message


# ---- pictures that say how they were made


def test_a_picture_s_settings_are_read_and_shown_as_text(tmp_path: Path) -> None:
    lora = WeightedLora("x", 0.5)
    drawn = GenerationRequest(HOSTILE, prompt=HOSTILE, negative=HOSTILE, seed=9, loras=(lora,))
    _, info = read_infotext(picture(tmp_path, text=drawn.infotext(0.0, {})))
    assert (info.prompt, info.seed, info.loras) == (HOSTILE, 9, (lora,))
    shown = infotext_table(f"{HOSTILE}.png", info)
    assert "<img" not in shown


def test_a_picture_without_settings_and_no_picture_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no settings"):
        read_infotext(picture(tmp_path))
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for name in ("b.png", "missing.png"):
        with pytest.raises(DatasetError, match="not a readable image"):
            read_infotext(tmp_path / name)
    # A text of 100 MB packed small: Pillow's limit for such texts, not ours, stops it.
    info = PngInfo()
    info.add_text("parameters", "a" * 2**21, zip=True)
    Image.new("RGB", (1, 1)).save(tmp_path / "bomb.png", pnginfo=info)
    with pytest.raises(DatasetError, match=r"\.$"):
        read_infotext(tmp_path / "bomb.png")


def test_images_start_from_one_that_was_opened(app_state: AppState) -> None:
    opened = open_file(app_state, picture(opened_folder(app_state) / "1", "start.png"))
    assert "holds no settings" in opened["html"]
    assert 'data-start-from="1/start.png"' in opened["html"]
    with pytest.raises(RunError, match="open it again"):
        start_from(app_state, {"file": "../draft.json"})
    image = start_from(app_state, {"file": "1/start.png"})["image"]
    # The page sends it with the rest of its form.
    take_rows(app_state, {"rows": [], "fields": {"image": image}, "rev": 1})
    fields = preview_form.load_fields(take_snapshot(app_state))
    kept = app_state.project.path / STARTS / "start.png"
    assert (fields["image"], fields["denoising_strength"]) == (str(kept), 0.6)
    assert kept.is_file()
    snapshot = take_snapshot(app_state)
    shot = preview_form.build_request(snapshot, fields | {"denoising_strength": "0.35"}, [])
    assert (shot.image, shot.denoising_strength) == (str(kept), 0.35)
    with pytest.raises(ConfigError, match="denoising strength 2 is out of range"):
        preview_form.build_request(snapshot, fields | {"denoising_strength": 2}, [])
    # Without an image, the number beside it has no effect.
    assert preview_form.build_request(snapshot, {"denoising_strength": 2}, []) == preview_form.build_request(
        snapshot, {}, []
    )
    # Settings of an image from noise take the image out of the form; others name what is missing.
    text = shot.infotext(0.0, {})
    assert apply_infotext(snapshot, parse_infotext(text)) == []
    assert preview_form.load_fields(take_snapshot(app_state))["denoising_strength"] == 0.35
    assert apply_infotext(snapshot, parse_infotext(replace(shot, image="").infotext(0.0, {}))) == []
    snapshot = take_snapshot(app_state)
    assert not preview_form.load_fields(snapshot)["image"]
    assert apply_infotext(snapshot, parse_infotext(text)) == ["the image that it started from"]
    assert parse_infotext(f"{text}, Hires upscale: 2").denoising_strength is None


def test_a_mask_is_painted_over_the_image_of_the_form(app_state: AppState, tmp_path: Path) -> None:
    """The page asks for the image, sends what was painted, and puts the file's path into the form."""
    image = tmp_path / "start.png"
    Image.new("RGB", (48, 32), "red").save(image)
    with pytest.raises(DatasetError, match="no image to paint on"):
        paint_mask(app_state, {"image": ""})
    shown = base64.b64decode(paint_mask(app_state, {"image": f'"{image}"'})["shown"])
    with Image.open(io.BytesIO(shown)) as opened, Image.open(image) as whole:
        assert (opened.format, opened.size) == ("WEBP", whole.size)
        painted = Image.new("RGB", whole.size)
    with pytest.raises(DatasetError, match="black everywhere"):
        paint_mask(app_state, {"image": str(image), "png": png_of(painted)})
    painted.paste("white", (0, 0, 4, 4))
    mask = paint_mask(app_state, {"image": str(image), "png": png_of(painted)})["mask"]
    assert Path(mask) == app_state.project.path / STARTS / "start-mask.png"
    # It opens again as it was painted.
    again = base64.b64decode(paint_mask(app_state, {"image": str(image), "mask": mask})["painted"])
    with Image.open(io.BytesIO(again)) as opened:
        assert abs(opened.convert("L").getpixel((0, 0)) - painted.convert("L").getpixel((0, 0))) < 9
    take_rows(app_state, {"rows": [], "fields": {"image": str(image), "mask": mask}, "rev": 1})
    snapshot = take_snapshot(app_state)
    shot = preview_form.build_request(snapshot, preview_form.load_fields(snapshot), [])
    assert (shot.image, shot.mask) == (str(image), mask)
    shot.check()
    # Settings of an image from noise take both out of the form.
    assert apply_infotext(snapshot, parse_infotext(replace(shot, image="", mask="").infotext(0.0, {}))) == []
    assert not preview_form.load_fields(take_snapshot(app_state))["mask"]


def png_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_run_s_sample_is_tried_with_its_own_options(app_state: AppState) -> None:
    run, _ = run_with_file(app_state)
    line = "a house --n trees, fog --w 64 --h 96 --d 11 --l 4 --s 3"
    writer = EventWriter(run.events_file)
    writer.write(PreviewDone(step=0, files=["a"], prompts=[line]))
    writer.close()
    shot = preview_form.build_run_request(take_snapshot(app_state), run.name)
    assert (shot.prompt, shot.negative, shot.width, shot.height) == ("a house", "trees, fog", 64, 96)
    assert (shot.seed, shot.cfg, shot.steps) == (11, 4.0, 3)


# ---- HTML


def shown(app_state: AppState, view: PreviewState) -> Snapshot:
    return replace(take_snapshot(app_state), view=view)


def test_everything_of_people_is_text_and_addresses_stay_inside(app_state: AppState) -> None:
    path = picture(app_state.generated / "2026-01", "<b>é.png" if os.name != "nt" else "é.png")
    shot = GenerationRequest(
        prompt=HOSTILE, seed=5, width=96, height=64, loras=(WeightedLora(f"/{HOSTILE}.safetensors", 0.5),)
    )
    sheet = GridState.of(shot, make_axis("prompt", [HOSTILE]), make_axis("strength", [0, 0.5]))
    pictures = dict.fromkeys((shot, shot.alone(), *sheet.shots[:1]), path)
    app_state.render_queue.history.add(HistoryEntry(path, shot))
    view = PreviewState("error", HOSTILE, 1, 2, shot, (0.0, 0.5), sheet, pictures)
    snapshot = shown(app_state, view)
    pieces = [
        preview.comparison,
        preview.foot,
        preview.strength_strip,
        preview.grid_result,
        preview.history,
    ]
    for make in pieces:
        html = make(snapshot)
        assert "<img src=x" not in html
        assert "<b>é" not in html
        assert html.count("<img") == html.count('<img src="/easel/') + html.count(
            'src="/easel/thumb'
        ) + html.count('class="look"')
    assert "--ratio:1.5000" in preview.comparison(snapshot)
    assert 'id="preview-result"' in preview.comparison(snapshot)
    sheet.sheet = path
    assert "<img src=x" not in preview.grid_result(snapshot)


def test_what_is_not_there_yet_says_what_to_do(app_state: AppState) -> None:
    nothing = shown(app_state, PreviewState("idle", "", 0, 0, None, (), None))
    assert "press Generate" in " ".join(preview.comparison(nothing).split())
    assert "Nothing is being generated" in preview.foot(nothing)
    assert "press Update" in preview.strength_strip(nothing)
    busy = shown(
        app_state,
        PreviewState("working", "Waiting: 2 requests before this one.", 0, 0, GenerationRequest(), (), None),
    )
    assert "Waiting: 2" in preview.foot(busy)
    assert "Nothing is being generated" not in preview.foot(busy)


def test_the_foot_says_what_will_happen_or_why_it_cannot(
    app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = run_with_file(app_state)
    save_form(app_state.project, [WeightedLora(str(file), 0.93)], False)
    view = PreviewState("idle", "", 0, 0, GenerationRequest(), (), None, seconds=3.4)
    foot = preview.foot(shown(app_state, view))
    assert '<b class="num" dir="auto">mine, 0.93</b>' in foot
    assert "about 3 s" in foot
    monkeypatch.setattr(preview, "base_for", lambda *_: BaseFacts("gone", problem="The base is gone."))
    foot = preview.foot(shown(app_state, view))
    assert 'class="problem num">The base is gone.' in foot


def test_axes_are_typed_or_picked(app_state: AppState) -> None:
    assert preview_form.parse_axis("strength", ["0, 0.5", "1"]) == make_axis("strength", [0, 0.5, 1])
    assert preview_form.parse_axis("prompt", ["a, b"]) == make_axis("prompt", ["a, b"])
    assert preview_form.parse_axis("none", []) is None
    with pytest.raises(LoraError, match="needs values"):
        preview_form.parse_axis("seed", [])
    run_with_file(app_state)
    choices, picked = preview_form.list_axis_values(take_snapshot(app_state), "checkpoint")
    assert [title for title, _ in choices] == ["mine", "mine, step 100", "mine, step 50"]
    assert [Path(file).parent.name for file in picked] == ["step-000050", "step-000100"]


def test_the_list_of_files_is_sent_once_for_all_rows(app_state: AppState) -> None:
    added = app_state.project.path / preview_form.ADDED
    added.mkdir()
    files = [added / f"lora {number}.safetensors" for number in range(20)]
    for file in files:
        file.touch()
    sent_form.save_form(app_state.project, [WeightedLora(str(file)) for file in files[:4]], False)
    html = preview_form.form_data(take_snapshot(app_state))["loras"]
    assert html.count("<option value=") == 21
    assert html.count("<select ") == 4


def test_a_slider_has_a_range_from_minus_two_to_two(app_state: AppState, tmp_path: Path) -> None:
    """As its header says, until the user types other strengths for the strip."""
    files = {}
    for name, settings in (("slider", "[slider]\npositive = 'old'"), ("lora", "[slider]\npositive = ''")):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file({"x.lora_down.weight": torch.zeros(1)}, files[name], {"lora_easel.config": settings})
    assert [is_slider(file) for file in files.values()] == [True, False]
    assert not is_slider(tmp_path / "none.safetensors")
    assert not is_slider(Path("a prompt in the field of a path, " * 200))
    rows = [WeightedLora(str(files["slider"])), WeightedLora(str(files["lora"]))]
    sent_form.save_form(app_state.project, rows, False)
    data = preview_form.form_data(take_snapshot(app_state))
    assert data["strip"]["values"] == "-2, -1, 0, 1, 2"
    first, second = data["loras"].split('data-row="1"')
    assert ('min="-2" max="2"' in first, 'min="0" max="1.5"' in second) == (True, True)
    assert sent_form.strip_values(app_state.project, rows[1:]) == sent_form.STRIP
    app_state.project.update_draft(preview_strip_at={"values": [0.0, 3.0]})
    assert sent_form.strip_values(app_state.project, rows) == (0.0, 3.0)


@pytest.mark.parametrize("name", ["bad.png", "bad.safetensors"])
def test_a_file_that_cannot_be_opened_is_called_by_its_name(client: TestClient, name: str) -> None:
    answer = client.post(f"/easel/preview/file?name={name}", content=b"nothing of the kind").json()
    assert answer["problem"].startswith(f"{name} is ")


def test_a_file_that_is_no_adapter_is_refused_before_it_is_added(
    client: TestClient, app_state: AppState
) -> None:
    for key, said in (
        ("foo.weight", "cannot be used: it is no adapter that is known here."),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "is for Flux"),
    ):
        data = save({key: torch.zeros(4, 4)})
        answer = client.post("/easel/preview/file?name=other.safetensors", content=data).json()
        assert answer["problem"].startswith(f"other.safetensors {said}")
    assert not (app_state.project.path / ADDED).exists()
