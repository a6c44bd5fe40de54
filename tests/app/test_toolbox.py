"""The Toolbox and the report of a run, as the window has them: what is asked of the worker, what is shown,
what is given out."""

import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.export.view import report_card
from app.state import AppState, take_snapshot
from app.templates import render
from app.toolbox.view import (
    TOOLS,
    VERBS,
    build_worker_request,
    draw_form,
    free_path,
    result_html,
    written_html,
)
from lora_core.errors import AdapterFileError, ConfigError, ModelFileError
from lora_core.report.plots import content_policy, load_scripts
from tests.app.conftest import Say
from tests.app.runs import HOSTILE, come_alive, make_run, started, step
from tests.app.test_preview import run_with_file
from tests.waiting import wait_for

FAKE = """
import json, pathlib, sys
print(json.dumps({"event": "ready"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "cancel":
        continue
    say = lambda **more: print(json.dumps({"id": asked["id"], **more}), flush=True)
    say(event="progress", done=1, total=2, phase="Layers")
    if asked["do"] == "intrinsic":
        ranks = [{"part": "unet", "module": "a", "rank": 1}]
        found = {"rank": 1, "ranks": ranks, "tried": [], "sentences": ["Trained at rank 4, needs 1."]}
        say(event="done", intrinsic=found, pictures=2)
    elif asked["do"] == "strength":
        curve = [{"strength": s, "gain": s, "standard_error": 0.1} for s in (0.0, 1.0)]
        fit = {"part": "", "strength": 0.8, "low": 0.5, "high": 1.0, "gain": 0.2, "curve": curve}
        found = {"fits": [fit], "strengths": [0.8], "sentences": ["Best at 0.8."]}
        say(event="done", strength=found, pictures=2)
    elif asked["do"] == "report":
        out = pathlib.Path(asked["run"]) / "report.html"
        out.write_text("<p>told</p>")
        say(event="done", file=str(out), bytes=11)
    elif asked["do"] == "verify":
        say(event="done", report={}, problem=f"{asked['file']} says nothing; name its base with --base.")
    elif "out" in asked:
        pathlib.Path(asked["out"]).write_bytes(json.dumps(asked).encode())
        say(event="done", file=asked["out"], bytes=5, sentences=["Nothing is lost."])
    else:
        say(event="error", message=f"<b>{asked.get('file')} cannot be read.</b>")
"""


@pytest.fixture
def app_state(tmp_path: Path) -> Iterator[AppState]:
    workspace = tmp_path / "work space é"
    workspace.mkdir()
    made = AppState(workspace, worker_command=[sys.executable, "-c", FAKE])
    yield made
    made.close()


def ended(app_state: AppState, job: str = "toolbox") -> dict[str, Any]:
    def look() -> dict[str, Any]:
        now = dict(app_state.live.feeds[job]())
        return now if now["state"] != "working" else {}

    return wait_for(look)


def test_every_tool_says_what_it_tells_and_what_it_needs() -> None:
    page = render("toolbox/page.html", tools=TOOLS, verbs=VERBS)
    assert sorted(key for _line, keys in VERBS.values() for key in keys.split()) == sorted(TOOLS)
    for key, tool in TOOLS.items():
        assert f'data-tool="{key}"' in page
        assert tool.title in page
        assert tool.line.endswith(".")
    assert "Drop a LoRA file, or choose one" in page


def test_what_there_is_to_choose(app_state: AppState) -> None:
    _, file = run_with_file(app_state)
    parts = draw_form(app_state, {"tool": "intrinsic"})["parts"]
    assert f'<option value="{file}" selected>mine</option>' in parts["toolbox-files"]
    assert '<option value="mine" selected>what mine held out</option>' in parts["toolbox-fields"]
    assert '<option value="demo" selected>' in parts["toolbox-fields"]
    assert parts["toolbox-why"] == ""
    assert parts["toolbox-will"] == '<b>Intrinsic rank</b> <span class="small" dir="auto">mine</span>'
    sent = {"tool": "compare", "files": [{"file": "/typed", "strength": "2"}], "by": "energy"}
    parts = draw_form(app_state, sent)["parts"]
    assert 'value="/typed" placeholder' in parts["toolbox-files"]
    assert parts["toolbox-why"] == "Two files are needed: add another."


