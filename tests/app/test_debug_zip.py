"""The debug zip: what helps, and nothing of what a person called or wrote. The doctor of the window."""

import getpass
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app import top_bar
from app.state import AppState
from lora_core.runs import events
from lora_core.runs.diagnosis import Anonymizer, debug_zip
from tests.app.runs import make_run, started, step
from tests.warm import program

SECRETS = [
    "Annabel",
    "bel_07",
    "zwxtoken",
    "laughing by the sea",
    "/Pictures",
    "/mnt",
    "C:\\Users",
    "hunter",
    "secret place",
]


def test_no_pictures_paths_or_names_are_in_it(app_state: AppState) -> None:
    prompt = "Annabel laughing by the sea"
    run = make_run(
        app_state,
        "Annabel-2",
        started(),
        events.PreviewDone(step=0, files=["previews/step-0.png"], prompts=[prompt]),
        step(3),
        events.Warned(step=3, message="Of the image bel_07.png the loss is not finite."),
        events.Failed(step=3, reason="/mnt/d/Annabel/Pictures/bel_07.png cannot be read."),
        dataset__path="/mnt/d/Annabel/Pictures",
        model__base="/mnt/d/models/hunter base.safetensors",
        dataset__trigger="zwxtoken",
        sample__prompts=[prompt],
        slider__positive="Annabel grown old",
        slider__negative="young hunter",
        slider__target=["Annabel"],
        slider__preserve=["secret place"],
        adapter__init="C:\\Users\\hunter\\old.safetensors",
        optimizer__lr=3e-4,
    )
    (run.previews / "step-0.png").write_bytes(b"picture")
    run.inputs_file.write_text(json.dumps({"the picture bel_07.png": "ab", "the package torch 2.8": ""}))
    home, user = Path.home(), getpass.getuser()
    run.log_file.write_text(
        f"reading {run.path}/config.toml\n{home}/secret place/x.txt by {user}\n"
        '  File "/opt/py/lib/python3.11/site-packages/torch/nn/module.py", line 3, in call\n'
        f"C:\\Users\\hunter\\Desktop\\b.png zwxtoken {prompt} bel_07\nRuntimeError: shapes differ\n"
    )
    run_view = app_state.jobs.run_view(run)
    app_state.jobs.state(run_view)
    with zipfile.ZipFile(io.BytesIO(debug_zip(run_view.run, app_state.workspace))) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert set(texts) == {"about.json", "settings.toml", "events.jsonl", "log.txt"}
    whole = "\n".join(texts.values())
    for secret in [*SECRETS, str(app_state.workspace), str(home)]:
        assert secret.lower() not in whole.lower(), secret
    # What helps is left.
    assert "lr = 0.0003" in texts["settings.toml"]
    assert "RuntimeError: shapes differ" in texts["log.txt"]
    assert "<python>/torch/nn/module.py" in texts["log.txt"]
    kinds = [json.loads(line)["event"] for line in texts["events.jsonl"].splitlines()]
    assert kinds == ["Started", "PreviewDone", "StepDone", "Warned", "Failed"]
    assert "torch" in json.loads(texts["about.json"])["versions"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_what_a_run_links_to_and_odd_events_are_left_out(app_state: AppState) -> None:
    run = make_run(app_state, "a", started())
    with open(run.events_file, "a", encoding="utf-8") as file:
        file.write('{"event": "PreviewDone", "prompts": 3}\n3\n' + "[" * 100_000 + "\n")
    private = run.path.parent.parent / "private.txt"
    private.write_text("laughing by the sea")
    for link, to in (
        (run.plan_file, private),
        (run.path / "exit.json", Path("/dev/zero")),
        (run.log_file, private),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(to)
    names = zipfile.ZipFile(io.BytesIO(debug_zip(run, app_state.workspace))).namelist()
    assert sorted(names) == ["about.json", "events.jsonl", "settings.toml"]


def test_names_with_accents_and_names_of_new_pictures_are_taken_out_too(app_state: AppState) -> None:
    changed = ["the picture zoë.png", "the picture zuzana.png", "the package torch"]
    reason = f"Since the run a began, this has changed: {', '.join(changed)}."
    failure = events.Failed(reason=reason, changed=changed)
    folder = {"dataset__path": "/mnt/d/marta.zuzana", "model__base": "/mnt/d/b.safetensors"}
    run = make_run(app_state, "a", started(), failure, **folder)
    # The second one came after the run began.
    run.inputs_file.write_text(json.dumps({"the picture zoë.png": "ab"}))
    run_view = app_state.jobs.run_view(run)
    app_state.jobs.state(run_view)
    with zipfile.ZipFile(io.BytesIO(debug_zip(run_view.run, app_state.workspace))) as archive:
        lines = archive.read("events.jsonl").decode().splitlines()
        settings = archive.read("settings.toml").decode()
    assert 'path = "<dataset.path>"' in settings
    assert 'base = "<model.base>.safetensors"' in settings
    failed = json.loads(lines[-1])
    assert failed["changed"] == 3
    assert "zo" not in failed["reason"]
    assert "zuzana" not in failed["reason"]
    assert "the package torch" in failed["reason"]


def test_paths_of_any_system_lose_their_names() -> None:
    clean = Anonymizer([("bob", "<user>"), ("ab", "too short"), ("car", "image 1")])
    assert clean.text("card car.png Bob") == "card image 1.png <user>"
    assert (
        clean.text("see /data/x y/Bob/p.png, D:\\a\\b\\c.txt or a/b")
        == "see <path> y<path>.png, <path>.txt or a/b"
    )
    assert clean.text("loss 1/2, step 3/4, ab") == "loss 1/2, step 3/4, ab"


def test_the_doctor_of_the_window_is_that_of_the_command_line(
    client: TestClient, app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_bar.sys, "executable", program("engine"))
    shown = client.get("/easel/doctor").json()["html"]
    for words in ("<b>Python</b>", "<b>PyTorch</b>", "<b>Permissions</b>", "<b>Port of the window</b>"):
        assert words in shown
    assert str(app_state.workspace) in shown
    data = client.get("/easel/doctor.zip").content
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert set(archive.namelist()) == {"about.json", "doctor.txt"}
    top_bar.WORDS.speak("zh_CN")
    try:
        shown = client.get("/easel/doctor").json()["html"]
    finally:
        top_bar.WORDS.speak("en")
    assert "<b>内存</b>" in shown
    assert "工作区全部可写" in shown
    assert "GB free" not in shown
    monkeypatch.setattr(top_bar.sys, "executable", "no-such-program")
    assert "run `lora-easel doctor` to see why" in client.get("/easel/doctor").json()["problem"]


def test_what_is_wrong_comes_first_with_its_command(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"name": "Python", "found": "3.13", "ok": True, "fix": ""},
        {
            "name": "PyTorch",
            "found": "<b>broken</b>",
            "ok": False,
            "fix": "Run `python launch.py repair`; wait.",
        },
    ]
    monkeypatch.setattr(top_bar, "_diagnose", lambda workspace, language: {"checks": rows})
    shown = client.get("/easel/doctor").json()["html"]
    assert "<h2>1 problem</h2>" in shown
    assert shown.index("PyTorch") < shown.index("Python<")
    assert "Run <code>python launch.py repair</code>; wait." in shown
    assert "&lt;b&gt;broken" in shown


def test_the_documents_are_in_the_window(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site where it was built, else its sources; and nothing else of the checkout."""
    monkeypatch.setattr(top_bar, "SITE", tmp_path / "site" / "index.html")
    first = client.get("/easel/docs/")
    assert first.headers["content-type"].startswith("text/html")
    assert 'href="docs/install.md"' in first.text
    assert "<table>" in client.get("/easel/docs/docs/commands.md").text
    assert client.get("/easel/docs/docs/window.webp").status_code == 200
    assert "MIT License" in client.get("/easel/docs/LICENSE").text
    for path in (
        "launch.py",
        "docs/pages.py",
        "docs/../.git/config",
        "..%2fx.md",
        ".venv/a.md",
        "docs/no.md",
    ):
        assert client.get(f"/easel/docs/{path}").status_code == 404, path
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("the site", encoding="utf-8")
    assert client.get("/easel/docs/").text == "the site"
    assert client.get("/easel/docs/README.md").status_code == 404
    monkeypatch.setattr(top_bar, "SITE", tmp_path / "gone")
    monkeypatch.setattr(top_bar, "IS_CHECKOUT", False)
    assert client.get("/easel/docs/").status_code == 404
    assert not top_bar.has_documents()
