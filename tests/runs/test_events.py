"""The lines of events.jsonl: what a reader sees while the writer writes, or after it was killed."""

import dataclasses
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_core.runs import events
from lora_core.runs.events import (
    EventWriter,
    Progress,
    StepDone,
    Validated,
    Warned,
    best_of,
    from_line,
    read_events,
    smooth,
    to_line,
    verdict,
)
from lora_core.settings.config import RunConfig

SAMPLES = [
    events.Started(steps=10, pid=1, device="cpu", threads=2, versions={"torch": "2.8"}),
    events.Preparing(phase="Reading images", done=1, total=3),
    events.Working(phase="Drawing samples", done=1, total=3),
    events.RanksChosen(sentence="Less is enough.", trained=16, rank=4, parameters=0.3),
    events.RateFound(rate=2e-4, rates=[1e-4, 2e-4], shares=[0.1, 0.2]),
    StepDone(step=3, loss=0.25, lr=1e-4, seconds=0.5),
    events.Validated(step=3, gain=0.1, standard_error=0.01, base_loss=1.0, adapted_loss=0.9, best=True),
    events.PreviewDone(step=3, files=["previews/a.png"], prompts=["ein Baum bei Nacht, 木"]),
    events.CheckpointDone(step=3, path="checkpoints/step-000003"),
    Warned(message="a line\u2028in a line\x85and\nanother"),
    events.Paused(step=3),
    events.Stopped(step=3, export="export/a.safetensors"),
    events.Resumed(step=3, steps=10),
    events.Failed(reason="The disk is full."),
    events.Failed(reason="This has changed: the image é.png.", changed=["the picture é.png"]),
    events.Handled(request="abc"),
    events.Finished(step=10, export="export/a.safetensors"),
]


def step(number: int) -> StepDone:
    return StepDone(step=number, loss=1.0, lr=1e-4, seconds=0.1, time=0.0)


def test_there_is_a_sample_of_every_kind() -> None:
    assert {event.kind for event in SAMPLES} == set(events.KINDS)


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: event.kind)
def test_a_line_is_one_line_and_comes_back_the_same(event: events.Event) -> None:
    line = to_line(event)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert repr(from_line(line)) == repr(event)  # a NaN, which equals nothing, is told by its text


def test_all_kinds_survive_the_file(tmp_path: Path) -> None:
    """Line ends other than a newline (U+2028, U+0085) are text, not ends."""
    writer = EventWriter(tmp_path / "events.jsonl")
    for event in SAMPLES:
        writer.write(event)
    writer.close()
    assert repr(read_events(tmp_path / "events.jsonl")[0]) == repr(SAMPLES)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_has_no_events(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "events.jsonl")
    assert read_events(tmp_path / "events.jsonl") == ([], 0)


def test_a_failure_written_before_changes_were_listed_is_read() -> None:
    assert from_line('{"event": "Failed", "time": 0.0, "step": 3, "reason": "No."}') == events.Failed(
        time=0.0, step=3, reason="No."
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_the_file_and_nan_for_a_reader(value: float) -> None:
    line = to_line(StepDone(step=1, loss=value, lr=1e-4, seconds=0.1))
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    event = from_line(line)
    assert isinstance(event, StepDone)
    assert math.isnan(event.loss)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "null",
        "[]",
        '"StepDone"',
        "{}",
        '{"event": "Later", "step": 1}',
        '{"event": ["StepDone"]}',
        '{"event": "StepDone", "step": 1}',
        '{"event": "Paused", "unheard": 1}',
        '{"event": "Finished", "step": 1, "time": 1, "export": "/tmp/a.safetensors"}',
        '{"event": "CheckpointDone", "step": 1, "time": 1, "path": "checkpoints/../../a"}',
        "\ufffd\ufffd",
    ],
)
def test_what_is_not_known_is_passed_over(line: str) -> None:
    assert from_line(line) is None


def test_a_reader_goes_on_where_it_stopped_and_waits_for_the_newline(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path) == ([], 0)
    first, second = to_line(step(1)).encode(), to_line(step(2)).encode()
    path.write_bytes(first + second[:10])
    seen, offset = read_events(path)
    assert (seen, offset) == ([step(1)], len(first))
    assert read_events(path, offset) == ([], offset)
    path.write_bytes(first + second)
    assert read_events(path, offset) == ([step(2)], len(first) + len(second))


