"""Each state of the Train tab as HTML: what it says, what can be pressed, and why not."""

import html as markup
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app import top_bar
from app.export.view import checkpoint_cards, export_buttons
from app.state import AppState, Snapshot, take_snapshot
from app.templates import UNKNOWN
from app.train import run_cards
from app.train.run_cards import compare_card, earlier, queue_card, running, samples_card, select_rounds
from app.train.start import blockers, details, facts, notes, start_problems
from app.train.view import do_run_action
from lora_core.model_files.families import FAMILIES
from lora_core.runs import events
from lora_core.runs.diagnosis import LESS_MEMORY
from lora_core.runs.folder import RunFolder
from lora_core.system.hardware import Card
from tests.app.runs import HOSTILE, come_alive, make_run, started, step
from tests.waiting import PATIENCE

SEE = 'id="see-result"'


def card(app_state: AppState) -> str:
    return run_cards.run_card(take_snapshot(app_state))


def disabled(html: str, name: str) -> str:
    """The tip of a button that cannot be pressed; fails where it can."""
    tag = html[html.rindex("<button", 0, html.index(f'id="{name}"')) :].split(">")[0]
    assert tag.endswith(" disabled"), f"{name} can be pressed"
    return tag.split('title="')[1].split('"')[0]


def enabled(html: str, name: str) -> bool:
    tag = html[html.rindex("<button", 0, html.index(f'id="{name}"')) :].split(">")[0]
    return not tag.endswith(" disabled")


def checkpoint(run: RunFolder, number: int) -> None:
    """A checkpoint that looks whole to whoever reads headers."""
    folder = run.checkpoint(number)
    folder.mkdir(parents=True)
    header_bytes = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = len(header_bytes).to_bytes(8, "little") + header_bytes + b"\0\0\0\0"
    (folder / "adapter.safetensors").write_bytes(data)
    (folder / "state.json").write_text(json.dumps({"sha256": {"adapter.safetensors": ""}}))


def test_no_run_yet(app_state: AppState) -> None:
    html = card(app_state)
    assert 'data-state="none"' in html
    assert "Press Start" in html
    assert "<button" not in html
    assert top_bar.run_actions(take_snapshot(app_state)) == ""


def test_no_pictures_says_where_to_put_some(app_state: AppState) -> None:
    snapshot = take_snapshot(app_state)
    assert "drop some on the Dataset tab" in start_problems(snapshot)[0]
    assert 'id="start-why"' in facts(snapshot)


def test_preparing_is_a_phase_with_a_number(app_state: AppState) -> None:
    come_alive(
        make_run(app_state, "a", started(), events.Preparing(phase="Encoding images", done=3, total=12))
    )
    html = card(app_state)
    assert "Encoding images, 25%." in html
    assert "3 of 12" in html
    assert "still preparing" in disabled(html, "sample-now")
    snapshot = take_snapshot(app_state)
    # Its phases begin anew, so they do not move the bar of the steps, which would fall back.
    assert 'aria-valuenow="0"' in top_bar.run_bar(snapshot)
    assert "track preparing" in top_bar.run_bar(snapshot)
    assert enabled(top_bar.run_actions(snapshot), "pause")
    assert top_bar.page_title(snapshot) == "Preparing · a"


def test_stages_and_phases_only_grow(app_state: AppState) -> None:
    run = make_run(app_state, "a", started())
    come_alive(run)
    seen: list[list[int]] = []
    counts: list[str] = []
    lines = [
        events.Preparing(phase="Opening the base model", done=0, total=1),
        events.Preparing(phase="Encoding images", done=3, total=12),
        # Memory ran out: the base is opened again.
        events.Preparing(phase="Opening the base model", done=0, total=1),
        events.Preparing(phase="Encoding images", done=0, total=12),
        events.Preparing(phase="Encoding images", done=12, total=12),
        events.Working(step=0, phase="Sampling", done=15, total=20),
        # The next of several images, as earlier versions counted them.
        events.Working(step=0, phase="Sampling", done=2, total=20),
        step(1),
        step(2),
        events.Working(step=2, phase="Validating", done=9, total=10),
        step(3),
    ]
    for line in lines:
        with open(run.events_file, "a", encoding="utf-8") as file:
            file.write(events.to_line(line))
        found = run_cards.stages(take_snapshot(app_state).shown)
        counts.append(found[1]["note"])
        seen.append([stage["percent"] for stage in found])
    # What is counted begins anew no more than its bar.
    assert counts[1:5] == ["3 of 12", "", "3 of 12", "12 of 12"]
    for before, after in itertools.pairwise(seen):
        assert all(one <= other for one, other in zip(before, after, strict=True)), (before, after)
    assert seen[-1] == [100, 100, 100, 3]


