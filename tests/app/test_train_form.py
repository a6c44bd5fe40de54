"""The Train tab's form: its search, its resets, and two pages that type into it."""

import errno
import re
import threading
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import pytest
from fastapi.testclient import TestClient

from app.main import build_app
from app.preview.sent_form import save_form
from app.state import AppState, Bindings, take_snapshot
from app.templates import with_labels
from app.toolbox.view import keep_best_strength
from app.train import form
from app.train.form import (
    Plan,
    command_line,
    current_values,
    group_fields,
    keep_changed_values,
)
from app.train.start import NO_IMAGES, NO_PROMPTS, details, start_problems, take_settings
from app.train.train_form import (
    FOLDED,
    TrainForm,
    _changed,
    _field_id,
    _group_note,
    _rates_note,
    choose_optimizer,
    search_settings,
)
from app.train.view import do_run_action
from lora_core.model_files.starting_settings import LoraSettings
from lora_core.projects.project import Project


def hits(words: str) -> list[str]:
    """The settings that a search leaves to be seen."""
    style, *folds = search_settings(words)
    hidden = re.findall(r"#([\w-]+)", style)
    shown = [name for group in FOLDED for name in group_fields(group) if _field_id(name) not in hidden]
    unfolded = {group for group, fold in zip(FOLDED, folds, strict=True) if fold["open"]}
    assert not words.strip() or unfolded == {g for g in FOLDED if set(group_fields(g)) & set(shown)}
    return shown


def test_a_search_finds_by_name_title_and_help() -> None:
    assert hits("warm") == ["optimizer.warmup"]
    assert "train.clip_skip" in hits("clip skip")
    assert "optimizer.max_grad_norm" not in hits("clip skip")
    assert hits("hang et al. 2023") == ["loss.min_snr"]
    assert "optimizer.text_encoder_lr" in hits("TEXT encoder")


def test_a_search_for_nothing_folds_all_and_hides_none() -> None:
    assert len(hits(" ")) == sum(len(group_fields(group)) for group in FOLDED)
    assert not any(fold["open"] for fold in search_settings("")[1:])


def test_a_search_without_a_match_says_so_as_text() -> None:
    note = search_settings("<img src=x>")[0]
    assert "No setting is called" in note
    assert "<img" not in note


def changed(values: dict[str, object], **changes: object) -> dict[str, object]:
    return values | {name.replace("__", "."): value for name, value in changes.items()}