def test_a_half_letter_at_the_end_is_not_read_yet(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line = to_line(Warned(message="木", time=0.0)).encode()
    for cut in range(len(line)):
        path.write_bytes(line[:cut])
        assert read_events(path) == ([], 0)


def test_a_writer_ends_the_half_line_of_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(to_line(step(1)).encode() + b'{"event": "StepDone", "st')
    writer = EventWriter(path)
    writer.write(step(2))
    writer.close()
    assert read_events(path)[0] == [step(1), step(2)]
    assert path.read_bytes().count(b"\n") == 3


def test_a_whole_file_gets_no_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for number in (1, 2):
        writer = EventWriter(path)
        writer.write(step(number))
        writer.close()
    assert path.read_text().count("\n") == 2


def test_lines_that_cannot_be_written_are_lost_told_and_gone_on_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    writer = EventWriter(tmp_path / "events.jsonl", said.append)
    writer.write(events.Handled(step=1, request="a"))
    real = os.write

    def half(handle: int, data: bytes) -> int:
        real(handle, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        writer.write(events.Handled(step=2, request="b"))
        writer.write(events.Handled(step=3, request="c"))
    writer.write(events.Handled(step=4, request="d"))
    writer.close()
    assert len(said) == 1
    assert "No space left on device. The run continues." in said[0]
    found = read_events(tmp_path / "events.jsonl")[0]
    assert [event.kind for event in found] == ["Handled", "Warned", "Handled"]
    assert [event.step for event in found] == [1, 4, 4]
    assert isinstance(found[1], events.Warned)
    assert found[1].message.startswith(
        "2 lines about this run could not be written (No space left on device)"
    )


def test_a_line_that_goes_out_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:7]))
    writer = EventWriter(tmp_path / "events.jsonl")
    writer.write(events.Handled(step=1, request="a"))
    writer.close()
    assert [event.kind for event in read_events(tmp_path / "events.jsonl")[0]] == ["Handled"]


def test_a_folder_that_is_gone_is_no_reason_to_fail(tmp_path: Path) -> None:
    said: list[str] = []
    writer = EventWriter(tmp_path / "gone" / "events.jsonl", said.append)
    writer.write(events.Handled(step=1, request="a"))
    (tmp_path / "gone").mkdir()
    writer.write(events.Handled(step=2, request="b"))
    writer.close()
    assert len(said) == 1
    assert [event.step for event in read_events(tmp_path / "gone" / "events.jsonl")[0]] == [2, 2]


# Events folded into the state of a run.


def started(steps: int = 100) -> events.Started:
    return events.Started(steps=steps, pid=1, device="cpu", threads=2, versions={})


def done_step(number: int, loss: float = 1.0, seconds: float = 0.5) -> events.StepDone:
    return events.StepDone(step=number, loss=loss, lr=1e-4, seconds=seconds)


def validated(number: int, best: bool) -> events.Validated:
    return events.Validated(
        step=number, gain=0.1, standard_error=0.01, base_loss=1.0, adapted_loss=0.9, best=best
    )


def folded(*new: events.Event) -> Progress:
    progress = Progress()
    progress.update(new)
    return progress


def test_nothing_has_happened_yet() -> None:
    progress = folded()
    assert (progress.started, progress.step, progress.ending) == (False, 0, "")
    assert progress.smoothed_loss() is None
    assert progress.seconds_left() is None


def test_resumed_drops_what_came_after_its_step() -> None:
    samples = [events.PreviewDone(step=n, files=[f"{n}.png"], prompts=["a"]) for n in (0, 50, 80)]
    progress = folded(
        started(),
        samples[0],
        *(done_step(n) for n in range(1, 51)),
        validated(50, best=True),
        samples[1],
        *(done_step(n) for n in range(51, 81)),
        validated(80, best=True),
        samples[2],
        started(200),
        events.Resumed(step=50, steps=200),
    )
    assert (progress.step, progress.steps, progress.best_step) == (50, 200, 50)
    assert [e.step for e in progress.losses] == list(range(1, 51))
    assert [e.step for e in progress.validations] == [50]
    assert [e.step for e in progress.previews] == [0, 50]
    progress.update([done_step(51, loss=3.0)])
    assert [e.step for e in progress.losses][-2:] == [50, 51]


def test_resumed_from_nothing_forgets_all() -> None:
    progress = folded(started(), done_step(1), validated(1, best=True), events.Resumed(step=0, steps=100))
    assert (progress.step, progress.losses, progress.best_step) == (0, [], None)