def test_a_request_outranks_what_is_older_than_it(app_state: AppState) -> None:
    run = make_run(app_state, "a", started(), step(5))
    come_alive(run)
    asked = run.request("stop")
    # Acted on, but the process saves and exports before it says that it has ended.
    with open(run.events_file, "a", encoding="utf-8") as file:
        file.write(events.to_line(events.Handled(step=6, request=asked)))
        file.write(events.to_line(step(6)))
    assert take_snapshot(app_state).shown.state == "stopping"
    with open(run.events_file, "a", encoding="utf-8") as file:
        file.write(events.to_line(events.Stopped(step=6, export="")))
    assert take_snapshot(app_state).shown.state == "stopping"
    run.process_file.unlink()
    assert take_snapshot(app_state).shown.state == "stopped"
    # Of a new process nothing is known yet, though the folder is claimed.
    app_state.jobs.trainer = (sys.executable, "-c", "import time; time.sleep(600)")
    app_state.jobs.resume("a")
    come_alive(run)
    assert take_snapshot(app_state).shown.state == "preparing"
    child = app_state.jobs.run_view(run).child
    assert child is not None
    child.kill()


def test_running(app_state: AppState) -> None:
    come_alive(make_run(app_state, "my-dog", started(), *(step(n, 10.0 + n) for n in range(1, 35))))
    snapshot = take_snapshot(app_state)
    html = run_cards.run_card(snapshot)
    assert all(enabled(html, name) for name in ("sample-now", "save-now"))
    # 66 steps are left, from one to the next a second went by, of which a step takes half, and validations
    # may take a twentieth of the time.
    assert "1:09" in html
    assert "2.0\N{NO-BREAK SPACE}it/s" in html
    assert "This run uses" in top_bar.memory_usage(snapshot)
    assert top_bar.page_title(snapshot) == "34% · my-dog"
    assert enabled(top_bar.run_actions(snapshot), "pause")


def test_work_between_steps_is_named(app_state: AppState) -> None:
    come_alive(
        make_run(
            app_state,
            "a",
            started(),
            step(5),
            events.Working(phase="Drawing samples", done=1, total=2, step=5),
        )
    )
    assert "Drawing samples, 50%." in card(app_state)


@pytest.mark.parametrize(("do", "state"), [("pause", "pausing"), ("stop", "stopping")])
def test_what_was_asked_for_shows_at_once(app_state: AppState, do: str, state: str) -> None:
    run = make_run(app_state, "a", started(), step(5))
    come_alive(run)
    run.request(do)
    html = card(app_state)
    assert f'data-state="{state}"' in html
    assert "current step" in html
    assert f"is {state}" in disabled(html, "sample-now")
    header = top_bar.run_actions(take_snapshot(app_state))
    assert f"is {state}" in disabled(header, "pause")
    assert f"is {state}" in disabled(header, "stop")


def test_paused_goes_on(app_state: AppState) -> None:
    checkpoint(make_run(app_state, "a", started(), step(40), events.Paused(step=40)), 40)
    html = card(app_state)
    # Once: it is the primary act of the foot.
    assert "Resume from step 40" not in html
    assert "Resume from step 40" in facts(take_snapshot(app_state))
    assert "same result" in html
    assert "data-hint" not in html


def test_a_full_disk_pauses_and_says_so(app_state: AppState) -> None:
    reason = (
        f"The checkpoint of step 40 needs 3 MB, and the drive {HOSTILE} has 1 MB free; make room and resume."
    )
    make_run(app_state, "a", started(), step(40), events.Paused(step=40, reason=reason))
    html = card(app_state)
    assert 'data-hint="paused"' in html
    assert 'role="alert"' in html
    assert "make room" in html
    assert "<img" not in html


def test_done_leads_on(app_state: AppState) -> None:
    make_run(app_state, "a", started(), step(100), events.Finished(step=100, export=""))
    html = card(app_state)
    assert SEE in html
    assert 'data-export-run="a"' in html
    assert top_bar.page_title(take_snapshot(app_state)) == "Done · a"
    assert 'id="resume"' not in top_bar.run_actions(take_snapshot(app_state))


