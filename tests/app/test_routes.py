"""The window's own routes: what they give, and what they never give."""

import re
from pathlib import Path

import brotli
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from app.page import REST, build_page, slow_queue_polling
from app.routes import BadRequest, _compress, add_assets, add_routes, below, image_url
from app.state import AppState
from app.templates import render
from lora_core.system.files import DEMO_TRAIN


@pytest.fixture
def client(app_state: AppState) -> TestClient:
    app = FastAPI()
    add_routes(app, app_state)
    add_assets(app, {"style.css": b"body {}"}, app_state.workspace / "assets")
    return TestClient(app)


def test_compressed_assets_are_kept_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    compress = brotli.compress
    monkeypatch.setattr(brotli, "compress", lambda data, **how: made.append(1) or compress(data, **how))
    style = b"body { color: teal }" * 20

    def fetched() -> bytes:
        # What the process remembers is forgotten, as by a new start.
        _compress.cache_clear()
        app = FastAPI()
        add_assets(app, {"style.css": style}, tmp_path)
        answer = TestClient(app).get("/easel/assets/style.css", headers={"Accept-Encoding": "br"})
        assert answer.headers["content-encoding"] == "br"
        return answer.content

    assert [fetched(), fetched()] == [style, style]
    assert len(made) == 1
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-4])
    assert fetched() == style
    assert len(made) == 2
    # What the next version does not use goes.
    style += b"a {}"
    assert fetched() == style
    assert [path == kept for path in tmp_path.iterdir()] == [False]


def test_thumbnails_and_large_pictures(client: TestClient, app_state: AppState, pictures: list[Path]) -> None:
    for size, side in (("thumb", 256), ("picture", 1024)):
        answer = client.get(image_url("dataset", app_state.project.image_folder, pictures[0], size))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
        assert len(answer.content) < side * side


def test_the_welcome_shows_what_the_demo_learns(client: TestClient) -> None:
    drawings = [f"train/{file.name}" for file in sorted(DEMO_TRAIN.glob("*.png"))]
    shown = re.findall(
        'src="([^"]+)"', render("dataset/welcome.html", drawings=drawings, count=len(drawings))
    )
    assert len(shown) == len(drawings) + 2
    assert {client.get(address).status_code for address in shown} == {200}


def test_a_thumbnail_of_a_picture_that_is_gone_by_now_is_no_error(
    client: TestClient, app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = app_state.thumbs.made

    def made_late(file: Path, side: int) -> bytes:
        file.rename(file.with_name("elsewhere.png"))
        return made(file, side)

    monkeypatch.setattr(app_state.thumbs, "made", made_late)
    told = [
        image_url("dataset", app_state.project.image_folder, pictures[0], size)
        for size in ("thumb", "picture")
    ]
    # Moved while it is read, and before.
    for where in (told[0], *told):
        answer = client.get(where)
        assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("kind", ["dataset", "run", "generated", "nothing"])
@pytest.mark.parametrize(
    "path",
    [
        "../../secret.png",
        "..%2f..%2fsecret.png",
        "%2e%2e/%2e%2e/secret.png",
        "/etc/passwd",
        "a%00.png",
        "draft.json",
        ".",
    ],
)
def test_paths_that_lead_out_are_refused(
    client: TestClient, app_state: AppState, kind: str, path: str
) -> None:
    Image.new("RGB", (8, 8)).save(app_state.workspace / "secret.png")
    for size in ("picture", "thumb"):
        assert client.get(f"/easel/{size}/{kind}/{path}").status_code == 404


def test_a_link_that_leads_out_is_refused(app_state: AppState) -> None:
    secret = app_state.workspace / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    link = app_state.project.image_folder / "link.png"
    link.symlink_to(secret)
    with pytest.raises(BadRequest):
        below(app_state.project.image_folder, "link.png", {".png"})


def test_downloads_are_exports_alone(client: TestClient, app_state: AppState) -> None:
    exports = app_state.workspace / "runs" / "first" / "export"
    exports.mkdir(parents=True)
    (exports / "first.safetensors").write_bytes(b"weights")
    (exports.parent / "config.toml").write_text("")
    answer = client.get("/easel/download/first/first.safetensors")
    assert answer.content == b"weights"
    assert "attachment" in answer.headers["content-disposition"]
    assert client.get("/easel/download/first/..%2fconfig.toml").status_code == 404
    assert client.get("/easel/download/..%2f..%2fruns%2ffirst/first.safetensors").status_code == 404


def test_a_caption_is_saved_byte_for_byte(client: TestClient, pictures: list[Path]) -> None:
    text = "<img src=x onerror=alert(1)> {{7*7}} \u202eabc 😀 \"quoted\" 'single'"
    answer = client.post("/easel/caption", json={"picture": "picture-2.png", "text": text})
    assert answer.json()["saved"]
    assert pictures[2].with_suffix(".txt").read_text(encoding="utf-8").strip() == text


def test_a_caption_of_no_picture_is_a_sentence(client: TestClient, pictures: list[Path]) -> None:
    answer = client.post("/easel/caption", json={"picture": "../draft.png", "text": "x"})
    assert "no image named" in answer.json()["problem"]


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b'{"picture": 3}'])
def test_broken_requests_do_no_harm(client: TestClient, pictures: list[Path], body: bytes) -> None:
    assert client.post("/easel/caption", content=body).status_code in (200, 404)


def test_who_it_is_says_no_path(client: TestClient, app_state: AppState) -> None:
    said = client.get("/easel").json()
    assert said["app"] == "lora-easel"
    assert str(app_state.workspace) not in str(said)


def test_assets_are_those_of_the_page_alone(client: TestClient) -> None:
    assert client.get("/easel/assets/style.css").status_code == 200
    assert client.get("/easel/assets/base/easel.json").status_code == 404


def test_gradio_s_queue_rests_and_nothing_of_ours_waits_in_it(app_state: AppState) -> None:
    page = build_page(app_state)
    queue = page._queue
    slow_queue_polling(page)
    assert queue.sleep_when_free == queue.progress_update_sleep_when_free == REST
    assert [event.targets for event in page.fns.values() if event.queue] == []