def test_fed_piece_by_piece_is_the_same() -> None:
    story = [
        started(),
        done_step(1),
        done_step(2),
        events.Resumed(step=1, steps=9),
        done_step(2),
        events.Paused(step=2),
    ]
    whole, pieces = folded(*story), Progress()
    for event in story:
        pieces.update([event])
    assert whole == pieces


@pytest.mark.parametrize(
    ("event", "ending"),
    [
        (events.Paused(step=1), "paused"),
        (events.Stopped(step=1, export="export/a"), "stopped"),
        (events.Finished(step=1, export="export/a"), "done"),
        (events.Failed(reason="Out of memory."), "failed"),
    ],
)
def test_an_ending_is_taken_back_by_the_next_start(event: events.Event, ending: str) -> None:
    progress = folded(started(), done_step(1), event)
    assert progress.ending == ending
    progress.update([started()])
    assert (progress.ending, progress.reason, progress.stepping) == ("", "", False)


def test_a_finished_run_that_is_refused_more_steps_stays_finished() -> None:
    refused = events.Failed(reason="Since it began, this has changed.", changed=["the picture a.png"])
    progress = folded(started(), done_step(1), events.Finished(step=1, export="export/a"))
    goal = progress.steps
    progress.update([dataclasses.replace(started(), steps=99), refused])
    assert (progress.ending, progress.steps, progress.export) == ("done", goal, "export/a")
    progress.update([started(), events.Resumed(step=1, steps=99), refused])
    assert (progress.ending, progress.steps, progress.changed) == ("failed", 99, ["the picture a.png"])


def test_what_a_failure_asks_about_goes_with_it() -> None:
    progress = folded(
        started(), done_step(1), events.Failed(step=1, reason="No.", changed=["the picture a.png"])
    )
    assert progress.changed == ["the picture a.png"]
    progress.update([events.Failed(step=1, reason="Out of memory.")])
    assert progress.changed == []
    progress.update([events.Failed(step=1, reason="No.", changed=["config.toml"]), started()])
    assert progress.changed == []


def test_phases_come_and_go() -> None:
    progress = folded(started(), events.Preparing(phase="Reading images", done=2, total=5))
    assert (progress.stepping, progress.phase, progress.phase_total) == (False, "Reading images", 5)
    assert progress.phases == {"Reading images": 0.4}
    progress.update([done_step(1), events.Working(phase="Drawing samples", done=0, total=4)])
    assert (progress.stepping, progress.phase) == (True, "Drawing samples")
    progress.update([done_step(2)])
    assert progress.phase == ""


def test_requests_and_warnings_are_kept() -> None:
    progress = folded(events.Handled(request="a"), events.Warned(message="Slow."))
    assert progress.handled == {"a"}
    assert progress.warnings == ["Slow."]


def test_time_left_is_the_median_pace_times_the_steps_left() -> None:
    progress = folded(
        started(100), *(done_step(n, seconds=0.5) for n in range(1, 40)), done_step(40, seconds=60.0)
    )
    assert progress.seconds_a_step() == 0.5
    assert progress.seconds_left() == 30.0


def test_samples_and_validations_to_come_are_planned() -> None:
    """Steps of 1 s, samples every 20 that take 10 s, a validation every 50 that takes 15 s."""
    config = RunConfig().changed(
        {"sample.every": 20, "validation.every": 50, "validation.max_time_share": 0.0}
    )

    def at(number: int, time: float) -> events.StepDone:
        return events.StepDone(step=number, loss=1.0, lr=1e-4, seconds=1.0, time=time)

    progress = folded(
        events.Preparing(phase="Opening the base model", done=1, total=1, time=90.0),
        events.PreviewDone(files=[], prompts=[], time=100.0),
        *(at(number, 100.0 + number) for number in range(1, 11)),
    )
    progress.steps = 100
    assert progress.seconds_left(config) == pytest.approx(90 * 1 + 5 * 10)
    # Until one was made, validations are taken to need their share of the time.
    limited = config.changed({"validation.max_time_share": 0.1})
    assert progress.seconds_left(limited) == pytest.approx(90 * 1.1 + 5 * 10)
    progress.update([at(50, 150.0), replace(validated(50, True), time=165.0), at(51, 166.0)])
    assert progress.seconds_left(config) == pytest.approx(49 * 1 + 3 * 10 + 15)
    assert progress.seconds_left(limited) == pytest.approx(49 * 1.1 + 3 * 10)
    assert folded(started()).seconds_left(config) is None