@pytest.mark.parametrize(
    ("tool", "sent", "problem"),
    [
        ("spectrum", {}, "Choose a file first"),
        ("compare", {"files": 1}, "Two files are needed: add another"),
        ("stack", {"files": 1}, "Two files or more are needed"),
        ("amplify", {"files": 1}, "Choose the base"),
        ("intrinsic", {"files": 1}, "Choose what to measure on"),
        ("intrinsic", {"files": 1, "measure": {"run": "none"}}, "no run named none"),
        ("strength", {"files": 1, "measure": {"dataset": "x"}}, "Choose the base"),
        ("shrink", {"files": 1, "rank": "many"}, "should be a number, not 'many'"),
        ("shrink", {"files": 1, "rank": "0"}, "integer of 1 or more"),
        ("shrink", {"files": 1, "by": "energy", "energy": "120"}, "0 to 100 percent, not 120"),
        ("merge", {"files": 2, "rank": "1.5"}, "integer"),
        ("merge", {"files": [{"file": "/none.safetensors"}]}, "no file at"),
        ("merge", {"files": 1, "strength": "much"}, "A strength should be a number"),
        ("extract", {}, "Give the path of the fine-tuned model"),
        ("plain", {"files": 1}, "The rank should be a number"),
        ("convert", {"files": 1, "format": "onnx"}, "Choose a format: kohya or diffusers"),
        ("into-base", {"files": 1}, "Choose the base"),
        ("into-base", {"files": 1, "base": "/none"}, "The base '/none' does not exist"),
        ("merge", {"files": 2, "blocks": "a=1," * 2000}, "longer than 4,000 letters"),
        ("fly", {}, "is not one of the tools"),
    ],
)
def test_what_is_missing_is_said(app_state: AppState, tool: str, sent: dict[str, Any], problem: str) -> None:
    _, file = run_with_file(app_state)
    if isinstance(sent.get("files"), int):
        sent = {**sent, "files": [{"file": str(file), "strength": sent.get("strength", 1)}] * sent["files"]}
    with pytest.raises((AdapterFileError, ConfigError, ModelFileError), match=problem):
        build_worker_request(app_state, tool, sent)


def test_requests_are_what_the_worker_knows(app_state: AppState) -> None:
    run, file = run_with_file(app_state)
    files = [{"file": f' "{file}" ', "strength": "0,5"}]
    asked = build_worker_request(
        app_state, "intrinsic", {"files": files, "measure": {"run": "mine"}, "rank": "3"}
    )
    assert asked == {"do": "intrinsic", "file": str(file), "measure": {"run": str(run.path)}}
    asked = build_worker_request(app_state, "shrink", {"files": files, "by": "energy", "energy": "99,5"})
    assert asked == {
        "do": "shrink", "file": str(file), "energy": 0.995,
        "out": str(run.exports / "mine-energy99.5.safetensors"),
    }  # fmt: skip
    asked = build_worker_request(app_state, "merge", {"files": [*files, *files], "rank": ""})
    assert asked["files"] == [{"file": str(file), "strength": 0.5}] * 2
    assert not asked.keys() & {"rank", "blocks", "base"}
    sent = {"files": files, "rank": "4", "base": "demo", "blocks": " mid_block=0.5 "}
    asked = build_worker_request(app_state, "merge", sent)
    assert (asked["rank"], asked["base"], asked["blocks"]) == (4, "demo", "mid_block=0.5")
    plain = build_worker_request(app_state, "plain", sent)
    assert (plain["do"], plain["files"], plain["rank"], plain["base"]) == ("merge", asked["files"], 4, "demo")
    assert Path(plain["out"]).name == "mine-plain4.safetensors"
    asked = build_worker_request(
        app_state, "convert", {"files": files, "format": "diffusers", "alphas": True}
    )
    assert asked == {
        "do": "convert", "file": str(file), "format": "diffusers", "keep_alphas": True,
        "out": str(run.exports / "mine-diffusers.safetensors"),
    }  # fmt: skip