def test_two_pages_do_not_undo_each_other(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    first = second = current_values(project)
    now = changed(first, train__steps=900)
    keep_changed_values(project, first, now)
    keep_changed_values(project, second, changed(second, adapter__rank=4))
    plan = Plan(project)
    assert (plan.config.train.steps, plan.config.adapter.rank) == (900, 4)
    # What the first page types next counts again, and it takes its own change back.
    keep_changed_values(project, now, changed(now, train__steps=first["train.steps"]))
    plan = Plan(project)
    assert (plan.config.train.steps, plan.config.adapter.rank) == (first["train.steps"], 4)


def test_two_events_at_once_do_not_undo_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a list says twice that another optimizer was chosen, each time with all fields."""
    project = Project(tmp_path / "project")
    seen = current_values(project)
    read, written = threading.Event(), threading.Event()

    def slow_values(project: Project) -> dict[str, object]:
        values = current_values(project)
        read.set()
        written.wait(0.3)
        return values

    monkeypatch.setattr(form, "current_values", slow_values)
    typed = changed(seen, optimizer__name="lion")
    thread = threading.Thread(target=keep_changed_values, args=(project, seen, typed))
    thread.start()
    read.wait()
    with project.editing():
        project.update_draft(values=current_values(project) | {"train.steps": 77})
    written.set()
    thread.join()
    config = Plan(project).config
    assert (config.optimizer.name, config.train.steps) == ("lion", 77)


def keep_best(project: Project, file: str) -> None:
    keep_best_strength(project, file, 0.8)


def take_like(project: Project, **values: object) -> None:
    named = {name.replace("__", "."): value for name, value in values.items()}
    take_settings(project, LoraSettings(values=named), "x.toml")


@pytest.mark.parametrize(
    ("acts", "held"),
    [
        (
            (lambda p: save_form(p, [], False), lambda p: save_form(p, [], True)),
            lambda p: p.draft()["preview_loras"]["rev"] == 2,
        ),
        (
            (lambda p: keep_best(p, "a"), lambda p: keep_best(p, "b")),
            lambda p: p.draft()["best_strengths"].keys() == {"a", "b"},
        ),
        (
            (lambda p: p.link(Path("/a")), lambda p: p.link(Path("/b"))),
            lambda p: p.linked_folders == [Path("/a"), Path("/b")],
        ),
        (
            (lambda p: take_like(p, train__steps=77), lambda p: take_like(p, adapter__rank=5)),
            lambda p: (Plan(p).config.train.steps, Plan(p).config.adapter.rank) == (77, 5),
        ),
    ],
    ids=["preview", "best", "linked", "taken"],
)
def test_what_another_request_writes_meanwhile_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    acts: tuple[Callable[[Project], object], Callable[[Project], object]],
    held: Callable[[Project], bool],
) -> None:
    """The second begins as soon as the first has read the draft."""
    project, read = Project(tmp_path / "project"), Project.draft
    second = threading.Thread(target=acts[1], args=(project,))

    def slow_read(self: Project) -> dict[str, object]:
        found = read(self)
        if second.ident is None:
            second.start()
            second.join(0.2)
        return found

    monkeypatch.setattr(Project, "draft", slow_read)
    acts[0](project)
    second.join()
    assert held(project)


def test_a_page_that_nothing_is_known_of_counts_whole(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    keep_changed_values(project, None, changed(current_values(project), train__steps=7))
    assert Plan(project).config.train.steps == 7


def test_a_full_disk_leaves_the_form_to_its_page(
    app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gr.Blocks():
        form = TrainForm(Bindings(app_state), details)
    sent = {form.seen: list(current_values(app_state.project).values())}
    sent |= {field: current_values(app_state.project)[name] for name, field in form.widgets.items()}
    sent[form.widgets["train.steps"]] = 7

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lora_core.projects.project.write_atomically", full)
        seen = form.keep(sent)
    # The window ends; the next one has what the page sends with its next event.
    form.project = Project(form.project.path)
    assert Plan(form.project).config.train.steps != 7
    assert form.keep({**sent, form.seen: seen}) == list(current_values(form.project).values())
    assert Plan(form.project).config.train.steps == 7


def test_a_group_offers_its_own_way_back(app_state: AppState) -> None:
    assert "Reset" not in _group_note("Learning", take_snapshot(app_state))
    app_state.project.update_draft(values={"optimizer.warmup": 0.5, "adapter.rank": 3})
    snapshot = take_snapshot(app_state)
    note = _group_note("Learning", snapshot)
    assert "1 changed from preset" in note
    assert 'id="reset-learning"' in note
    assert 'id="reset-memory-and-speed"' not in _group_note("Memory and speed", snapshot)
    assert "2 changed from preset" in _changed(snapshot)
    assert "Warm-up" in _changed(snapshot)
    do_run_action(app_state, "reset", "Learning")
    config = Plan(app_state.project).config
    assert (config.optimizer.warmup, config.adapter.rank) == (snapshot.plan.preset.optimizer.warmup, 3)
    do_run_action(app_state, "reset", "all")
    assert Plan(app_state.project).config.adapter.rank == snapshot.plan.preset.adapter.rank


def test_choosing_an_optimizer_sets_its_usual_rate_and_can_be_undone(app_state: AppState) -> None:
    project = app_state.project

    def choose(name: str, **typed: object) -> tuple[float, float]:
        before = Plan(project)
        project.update_draft(values=current_values(project) | {"optimizer.name": name})
        choose_optimizer(project, before)
        return rates()

    def rates() -> tuple[float, float]:
        optim = Plan(project).config.optimizer
        return optim.lr, optim.text_encoder_lr

    start = rates()
    assert choose("lion") == (pytest.approx(0.3 * start[0]), pytest.approx(0.3 * start[1]))
    note = _rates_note(take_snapshot(app_state))
    assert f"Back to {start[0]:g}" in note
    do_run_action(app_state, "rates", "")
    assert rates() == start
    assert f"Use {0.3 * start[0]:g}" in _rates_note(take_snapshot(app_state))
    do_run_action(app_state, "rates", "")
    assert choose("prodigy") == (1.0, 1.0 if start[1] else 0.0)
    assert choose("adamw") == start
    # A rate that was typed stays, and the usual one is offered.
    project.update_draft(values=current_values(project) | {"optimizer.lr": 7e-4})
    assert choose("came")[0] == 7e-4
    assert f"Use {0.3 * start[0]:g}" in _rates_note(take_snapshot(app_state))
    assert choose("adamw")[0] == 7e-4
    assert choose("not an optimizer")[0] == 7e-4


def test_problems_call_settings_as_the_form_does() -> None:
    assert (
        with_labels("raise train.max_token_length, not optimizer.text_encoder_2_lr.")
        == "raise Caption tokens, not Second text encoder rate."
    )


def test_an_older_draft_names_what_is_no_longer_used_until_it_is_changed(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.update_draft(values={"dataset.repeats": 10, "adapter.kind": "lora", "loss.min_snr": 5.0})
    plan = Plan(project)
    assert [note.split(":")[0] for note in plan.notes] == ["dataset.repeats = 10 cannot be used"]
    assert (plan.problems, plan.config.loss.min_snr) == ([], 5.0)
    keep_changed_values(project, None, current_values(project))
    assert Plan(project).notes == []


def test_a_slider_needs_two_prompts_and_no_images(app_state: AppState) -> None:
    """The goal Slider asks for prompts in place of images; they make the run, which the command repeats."""
    app_state.project.update_draft(goal="slider", level="quick", trigger="zwx")
    assert start_problems(take_snapshot(app_state)) == [NO_PROMPTS]
    seen = current_values(app_state.project)
    words = {
        "slider__positive": "very old",
        "slider__negative": "very young",
        "slider__target": "a man\na dog",
    }
    keep_changed_values(app_state.project, seen, changed(seen, **words))
    snapshot = take_snapshot(app_state)
    plan = snapshot.plan
    assert start_problems(snapshot) == []
    assert plan.config.slider.target == ["a man", "a dog"]
    assert (plan.config.train.steps, plan.config.dataset.trigger) == (300, "")
    assert "from prompts alone in 300 steps" in details(snapshot)
    line = command_line(plan.config, plan.goal, plan.level)
    assert line.startswith("lora-easel train --preset slider-quick --set ")
    assert """--set 'slider.target=["a man", "a dog"]'""" in line
    app_state.project.update_draft(goal="style", values={})
    assert start_problems(take_snapshot(app_state)) == [NO_IMAGES]


def test_a_number_beyond_64_bits_is_out_of_range(app_state: AppState) -> None:
    with TestClient(build_app(app_state, ["testserver"])) as page:
        config = page.get("/config").json()
        steps = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "steps")
        events = (event for event in config["dependencies"] if steps in [one for one, _ in event["targets"]])
        event = next(events)
        values = {one["id"]: one["props"].get("value") for one in config["components"]} | {steps: 1e29}
        data = [values.get(own) for own in event["inputs"]]
        sent = {"data": data, "fn_index": event["id"], "session_hash": "page"}
        (kept,) = page.post("/gradio_api/run/predict", json=sent).json()["data"]
    assert 2**63 - 1 in kept
    assert "Steps = 9223372036854775807 is out of range" in Plan(app_state.project).invalid["train.steps"]