def test_smoothing_starts_without_a_bias() -> None:
    """By hand, memory 1: decay e^-1; second value (e^-1 * 1 + 3) / (e^-1 + 1) = 2.4621..."""
    assert smooth([1.0, 3.0], memory=1.0) == pytest.approx([1.0, (math.exp(-1) + 3) / (math.exp(-1) + 1)])
    assert smooth([2.0] * 200) == pytest.approx([2.0] * 200)


def test_smoothing_passes_over_what_is_not_finite() -> None:
    curve = smooth([math.nan, 1.0, math.inf, 1.0])
    assert math.isnan(curve[0])
    assert curve[1:] == pytest.approx([1.0, 1.0, 1.0])


# The verdict on a run's validations; each number is set by hand to one side of its error bar.


def at(step: int, gain: float, best: bool = False, **more: Any) -> Validated:
    return Validated(
        **{"step": step, "gain": gain, "standard_error": 0.001, "base_loss": 0.2, "adapted_loss": 0.2 - gain}
        | {"best": best}
        | more
    )


FIRST = at(100, 0.010, True)
LATER = at(200, 0.014, True, against_best=0.004, against_best_error=0.001)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([], ""),
        ([at(100, math.nan)], ""),
        ([at(100, 0.0015, True)], "No significant gain up to step 100."),
        ([at(1100, -0.004, True)], "At step 1,100 it predicts held-out images worse than the base does."),
        ([FIRST], "It gains on held-out images: +0.0100."),
        ([FIRST, LATER], "Still gaining."),
        # Within its error of the best, though higher: the best one stays.
        (
            [FIRST, at(200, 0.0103, against_best=0.0003, against_best_error=0.001)],
            "No further gain since step 100.",
        ),
        (
            [FIRST, LATER, at(300, 0.012, against_best=-0.0022, against_best_error=0.001)],
            "No further gain since step 200.",
        ),
        (
            [FIRST, LATER, at(300, 0.011, against_best=-0.0023, against_best_error=0.001)],
            "It has become worse since step 200; the file of that step is better.",
        ),
        ([FIRST, at(200, 0.009, against_best=math.nan)], "No further gain since step 100."),
    ],
)
def test_gain(events: list[Validated], said: str) -> None:
    assert verdict(events) == said


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"train_gain": 0.02, "gauge": 0.006, "gauge_error": 0.004}, ""),  # 1.5 errors
        ({"train_gain": 0.05, "gauge": 0.010, "gauge_error": 0.001}, ""),  # a fifth of the gain
        (
            {"train_gain": 0.02, "gauge": 0.012, "gauge_error": 0.004},
            "Memorization: 60% of its gain on training images does not carry over to others.",
        ),
        (
            {"train_gain": 0.02, "gauge": 0.03, "gauge_error": 0.004},
            "Memorization: its gain on training images does not carry over to others at all.",
        ),
        ({"prior": -0.001, "prior_error": 0.0006}, ""),
        (
            {"prior": -0.001, "prior_error": 0.0004},
            "Forgetting: it gets slightly worse on the base's own images.",
        ),
        (
            {"prior": -0.007, "prior_error": 0.001},
            "Forgetting: it loses 50% as much on the base's own images as it gains on new ones.",
        ),
        (
            {"prior": -0.02, "prior_error": 0.001},
            "Forgetting: it loses more on the base's own images than it gains on new ones.",
        ),
        ({"prior": 0.01, "prior_error": 0.001}, ""),
    ],
)
def test_memorization_and_forgetting(numbers: dict[str, float], said: str) -> None:
    last = at(200, 0.014, True, against_best=0.004, against_best_error=0.001, **numbers)
    assert verdict([FIRST, last]) == f"Still gaining. {said}".strip()


def test_the_newest_that_was_called_best_is_the_best() -> None:
    # The gains alone would name step 300, whose difference is within its error.
    third = at(300, 0.0143, against_best=0.0003, against_best_error=0.001)
    assert best_of([FIRST, LATER, third]) is LATER
    assert best_of([at(100, 0.01)]) is None


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (-0.002, "The averaged adapter gains more than the raw one, by 0.0020 (standard error 0.0005)"),
        (0.002, "The raw adapter gains more than its average, by 0.0020 (standard error 0.0005)"),
        (0.0005, "gain the same within the error"),
    ],
)
def test_the_average_beside_the_raw_adapter(against: float, said: str) -> None:
    last = at(100, 0.01, True, raw_gain=0.01 + against, raw_against=against, raw_against_error=0.0005)
    assert said in verdict([last])
    assert "raw" not in verdict([at(100, 0.01, True)])