def test_a_base_with_files_in_it_is_offered_as_a_base(
    app_state: AppState, client: TestClient, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = run_with_file(app_state)
    sent = {"files": [{"file": str(file), "strength": "0,8"}], "base": "demo", "blocks": "mid_block=0"}
    asked = build_worker_request(app_state, "into-base", sent)
    out = app_state.project.path / "bases" / "base-mine"
    assert (asked["do"], asked["out"], asked["blocks"]) == ("into-base", str(out), "mid_block=0")
    assert say("toolbox/start", tool="into-base", **sent) == {"done": True}
    shown = ended(app_state)["html"]
    assert "base-mine" in shown
    assert "/easel/made/" not in shown
    assert app_state.places.read("bases") == [str(out)]
    out.rename(out.with_name("base-mine-2"))
    monkeypatch.setattr("app.toolbox.view.free_bytes", lambda path: 1000)
    assert "A copy of the base takes" in say("toolbox/start", tool="into-base", **sent)["problem"]


def test_new_files_never_take_a_name_that_is_taken(app_state: AppState, tmp_path: Path) -> None:
    run, file = run_with_file(app_state)
    (run.exports / "mine-rank2.safetensors").touch()
    assert free_path(app_state, str(file), "rank2") == run.exports / "mine-rank2-2.safetensors"
    checkpoint = run.checkpoint(50) / "adapter.safetensors"
    assert free_path(app_state, str(checkpoint), "rank2").name == "mine-step-000050-rank2.safetensors"
    place = free_path(app_state, str(tmp_path / "../a:b?.safetensors"), "merged")
    assert place == app_state.project.path / "loras" / "a_b_-merged.safetensors"


def test_a_measurement_and_the_file_made_of_it(app_state: AppState, client: TestClient, say: Say) -> None:
    _, file = run_with_file(app_state)
    assert say("toolbox/act", do="shrink")["problem"].startswith("Measure first")
    body = {"files": [{"file": str(file)}], "measure": {"run": "mine"}}
    assert say("toolbox/start", tool="intrinsic", **body) == {"done": True}
    now = ended(app_state)
    assert "Trained at rank 4, needs 1." in now["html"]
    assert 'data-toolbox-act="shrink"' in now["html"]
    assert client.get("/easel/toolbox/numbers.json?tool=intrinsic").json()["intrinsic"]["rank"] == 1
    assert client.get("/easel/toolbox/numbers.json?tool=../x").json() == {}
    assert say("toolbox/act", do="shrink") == {"done": True}
    now = ended(app_state)
    assert "mine-rank1.safetensors" in now["html"]
    assert "needs 1" in now["html"]
    made = client.get("/easel/download/mine/mine-rank1.safetensors")
    assert json.loads(made.content)["ranks"] == [{"part": "unet", "module": "a", "rank": 1}]
    say("toolbox/start", tool="strength", **body)
    now = ended(app_state)
    assert now["name"] == "strength"
    assert "Bake 0.8 into the file" in now["html"]
    assert app_state.project.draft()["best_strengths"] == {str(file): 0.8}, "the Preview tab marks it"
    say("toolbox/act", do="bake")
    assert "mine-baked.safetensors" in ended(app_state)["html"]
    # The page still shows the result of the other tool, with its button and its link.
    assert "strength" not in client.get("/easel/toolbox/numbers.json?tool=intrinsic").json()
    assert say("toolbox/act", do="shrink") == {"done": True}
    now = ended(app_state)
    assert now["name"] == "intrinsic"
    assert "mine-rank1-2.safetensors" in now["html"]


def test_files_from_elsewhere_are_made_in_the_project(
    app_state: AppState, client: TestClient, say: Say, tmp_path: Path
) -> None:
    file = tmp_path / "found é.safetensors"
    file.write_bytes(b"x")
    say("toolbox/start", tool="shrink", files=[{"file": str(file)}], rank=2)
    html = ended(app_state)["html"]
    assert "/easel/made/found%20%C3%A9-rank2.safetensors" in html
    assert client.get("/easel/made/found%20%C3%A9-rank2.safetensors").status_code == 200
    for name in ("..%2F..%2Fproject.json", "none.safetensors", "..%2Fdraft.json"):
        assert client.get(f"/easel/made/{name}").status_code == 404


def test_a_form_that_no_page_sends_is_drawn_too(app_state: AppState) -> None:
    for files in ("x", [5], [{}], [{"file": "a\0b"}], [{"file": "x" * 5000}]):
        sent = {"tool": "check", "files": files, "part": "x", "rank": [1]}
        assert 'data-part="path"' in draw_form(app_state, sent)["parts"]["toolbox-files"]


def test_problems_of_the_worker_are_text(app_state: AppState, client: TestClient, say: Say) -> None:
    _, file = run_with_file(app_state)
    say("toolbox/start", tool="spectrum", files=[{"file": str(file)}])
    now = ended(app_state)
    assert now["state"] == "error"
    assert f"&lt;b&gt;{file} cannot be read." in now["html"]
    sent = client.post("/easel/toolbox/file?name=it.safetensors", content="x").json()["file"]
    say("toolbox/start", tool="spectrum", files=[{"file": sent}])
    assert "&lt;b&gt;it.safetensors cannot be read." in ended(app_state)["html"]
    say("toolbox/start", tool="check", files=[{"file": sent}])
    assert '<p class="small">it.safetensors says nothing.</p>' in ended(app_state)["html"]
    assert "dropped" not in client.get("/easel/toolbox/numbers.json?tool=check").text


def test_nothing_is_measured_while_a_run_needs_the_memory(
    app_state: AppState, client: TestClient, say: Say
) -> None:
    run = make_run(app_state, "live", started(), step(1))
    come_alive(run)
    _, file = run_with_file(app_state)
    body = {"files": [{"file": str(file)}], "measure": {"run": "mine"}}
    assert "A run is using the memory" in say("toolbox/start", tool="strength", **body)["problem"]
    assert "A run is using the memory" in say("report/start", run="mine", measure=True)["problem"]
    assert say("report/start", run="mine", measure=False) == {"done": True}
    ended(app_state, "report")


def test_training_goes_on_from_a_file(app_state: AppState, say: Say, tmp_path: Path) -> None:
    _, file = run_with_file(app_state)
    app_state.project.update_draft(values={"train.steps": 7})
    assert say("toolbox/go-on", file=str(file)) == {"done": True}
    assert app_state.project.draft()["values"] == {"train.steps": 7, "adapter.init": str(file)}
    assert "no file at" in say("toolbox/go-on", file=str(tmp_path / "gone"))["problem"]


def test_the_report_is_made_shown_and_downloaded(app_state: AppState, client: TestClient, say: Say) -> None:
    run = make_run(app_state, "mine é", started(), step(1))
    run.checkpoint(1).mkdir(parents=True)
    (run.checkpoint(1) / "adapter.safetensors").touch()
    assert "report-open" not in report_card(take_snapshot(app_state))
    assert client.get("/easel/report/of/mine é").status_code == 404
    assert client.post("/easel/report/start", json={"run": "../x"}).status_code == 404
    assert say("report/start", run="mine é", measure=False) == {"done": True}
    assert "is made" in ended(app_state, "report")["html"]
    page = client.get("/easel/report/of/mine é")
    assert page.text == "<p>told</p>"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    # Charts of a report that another version made are drawn too, though its scripts may not run.
    meta, old = (
        '<meta http-equiv="Content-Security-Policy" content="script-src {}">',
        "<script>other()</script>",
    )
    made = f"{meta.format('old')}<p>told</p></footer>"
    run.path.joinpath("report.html").write_text(f"{made}\n{old}\n</body>")
    shown = client.get("/easel/report/of/mine é").text
    assert "other()" not in shown
    assert [f"<script>{script}</script>" in shown for script in load_scripts()] == [True, True]
    assert html.unescape(shown).startswith(f'{meta[: meta.index("script-src")]}{content_policy()}"><p>told')
    assert old in client.get("/easel/report/of/mine é?download=1").text
    assert "attachment" in client.get("/easel/report/of/mine é?download=1").headers["content-disposition"]
    assert "report-open" in report_card(take_snapshot(app_state))
    assert run.path.joinpath("report.html").is_file()
    # Preview marks the strength that a report measured, and one without leaves the mark.
    run.analysis_file.write_text(json.dumps({"step": 1, "strength": 0.9}))
    file = str(run.checkpoint(1) / "adapter.safetensors")
    app_state.project.update_draft(best_strengths={file: 0.5})
    for measure, strength in ((False, 0.5), (True, 0.9)):
        say("report/start", run="mine é", measure=measure)
        assert "is made" in ended(app_state, "report")["html"]
        assert app_state.project.draft()["best_strengths"] == {file: strength}
    make_run(app_state, "young", started())
    say("report/start", run="young", measure=True)
    assert "is made" in ended(app_state, "report")["html"]


def layer(module: str, **more: Any) -> dict[str, Any]:
    return {"part": HOSTILE, "module": module, "rank": 2, **more}


def test_what_files_are_called_is_text() -> None:
    reason = {"part": "unet", "module": HOSTILE, "reason": HOSTILE}
    numbers = {"norm": 1.0, "effective_rank": 1.5, "stable_rank": 1.2, "rank90": 1, "rank99": 2}
    spectrum = {
        "layers": [layer(HOSTILE, singular_values=[1.0, 0.1], **numbers)] * 2, "left_out": [reason],
        "blocks": [{"part": HOSTILE, "block": HOSTILE, "layers": 2, **numbers}],
    }  # fmt: skip
    phi = {"phi": 0.5, "baseline": 0.1, "phi_output": 0.5, "baseline_output": 0.1}
    compare = {
        "similarity": 0.5, "baseline": 0.1, "similarity_output": 0.4, "baseline_output": 0.1,
        "table": [[1.0]], "layers": [layer(HOSTILE, **phi)], "left_out": [reason],
    }  # fmt: skip
    amplify = {
        "amplification": None, "intruders": 1, "left_out": [reason],
        "blocks": [
            {"part": HOSTILE, "block": HOSTILE, "layers": 2, "norm": 1.0, "amplification": None,
             "intruders": 1}
        ],
    }  # fmt: skip
    stack = {
        "files": [{"name": HOSTILE, "strength": 1, "norm": 1.0, "survives": 0.5, "untouched": 0.1}] * 2,
        "pairs": [{"first": 0, "second": 1, "layers": 0}], "left_out": [reason], "layers": [],
        "validation": {"sentence": HOSTILE},
    }  # fmt: skip
    one, two = {"file": f"/a/{HOSTILE}"}, {"files": [{"file": f"/a/{HOSTILE}"}] * 2}
    report = {"family": HOSTILE, "kind": HOSTILE, "triggers": [HOSTILE]}
    for tool, request, result in (
        ("spectrum", one, {"spectrum": spectrum, "report": report}),
        ("compare", two, {"compare": compare}),
        ("amplify", one, {"amplify": amplify}),
        ("stack", two, {"stack": stack}),
    ):
        shown = result_html(tool, request, result)
        assert "<img" not in shown
        assert "&lt;img src=x" in shown
    assert "<img" not in written_html({"file": f"/a/{HOSTILE}", "sentences": [HOSTILE], "link": HOSTILE})


def test_a_result_that_cannot_be_shown_says_so(
    app_state: AppState, client: TestClient, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = run_with_file(app_state)
    body = {"files": [{"file": str(file)}], "measure": {"run": "mine"}}
    assert say("toolbox/start", tool="intrinsic", **body) == {"done": True}
    assert "needs 1" in ended(app_state)["html"]

    def broken(*given: Any) -> str:
        raise KeyError("ranks")

    monkeypatch.setattr("app.toolbox.view.result_html", broken)
    assert say("toolbox/start", tool="strength", **body) == {"done": True}
    html = ended(app_state)["html"]
    assert "cannot be shown" in html
    assert "needs 1" not in html


def test_a_file_that_is_sent_leaves_the_one_before_it(app_state: AppState, client: TestClient) -> None:
    files = [
        Path(client.post("/easel/toolbox/file?name=a.safetensors", content=text).json()["file"])
        for text in ("first", "second")
    ]
    assert [file.read_text() for file in files] == ["first", "second"]
    assert {file.name for file in files} == {"a.safetensors"}
    shown = draw_form(app_state, {"tool": "check"})["parts"]["toolbox-files"]
    assert '<optgroup label="Dropped">' in shown
    for file in files:
        assert re.search(rf'<option value="{re.escape(str(file))}"[^>]*>a</option>', shown)
