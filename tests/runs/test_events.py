"""The lines of events.jsonl: what a reader sees while the writer writes, or after it was killed."""

import json
import math
import os
from pathlib import Path

import pytest

from lora_core.runs import events
from lora_core.runs.events import EventWriter, StepDone, Warned, from_line, read_events, to_line

SAMPLES = [
    events.Started(steps=10, pid=1, device="cpu", threads=2, versions={"torch": "2.8"}),
    events.Preparing(phase="Reading images", done=1, total=3),
    events.Working(phase="Drawing samples", done=1, total=3),
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
    assert from_line(line) == event


def test_all_kinds_survive_the_file(tmp_path: Path) -> None:
    """Line ends other than a newline (U+2028, U+0085) are text, not ends."""
    writer = EventWriter(tmp_path / "events.jsonl")
    for event in SAMPLES:
        writer.write(event)
    writer.close()
    assert read_events(tmp_path / "events.jsonl")[0] == SAMPLES


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