def test_stopped_can_be_seen_and_gone_on_with(app_state: AppState) -> None:
    make_run(app_state, "a", started(), step(50), events.Stopped(step=50, export=""))
    html = card(app_state)
    assert SEE in html
    assert 'id="train-resume"' in html
    assert "Exported; you can resume." in html


def test_tensorboard_is_offered_where_there_is_something_to_see(app_state: AppState) -> None:
    run = make_run(app_state, "a", started(), step(5), events.Stopped(step=5, export="", reason=""))
    assert 'id="tensorboard"' not in card(app_state)
    run.tensorboard.mkdir()
    assert enabled(card(app_state), "tensorboard")


def test_a_run_that_ended_by_itself_says_why_and_may_go_on_anyway(app_state: AppState) -> None:
    why = "Nothing was gained on held-out images after step 300 <b>"
    make_run(app_state, "early", started(900), step(500), events.Stopped(step=500, export="", reason=why))
    card = run_cards.run_card(take_snapshot(app_state))
    assert 'data-hint="early"' in card
    assert "after step 300 &lt;b&gt;" in card
    assert "Stopped early" in card
    assert 'id="train-resume"' in card
    # The header does not offer what is advised against.
    assert top_bar.run_actions(take_snapshot(app_state)) == ""


def test_a_crash_says_why_and_from_where_it_goes_on(app_state: AppState) -> None:
    run = make_run(app_state, "a", started(1000), step(812), step(830))
    checkpoint(run, 812)
    run.log_file.write_text(f"step 830\n{HOSTILE}\n")
    html = card(app_state)
    assert 'data-state="interrupted"' in html
    assert 'role="alert"' in html
    assert "Resume from step 812" in facts(take_snapshot(app_state))
    assert "Nothing before step 812 is lost" in html
    assert "&lt;img" in html
    assert "<img" not in html
    assert "Resumes at step 812." in top_bar.run_actions(take_snapshot(app_state))


def test_a_rate_that_is_too_high_can_be_lowered_by_one_press(app_state: AppState) -> None:
    failed = events.Failed(step=18, reason=f"Training diverged at step 18 {HOSTILE}.", cause="diverged")
    make_run(app_state, "b", started(), step(18), failed, optimizer__lr=0.002)
    assert ">Retry with 0.0002</button>" in card(app_state)
    # A tenth of it would still be above what AdamW takes, so its usual rate is offered.
    make_run(app_state, "a", started(), step(18), failed, optimizer__lr=10.0)
    do_run_action(app_state, "show", "a")
    html = card(app_state)
    assert "The learning rate is too high" in html
    assert "<img" not in html
    assert ">Retry with 0.0001</button>" in html
    app_state.jobs.trainer = (sys.executable, "-c", "pass")
    do_run_action(app_state, "retry", "a")
    run_view = take_snapshot(app_state).shown.view
    assert run_view is not None
    assert run_view.run.name != "a"
    assert run_view.run.config().optimizer.lr == 0.0001
    assert run_view.child is not None
    run_view.child.wait(PATIENCE)


def test_out_of_memory_names_the_two_settings(app_state: AppState) -> None:
    make_run(
        app_state,
        "a",
        started(),
        step(3),
        events.Failed(step=3, reason=f"Memory ran out at step 3; {LESS_MEMORY}.", cause="out_of_memory"),
        train__batch_size=6,
        train__resolution=768,
    )
    html = card(app_state)
    assert 'data-hint="memory"' in html
    assert "lower Batch size or Resolution, or set Gradient checkpointing." in html
    assert "<b>Batch size</b> (Memory and speed; it was 6)" in html
    assert "<b>Resolution</b> (it was 768 px)" in html


def test_another_failure_says_nothing_of_memory(app_state: AppState) -> None:
    make_run(app_state, "a", started(), step(3), events.Failed(step=3, reason="The image a.png is gone."))
    assert "data-hint" not in card(app_state)


def test_warnings_are_shown_as_text(app_state: AppState) -> None:
    come_alive(
        make_run(app_state, "a", started(), step(3), events.Warned(step=3, message=f"{HOSTILE} lr halved"))
    )
    html = card(app_state)
    assert "lr halved" in html
    assert "<img" not in html


def without_card(app_state: AppState) -> Snapshot:
    app_state.hardware.known = True
    return take_snapshot(app_state)


def test_without_a_card_it_says_that_it_takes_hours(
    app_state: AppState, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.app.bases import checkpoint as base_file

    monkeypatch.setattr(app_state.hardware, "look", lambda: None)
    assert not any("No GPU" in text for text in notes(without_card(app_state)))
    base = base_file(tmp_path / "base.safetensors", "sd15")
    app_state.project.update_draft(values={"model.base": str(base)})
    assert "No GPU found" in notes(without_card(app_state))[0]
    app_state.hardware._cards = [Card("RTX 3060", 2**30, 8 * 2**30)]
    assert not any("No GPU" in text for text in notes(without_card(app_state)))
    assert "of 8 GB on the GPU" in facts(take_snapshot(app_state))
    assert "GPU 1.0 of 8 GB" in top_bar.memory_usage(take_snapshot(app_state))
    # PyTorch was installed for a processor, or the driver is too old.
    app_state.worker.found = {"device": "cpu", "torch": "2.13.0+cpu", "build": "CPU", "lacks_code": ""}
    said = notes(take_snapshot(app_state))[0]
    assert said.startswith(
        "There is an RTX 3060, but this PyTorch (2.13.0+cpu, built for CPU) cannot use it: it is"
    )
    assert "Run `python launch.py repair`" in said
    assert not app_state.hardware.has_gpu
    app_state.project.update_draft(values={"model.base": str(base), "train.device": "cpu"})
    assert not any("cannot use it" in text for text in notes(take_snapshot(app_state)))
    app_state.project.update_draft(values={"model.base": str(base)})
    app_state.worker.found["device"] = "cuda"
    assert not any("cannot use it" in text for text in notes(take_snapshot(app_state)))


def test_what_a_run_does_to_fit_the_chosen_card_is_said(
    app_state: AppState, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.app.bases import checkpoint as base_file

    monkeypatch.setattr(app_state.hardware, "look", lambda: None)
    app_state.hardware.known = True
    app_state.hardware._cards = [
        Card("RTX 3060", 2**30, 8 * 2**30, 8.6, device="cuda:0"),
        Card("RTX 3090", 2**30, 24 * 2**30, 8.6, device="cuda:1"),
    ]
    base = base_file(tmp_path / "base.safetensors", "sdxl", 6_900_000_000)
    for device, total, words in (("auto", 24, ""), ("cuda:0", 8, "Gradient checkpointing is on")):
        app_state.project.update_draft(
            values={**FAMILIES["sdxl"].settings, "model.base": str(base), "train.device": device}
        )
        snapshot = take_snapshot(app_state)
        assert f"of {total} GB on the GPU" in facts(snapshot)
        assert f"GPU 1.0 of {total} GB" in top_bar.memory_usage(snapshot)
        said = markup.unescape(details(snapshot))
        assert ("As set, it would take about" in said) == bool(words)
        assert words in said
        assert not any("alone take about" in note for note in notes(snapshot))
    app_state.hardware._cards[0] = Card("GTX 1050", 2**30, 3 * 2**30, 8.6, device="cuda:0")
    ways = "close other programs", "set the learning rates of the text encoders to 0"
    for rate, first in zip((0.0, 1e-4), ways, strict=True):
        app_state.project.update_draft(
            values={"model.base": str(base), "train.device": "cuda:0", "optimizer.text_encoder_lr": rate}
        )
        said = markup.unescape(details(take_snapshot(app_state)))
        assert f"Even so it may not fit: {first}" in said


def test_a_run_in_the_way_leaves_the_queue(app_state: AppState, pictures: list[Path]) -> None:
    come_alive(make_run(app_state, "a", started(), step(5)))
    snapshot = take_snapshot(app_state)
    assert "add this one to the queue" in blockers(snapshot)[0]
    assert start_problems(snapshot) == []


def test_samples_run_from_the_base_to_the_newest(app_state: AppState) -> None:
    rounds = [
        events.PreviewDone(step=n, files=[f"previews/{n}.png"], prompts=[f"a dog {HOSTILE}"])
        for n in (0, 10, 20, 30)
    ]
    make_run(app_state, "a", started(), *rounds)
    html = samples_card(take_snapshot(app_state))
    steps = [part.split("<")[0] for part in html.split('<figcaption class="small num">')[1:]]
    assert steps == ["step 0, the base", "step 10", "step 20", "step 30"]
    assert "<img src=x" not in html
    assert "data-large" in html
    many = [events.PreviewDone(step=n, files=[], prompts=[]) for n in range(120)]
    chosen = [one.step for one in select_rounds(many)]
    assert (chosen[0], chosen[-1], len(chosen)) == (0, 119, 60)
    assert {after - before for before, after in itertools.pairwise(chosen)} == {2, 3}


def test_samples_of_the_raw_adapter_have_a_row_of_their_own(app_state: AppState) -> None:
    rounds = [
        events.PreviewDone(step=n, files=[f"previews/{n}.png"], prompts=["a dog"], raw_files=raw)
        for n, raw in ((0, []), (10, ["previews/10-raw.png"]))
    ]
    make_run(app_state, "a", started(), *rounds)
    strips = samples_card(take_snapshot(app_state)).split('<p class="small prompt"')[1:]
    assert ["10.png" in strip for strip in strips] == [True, False]
    assert ["10-raw.png" in strip for strip in strips] == [False, True]
    assert "a dog, raw adapter" in strips[1]


def test_earlier_runs_say_what_is_left_of_them(app_state: AppState) -> None:
    gain = events.Validated(
        step=50, gain=0.0312, standard_error=0.001, base_loss=0.2, adapted_loss=0.17, best=True
    )
    make_run(app_state, "old", started(), step(50), gain, step(100), events.Finished(step=100, export=""))
    checkpoint(make_run(app_state, "new", started(), step(12)), 10)
    app_state.jobs.show("new")
    html = earlier(take_snapshot(app_state))
    assert all(words in html for words in ("100 of 100 steps", "best 50, 16%"))
    assert "kB" in html
    # Its curve goes from the base's gain of 0 at the bottom to the middle of its steps.
    assert 'points="0.0,19.0 24.0,1.0"' in html
    new = card(app_state)
    assert "Resume from step 10" in facts(take_snapshot(app_state))
    app_state.jobs.show("old")
    old = card(app_state)
    # A report can be made of what has a checkpoint, and opened where there is one.
    assert ["data-report-run" in shown for shown in (old, new)] == [False, True]
    (app_state.workspace / "runs" / "old" / "report.html").write_text("<p>told</p>")
    assert '<a class="own quiet" href="/easel/report/of/old"' in card(app_state)
    come_alive(RunFolder(app_state.workspace / "runs" / "new"))
    app_state.jobs.show("old")
    snapshot = take_snapshot(app_state)
    assert (snapshot.shown.name, snapshot.active.name) == ("old", "new")
    assert "Viewed while new trains." in run_cards.run_card(snapshot)
    assert 'data-run-name="new"' in top_bar.run_bar(snapshot)
    assert enabled(top_bar.run_actions(snapshot), "pause")
    assert 'href="#run/new"' in running(snapshot)
    assert 'data-run="new"' not in earlier(snapshot)


def test_an_ended_run_says_what_it_came_to_and_what_a_report_measured(
    app_state: AppState, say: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gain = events.Validated(
        step=50, gain=0.02, standard_error=0.001, base_loss=0.2, adapted_loss=0.18, best=True
    )
    rounds = [events.PreviewDone(step=n, files=[f"previews/{n}.png"], prompts=["a dog"]) for n in (0, 40, 80)]
    run = make_run(app_state, "a", started(), step(50), gain, *rounds)
    assert "end-card" not in card(app_state)
    with run.events_file.open("a") as file:
        file.write(events.to_line(events.Finished(step=100, export="")))
    checkpoint(run, 50)
    html = card(app_state)
    assert re.search(r"<h3>Best step 50\s*</h3>", html)
    assert "10% improvement" in html
    assert re.findall(r"thumb/run/\S*previews/(\d+)\.png", html) == ["0", "40"]
    # Both open in the lightbox, where Space shows the base.
    assert re.findall(r'data-flip="\S*previews/(\d+)\.png', html) == ["0"]
    assert 'data-report-run="a" data-report-measure=""' in html
    assert 'data-export-run="a" data-size=""' in html
    found = {"step": 50, "strength": 0.931, "rank": 2, "kept": 0.996, "times_smaller": 4.04}
    run.analysis_file.write_text(json.dumps(found))
    html = card(app_state)
    assert "Best step 50, strength 0.93, rank 2 is enough" in html
    assert "a file 4.0 times smaller keeps 99.6% of it" in html
    assert "data-report-measure" not in html
    assert 'data-export-run="a" data-size="measured"' in html
    assert "as trained" in checkpoint_cards(take_snapshot(app_state))
    say("export/choose", run="a", checkpoint="best", size="measured")
    html = checkpoint_cards(take_snapshot(app_state))
    told = "rank 2, 4.0 times smaller, keeps 99.6% of the improvement"
    assert f'<option value="measured" selected>{told}' in html
    (run.checkpoint(50) / "adapter.safetensors").write_bytes(bytes(4_040_000))
    run.analysis_file.touch()
    snapshot = take_snapshot(app_state)
    with monkeypatch.context() as patch:
        # They may be many, and each look of the window would wait for them.
        patch.setattr(RunFolder, "progress", lambda run: pytest.fail("all events are read again"))
        assert 'data-size="1.0 MB"' in export_buttons(snapshot)
        assert '<option value="measured" selected>' in checkpoint_cards(snapshot)
    # With `adapter.auto_rank` the file is cut in either case.
    with run.events_file.open("a") as file:
        file.write(events.to_line(events.RanksChosen(sentence="", trained=8, rank=4, parameters=0.5)))
    say("export/choose", run="a", checkpoint="")
    snapshot = take_snapshot(app_state)
    assert 'data-size="2.0 MB"' in export_buttons(snapshot)
    assert '<option value="">Auto rank<' in checkpoint_cards(snapshot)
    # A rank that saves nothing is not offered.
    run.analysis_file.write_text(json.dumps(found | {"times_smaller": 1.1}))
    assert "is enough" not in card(app_state)
    assert "export-size" not in checkpoint_cards(take_snapshot(app_state))


def test_the_queue_shows_its_order_and_why_not(app_state: AppState) -> None:
    assert queue_card(take_snapshot(app_state)) == ""
    for name in ("one", "two"):
        app_state.queue.add(make_run(app_state, name))
    html = queue_card(take_snapshot(app_state))
    assert html.index('data-job="one"') < html.index('data-job="two"')
    assert "It is the first already." in html
    assert "It is the last already." in html
    assert "Start the queue" in html
    assert "The queue is paused." in html
    # Runs that only wait are no earlier runs, and those that are trained wait no more.
    assert earlier(take_snapshot(app_state)) == ""
    come_alive(RunFolder(app_state.workspace / "runs" / "one"))
    html = queue_card(take_snapshot(app_state))
    assert ('data-job="one"' in html, 'data-job="two"' in html) == (False, True)
    assert "one" in running(take_snapshot(app_state))
    app_state.queue.file.write_bytes(b"broken" * 500)
    assert "cannot be read" in queue_card(take_snapshot(app_state))


def test_two_runs_are_compared(app_state: AppState) -> None:
    def rounds(*steps: int) -> list[events.Event]:
        return [events.PreviewDone(step=n, files=[f"previews/{n}.png"], prompts=["a dog"]) for n in steps]

    gain = events.Validated(
        step=50, gain=0.02, standard_error=0.001, base_loss=0.2, adapted_loss=0.18, best=True
    )
    make_run(app_state, "a", started(), step(50), gain, *rounds(0, 40, 80), adapter__rank=4)
    make_run(app_state, "b", started(), step(20), *rounds(0, 30), adapter__rank=16, train__batch_size=3)
    app_state.jobs.show("a")
    assert compare_card(take_snapshot(app_state)) == ""
    assert 'href="#run/a+b"' in earlier(take_snapshot(app_state))
    app_state.jobs.show("a+b")
    snapshot = take_snapshot(app_state)
    html = compare_card(snapshot)
    assert 'data-shown-run="a+b"' in run_cards.run_card(snapshot)
    rows = [re.sub(r"<[^>]+>", "|", row) for row in html.split("<tr>")]
    told = {(cells := [one for one in row.split("|") if one.strip()])[0]: cells[1:3] for row in rows}
    assert told["Rank (size)"] == ["4", "16"]
    assert told["Batch size"] == ["1", "3"]
    assert told["Improvement"] == ["10% (+0.0200 ± 0.0010)", UNKNOWN]
    assert "Learning rate" not in told
    # Samples of the steps nearest to each other.
    assert re.findall("previews/([0-9]+).png", html)[::2] == ["40", "30"]
    assert 'href="#run/a"' in earlier(snapshot)
    app_state.jobs.show("b+b")
    assert compare_card(take_snapshot(app_state)) == ""
    # Where the run shown is deleted, another one takes its place, alone.
    app_state.jobs.show("a+b")
    app_state.jobs.delete("a")
    assert take_snapshot(app_state).shown.name == "b"
    assert compare_card(take_snapshot(app_state)) == ""
