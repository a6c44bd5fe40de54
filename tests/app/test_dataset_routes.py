"""The Dataset tab's routes: pictures as data, imports, leaving out, holding out, bulk edits, the check."""

import base64
import io
import json
import os
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image, ImageDraw
from starlette.testclient import TestClient

from app import routes
from app.dataset import findings, gallery, uploads
from app.dataset.gallery import summarize
from app.dataset.view import add_dataset_routes
from app.guard import LARGEST_JSON
from app.main import build_app
from app.page import build_page
from app.state import AppState, take_snapshot
from app.train.start import details
from lora_core.data import audit, dataset, images, importer
from lora_core.data.dataset import scan
from lora_core.projects import project
from lora_core.projects.project import OTHER_PROJECT
from lora_core.runs import preflight
from tests.waiting import PATIENCE, wait_for

HOSTILE = "<img src=x onerror=\"alert('1')\"> {{7*7}} \u202eabc 😀"


def png(seed: int = 0, size: tuple[int, int] = (160, 120)) -> bytes:
    image = Image.new("RGB", size, (200, 30 * seed % 255, 90))
    ImageDraw.Draw(image).ellipse((10 + seed, 10, 60, 60 + 9 * seed), fill=(9, 80 * seed % 255, 200))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def parcel(files: dict[str, bytes], first: int = 0) -> bytes:
    listed = [[first + index, name, len(data)] for index, (name, data) in enumerate(files.items())]
    return json.dumps(listed).encode() + b"\n" + b"".join(files.values())


def imported(client: TestClient, files: dict[str, bytes]) -> dict[str, Any]:
    """Send files as a page does, and wait until they are taken over."""
    batch = client.post("/easel/upload").json()["batch"]
    answer = client.put(f"/easel/upload/{batch}", content=parcel(files))
    assert answer.json() == {"received": len(files)}, answer.text
    client.post(f"/easel/upload/{batch}", json={})
    return settled(client, "import")


def settled(client: TestClient, what: str) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        # Of an import only the live stream tells.
        state = client.app.state.feeds[what]() if what == "import" else client.get(f"/easel/{what}").json()
        return state if state["state"] not in ("working", "idle") else {}

    return wait_for(look)


def shelf(client: TestClient) -> list[dict[str, Any]]:
    return client.get("/easel/dataset").json()["pictures"]


def test_a_second_start_leaves_the_uploads_of_a_window_alone(
    app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", os.getppid)
        live = app_state.importer.begin()
    killed = app_state.importer.begin()
    second = AppState(app_state.workspace, worker_command=["no-such-program"])
    assert [path.name for path in second.importer.staging.iterdir()] == [live] != [killed]


def test_a_batch_that_another_import_overtakes_is_not_lost(
    client: TestClient, app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    importer = app_state.importer
    batch = client.post("/easel/upload").json()["batch"]
    client.put(f"/easel/upload/{batch}", content=parcel({"a.png": png(1)}))
    idle = importer.state()
    monkeypatch.setattr(importer, "_leave_demo", lambda: importer._state.update(state="working"))
    assert "Another import is running" in client.post(f"/easel/upload/{batch}", json={}).json()["problem"]
    monkeypatch.undo()
    importer._state = idle
    client.post(f"/easel/upload/{batch}", json={})
    assert settled(client, "import")["note"] == "1 image added."


def test_folders_stay_folders_and_files_stay_bytes(client: TestClient, app_state: AppState) -> None:
    picture, caption = png(1), f"{HOSTILE}\r\nsecond".encode()
    state = imported(client, {"3_my dog/a é.png": picture, "3_my dog/a é.txt": caption, "b.png": png(2)})
    assert (state["state"], state["note"]) == ("done", "2 images and 1 caption added.")
    pictures = app_state.project.image_folder
    assert (pictures / "3_my dog" / "a é.png").read_bytes() == picture
    assert (pictures / "3_my dog" / "a é.txt").read_bytes() == caption
    first, second = shelf(client)
    assert (first["name"], first["repeats"], second["name"]) == ("3_my dog/a é.png", 3, "b.png")
    assert first["caption"] == f"{HOSTILE}\nsecond"
    thumb = client.get(f"/easel/thumb/dataset/{first['url']}")
    assert (thumb.status_code, thumb.headers["content-type"]) == (200, "image/webp")
    assert list((app_state.workspace / "tmp" / "incoming").iterdir()) == []


def test_the_folder_is_read_again_only_if_a_file_has_changed(
    client: TestClient, app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[Path] = []
    plain = dataset.scan
    monkeypatch.setattr(
        dataset, "scan", lambda folder, sizes: (scans.append(folder), plain(folder, sizes))[1]
    )

    def read_again() -> int:
        scans.clear()
        app_state.project.invalidate()
        app_state.project.dataset()
        return len(scans)

    # What was written a moment ago may be written again in the same tick of the file system's clock.
    assert [read_again(), read_again()] == [1, 1]
    monkeypatch.setattr(images, "SETTLED", 0)
    before, revision = client.get("/easel/dataset").json(), app_state.project.revision
    assert [read_again(), read_again(), read_again()] == [1, 0, 0]
    pictures[0].with_suffix(".txt").write_text("by another program")
    assert [read_again(), read_again()] == [1, 0]
    assert shelf(client)[0]["caption"] == "by another program"
    assert app_state.project.revision == revision + 1
    # Another image of the same size comes with another address.
    Image.new("RGB", (160, 160), "white").save(pictures[0])
    assert read_again() == 1
    assert shelf(client)[0]["url"] != before["pictures"][0]["url"]
    (pictures[0].parent / "deep").mkdir()
    (pictures[0].parent / "deep" / "c.png").write_bytes(png(5))
    assert shelf(client)[0]["name"] == "deep/c.png"


def test_the_list_of_images_is_made_once(
    client: TestClient, app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    plain = gallery.image_facts
    monkeypatch.setattr(gallery, "image_facts", lambda *given: (made.append(given), plain(*given))[1])
    first = client.get("/easel/dataset")
    assert (len(made), client.get("/easel/dataset").content) == (3, first.content)
    assert len(made) == 3
    client.post("/easel/caption", json={"picture": "picture-2.png", "text": "new"})
    assert shelf(client)[2]["caption"] == "new"
    client.post("/easel/leave-out", json={"pictures": ["picture-2.png"]})
    assert len(client.get("/easel/dataset").json()["left_out"]) == 1


def test_a_second_start_lists_images_without_reading_or_counting_captions(
    client: TestClient, app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    scanned, counted, opened = dataset.scan, gallery.count_all_tokens, images.check_image
    monkeypatch.setattr(dataset, "scan", lambda *given: (done.append("scan"), scanned(*given))[1])
    monkeypatch.setattr(
        gallery, "count_all_tokens", lambda *given: (done.append("count"), counted(*given))[1]
    )
    monkeypatch.setattr(images, "check_image", lambda *given: (done.append("decode"), opened(*given))[1])
    monkeypatch.setattr(images, "SETTLED", 0)

    def started() -> list[dict[str, Any]]:
        done.clear()
        window = AppState(app_state.workspace, worker_command=["no-such-program"])
        add_dataset_routes(FastAPI(), window)
        window.prepare()
        made = len(done)
        listed = json.loads(window.list_images())
        assert len(done) == made
        window.close()
        return listed["pictures"]

    first, project = shelf(client), app_state.project
    assert done == ["scan", *["decode"] * 3]
    assert (started(), done) == (first, [])
    # What the window writes is read at the next start, and so is what another program does.
    project.save_caption("picture-2.png", "now with a caption")
    assert [one["caption"] for one in started()] == [
        *(one["caption"] for one in first[:2]),
        "now with a caption",
    ]
    assert done == ["scan"]
    pictures[0].unlink()
    assert ([one["name"] for one in started()], done) == (["picture-1.png", "picture-2.png"], ["scan"])
    assert (len(started()), done) == (2, [])
    (project.path / "images.json").write_bytes((project.path / "images.json").read_bytes()[:-9])
    assert (len(started()), done) == (2, ["scan"])


def test_the_list_is_made_before_captions_are_counted(
    client: TestClient, app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    asked, waiting, facts = threading.Event(), threading.Event(), gallery.image_facts
    counting = gallery.count_all_tokens

    class Listing:
        """The lock, which tells when a look has come to it."""

        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __enter__(self) -> None:
            if threading.current_thread().name == "look":
                waiting.set()
            self.lock.acquire()

        def __exit__(self, *error: object) -> None:
            self.lock.release()

    def slow(*given: Any) -> Any:
        asked.set()
        assert waiting.wait(PATIENCE)
        done.append("listed")
        return facts(*given)

    monkeypatch.setattr(app_state, "listing", Listing())
    monkeypatch.setattr(gallery, "image_facts", slow)
    monkeypatch.setattr(
        gallery, "count_all_tokens", lambda *given: (done.append("counted"), counting(*given))[1]
    )
    build_page(app_state)
    listing = threading.Thread(target=client.get, args=("/easel/dataset",))
    listing.start()
    assert asked.wait(PATIENCE)
    look = threading.Thread(target=app_state.live.look, name="look")
    look.start()
    look.join(PATIENCE)
    listing.join(PATIENCE)
    assert done == ["listed"] * 3 + ["counted"]


def test_a_zip_and_what_is_wrong_in_it(client: TestClient, app_state: AppState) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("in/a.png", png(1))
        archive.writestr("in/a.txt", "a thing")
        archive.writestr("in/broken.png", "no image")
    state = imported(client, {"all.zip": buffer.getvalue(), 'we"ird\n<b>.png': png(3)})
    assert state["note"].startswith("2 images and 1 caption added. 1 file skipped: in/broken.png is not")
    assert "broken.png is not an image" in app_state.project.notes[0].sentence
    assert sorted(one["name"] for one in shelf(client)) == ["in/a.png", "we\uff02ird_\uff1cb\uff1e.png"]


def test_phone_pictures(client: TestClient) -> None:
    files = {}
    for kind in ("HEIF", "AVIF"):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(png(2))).save(buffer, kind)
        files[f"phone.{'heic' if kind == 'HEIF' else 'avif'}"] = buffer.getvalue()
    imported(client, files)
    assert [one["size"] for one in shelf(client)] == [[160, 120]] * 2
    for one in shelf(client):
        assert client.get(f"/easel/picture/dataset/{one['url']}").headers["content-type"] == "image/webp"


def test_links_share_the_original_and_leave_it_alone(
    client: TestClient, app_state: AppState, tmp_path: Path
) -> None:
    folder = tmp_path / "originals"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    (folder / "a.txt").write_text("a thing")
    client.post("/easel/import", json={"path": str(folder), "link": True})
    assert settled(client, "import")["state"] == "done"
    taken = app_state.project.image_folder / "a.png"
    assert taken.samefile(folder / "a.png")
    client.post("/easel/caption", json={"picture": "a.png", "text": "changed"})
    client.post("/easel/leave-out", json={"pictures": ["a.png"]})
    assert (folder / "a.txt").read_text() == "a thing"
    assert (folder / "a.png").read_bytes() == png(1)


def test_a_link_to_another_disk_is_shown_but_no_other_link(
    client: TestClient, app_state: AppState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "originals"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(2))

    def other_disk(*paths: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", other_disk)
    client.post("/easel/import", json={"path": str(folder), "link": True})
    settled(client, "import")
    assert (app_state.project.image_folder / "a.png").is_symlink()
    (app_state.project.image_folder / "b.png").symlink_to(tmp_path / "secret.png")
    assert client.get("/easel/thumb/dataset/a.png").status_code == 200
    assert client.get("/easel/thumb/dataset/b.png").status_code == 404
    assert client.get("/easel/thumb/dataset/../../../originals/a.png").status_code == 404


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "Type the path"),
        ("/nowhere/at all", "no folder at"),
        ("a\0b", "no folder at"),
        ("~no-such-user/a", "no folder at"),
    ],
)
def test_a_path_that_is_none_is_a_sentence(client: TestClient, path: str, said: str) -> None:
    assert said in client.post("/easel/import", json={"path": path}).json()["problem"]


def test_too_large_a_file_is_refused_as_it_comes(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LARGEST_FILE", 1000)
    batch = client.post("/easel/upload").json()["batch"]
    answer = client.put(f"/easel/upload/{batch}", content=parcel({"a.png": b"x" * 2000}))
    assert "a.png is larger" in answer.json()["problem"]
    client.post(f"/easel/upload/{batch}", json={"give_up": True})
    again = client.post(f"/easel/upload/{batch}", json={})
    assert "over" in again.json()["problem"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (parcel({"a.png": b"x"}, -1), "More than"),
        (parcel({"a.png": b"x"}, uploads.MOST_FILES), "More than"),
        (parcel({"a.png": b"whole"})[:-2], "did not arrive completely"),
        (b'[[0, "a.png", -5]]\n', "More than"),
        (b"x" * 100, "list of files"),
        pytest.param(b" " * (uploads.LONGEST_LIST + 1), "list of files", id="endless"),
        (b'[[Infinity, "a.png", 3]]\n', "list of files"),
        (b'[[0, "\\ud800.png", 5]]\nabc', "\N{REPLACEMENT CHARACTER}.png did not arrive completely"),
        (b"", "list of files"),
        (b"{}\n", ""),
        (b"[" * 100_000 + b"\n", "list of files"),
    ],
)
def test_parcels_that_are_none(client: TestClient, app_state: AppState, body: bytes, said: str) -> None:
    batch = client.post("/easel/upload").json()["batch"]
    assert said in client.put(f"/easel/upload/{batch}", content=body).json().get("problem", "")
    assert "over" in client.put("/easel/upload/other", content=body).json()["problem"]
    client.post(f"/easel/upload/{batch}", json={})
    assert settled(client, "import")["state"] == "failed"
    assert shelf(client) == []


def test_left_out_and_taken_back_whole(client: TestClient, app_state: AppState) -> None:
    files = {"in/a.png": png(1), "in/a.txt": b"first", "other/a.png": png(2), "other/a.txt": b"second"}
    imported(client, files)
    client.post("/easel/leave-out", json={"pictures": ["in/a.png", "other/a.png"]})
    said = client.get("/easel/dataset").json()
    assert said["pictures"] == []
    assert [one["name"] for one in said["left_out"]] == ["in/a.png", "other/a.png"]
    assert client.get(f"/easel/thumb/left-out/{said['left_out'][0]['url']}").status_code == 200
    client.post("/easel/take-back", json={"pictures": ["other/a.png"]})
    assert [(one["name"], one["caption"]) for one in shelf(client)] == [("other/a.png", "second")]
    assert (app_state.project.image_folder / "other" / "a.png").read_bytes() == png(2)


def test_what_is_no_picture_can_be_left_out(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    (app_state.project.image_folder / "broken.png").write_text("no image")
    client.post("/easel/leave-out", json={"pictures": ["broken.png"]})
    assert app_state.project.dataset().problems == []
    answer = client.post("/easel/leave-out", json={"pictures": ["../../draft.json"]})
    assert "no image named" in answer.json()["problem"]


def test_held_out_by_hand(client: TestClient, app_state: AppState, pictures: list[Path]) -> None:
    client.post("/easel/hold-out", json={"pictures": ["picture-1.png"], "on": True})
    assert [one["held"] for one in shelf(client)] == [False, True, False]
    assert (app_state.project.image_folder / "held_out.txt").read_text() == "picture-1.png\n"
    client.post("/easel/hold-out", json={"pictures": ["picture-1.png"], "on": False})
    assert not (app_state.project.image_folder / "held_out.txt").exists()


def test_a_crop_is_drawn_over_the_whole_image(client: TestClient, app_state: AppState) -> None:
    imported(client, {"a.png": png()})
    (before,) = shelf(client)
    box = [0.5, 0.0, 1.0, 0.5]
    assert client.post("/easel/crop", json={"picture": "a.png", "box": box}).json() == {"before": None}
    (after,) = shelf(client)
    assert (after["box"], after["whole"]) == (box, before["size"])
    assert after["size"] == [side // 2 for side in before["size"]]
    left, top, right, bottom = after["crop"]
    assert 50 <= left <= 60
    assert 50 <= bottom <= 60
    assert max(top, right) <= 10
    for wrong in (box[:3], "left", [0, 0, 1, None], {"left": 0}):
        answer = client.post("/easel/crop", json={"picture": "a.png", "box": wrong}).json()
        assert "The crop of a.png is not" in answer["problem"]
    assert client.post("/easel/crop", json={"picture": "a.png", "box": None}).json() == {"before": box}
    assert shelf(client) == [before]


def test_a_mask_is_painted_and_taken_back(client: TestClient, app_state: AppState) -> None:
    imported(client, {"a.png": png()})
    (before,) = shelf(client)
    assert before["mask"] is None

    def sent(image: Image.Image) -> dict[str, Any]:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        words = base64.b64encode(buffer.getvalue()).decode()
        return client.post("/easel/mask", json={"picture": "a.png", "png": words}).json()

    wide, high = before["size"]
    half = Image.new("RGBA", (wide // 2, high // 2), "black")
    half.paste("white", (0, 0, 9, 9))
    first = sent(half)
    assert first["revision"]
    assert first["before"] is None
    file = app_state.project.image_folder / "a-masklabel.png"
    with Image.open(file) as written:
        assert (written.mode, written.size, written.getbbox()) == ("L", half.size, (0, 0, 9, 9))
    (after,) = shelf(client)
    assert after["mask"].startswith("a-masklabel.png?v=")
    assert client.get(f"/easel/picture/dataset/{after['mask']}").headers["content-type"] == "image/webp"
    assert "black everywhere" in sent(Image.new("L", (wide, high)))["problem"]
    assert "shape of its image" in sent(Image.new("L", (wide, 2 * high), 255))["problem"]
    for wrong in ("nonsense", "####", 3, [1]):
        answer = client.post("/easel/mask", json={"picture": "a.png", "png": wrong}).json()
        assert answer["problem"] == "The mask of a.png is not a PNG in base64."
    assert file.is_file()
    painted = file.read_bytes()
    answer = client.post("/easel/mask", json={"picture": "a.png", "png": None}).json()
    assert base64.b64decode(answer["before"]) == painted
    assert (file.exists(), shelf(client)) == (False, [before])
    # One of another name goes too.
    other = file.with_name("a_mask.png")
    half.save(other)
    assert shelf(client)[0]["mask"].startswith("a_mask.png?v=")
    client.post("/easel/mask", json={"picture": "a.png", "png": None})
    assert (other.exists(), shelf(client)) == (False, [before])
    # What is painted over one of another format is used, and taking it back leaves that one.
    photo = file.with_suffix(".jpg")
    half.convert("RGB").save(photo)
    sent(half)
    assert shelf(client)[0]["mask"].startswith("a-masklabel.png?v=")
    client.post("/easel/mask", json={"picture": "a.png", "png": None})
    assert shelf(client)[0]["mask"].startswith("a-masklabel.jpg?v=")


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a-masklabel.jpg", "RGB"), ("a-masklabel.png", "RGBA"), ("a_mask.png", "1"), ("mask/a.webp", "RGB"),
     ("a-masklabel.png", "too large to be sent")],
)  # fmt: skip
def test_a_mask_that_was_changed_comes_back_byte_for_byte(
    client: TestClient, app_state: AppState, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project.LARGEST_SENT_MASK * 4 / 3 + 1000 < LARGEST_JSON
    if large := mode.startswith("too large"):
        mode = "L"
        monkeypatch.setattr(project, "LARGEST_SENT_MASK", 10)
    imported(client, {"a.png": png()})
    folder, size, buffer = app_state.project.image_folder, shelf(client)[0]["size"], io.BytesIO()
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    Image.new("RGBA", size, (255, 255, 255, 90)).convert(mode).save(file)
    former, painted = file.read_bytes(), Image.new("L", size, 200)
    painted.save(buffer, "PNG")

    def act(**sent: Any) -> dict[str, Any]:
        answer = client.post("/easel/mask", json={"picture": "a.png", **sent}).json()
        assert "problem" not in answer
        return answer

    def used() -> str:
        return str(shelf(client)[0]["mask"]).partition("?")[0]

    assert used() == name
    # It opens as it counts: what is see-through is on black.
    with Image.open(io.BytesIO(client.get(f"/easel/picture/dataset/{name}").content)) as opened:
        assert abs(opened.convert("L").getpixel((0, 0)) - (90 if mode == "RGBA" else 255)) < 4  # type: ignore[operator]
    # A stroke, and then all of it erased: no mask is left that a run would train with.
    answers = [act(png=base64.b64encode(buffer.getvalue()).decode())]
    assert used() == "a-masklabel.png"
    while not answers[1:] or answers[-1]["left"]:
        answers.append(act(png=None))
    assert (used(), [one.mask for one in app_state.project.dataset().records]) == ("None", [None])
    was: dict[str, Any] = {}
    for answer in answers:
        was.setdefault(answer["file"], answer["before"])
    assert all(str(data).startswith("kept:") == large for data in was.values() if data)
    for put_back, data in was.items():
        act(png=data, put_back=put_back)
    assert (used(), file.read_bytes()) == (name, former)
    assert {one.name for one in folder.rglob("a*") if one.is_file()} == {"a.png", file.name}


@pytest.mark.parametrize(
    "name",
    ["a.png", "b.png", "b_mask.png", "a-masklabel.txt", "../a_mask.png", "/mask/a.png", "mask/../b.png",
     "link/mask/a.png", "mask/a\0.png", "mask/b.png", "a-condlabel.png"],
)  # fmt: skip
def test_only_a_mask_is_put_back(client: TestClient, app_state: AppState, tmp_path: Path, name: str) -> None:
    imported(client, {"a.png": png(), "b.png": png(3)})
    (tmp_path / "out" / "mask").mkdir(parents=True)
    (app_state.project.image_folder / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    answer = client.post("/easel/mask", json={"picture": "a.png", "png": "AAAA", "put_back": name}).json()
    assert answer["problem"].endswith("is not a mask of a.png.")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before
    gone = {"picture": "a.png", "png": f"kept:{'0' * 64}", "put_back": "a_mask.png"}
    assert "was kept for a day and is gone" in client.post("/easel/mask", json=gone).json()["problem"]
    for wrong in ("####", 3, [1], "kept:../../project.json"):
        sent = {"picture": "a.png", "png": wrong, "put_back": "a_mask.png"}
        assert (
            client.post("/easel/mask", json=sent).json()["problem"] == "The mask of a.png is not in base64."
        )


def test_strokes_are_saved_without_reading_the_folder_again(
    client: TestClient, app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported(client, {"a.png": png(), "b.png": png(3)})
    wide, high = shelf(client)[0]["size"]
    project, file = app_state.project, app_state.project.image_folder / "a-masklabel.png"

    def stroke(value: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.new("L", (wide, high), value).save(buffer, "PNG")
        words = base64.b64encode(buffer.getvalue()).decode()
        return client.post("/easel/mask", json={"picture": "a.png", "png": words}).json()

    with monkeypatch.context() as patch:
        patch.setattr("lora_core.projects.project.scan", None)
        for value in (9, 99):
            revision = project.revision
            assert stroke(value)["revision"] > revision
            assert project.images()["a.png"].mask == file
            with Image.open(file) as written:
                assert written.getextrema() == (value, value)
    assert scan(project.image_folder).records == project.dataset().records
    # A disk that refuses, or a kill before the file is renamed into place, leaves the stroke before.
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert "The mask of a.png cannot be written" in stroke(200)["problem"]
    assert file.read_bytes() == whole
    # What a black mask had spoilt is well again.
    Image.new("L", (wide, high)).save(file)
    project.invalidate()
    assert [one.kind for one in project.dataset().problems] == ["black mask"]
    stroke(200)
    assert project.dataset().problems == []


def test_a_caption_leaves_other_pages_one_step_behind(client: TestClient, pictures: list[Path]) -> None:
    before = client.get("/easel/dataset").json()
    answer = client.post("/easel/caption", json={"picture": "picture-2.png", "text": "new"}).json()
    assert answer["before"] == before["revision"]
    after = client.get("/easel/dataset").json()
    assert after["revision"] == answer["revision"] > before["revision"]
    assert client.get("/easel/dataset").json()["mark"] == after["mark"]


def test_bulk_edit_and_back(client: TestClient, pictures: list[Path]) -> None:
    edit = {"do": "replace", "find": "plain", "put": HOSTILE}
    assert client.post("/easel/bulk", json=edit).json()["changed"] == 2
    assert client.post("/easel/bulk", json={**edit, "apply": True}).json()["changed"] == 2
    assert shelf(client)[0]["caption"] == f"a {HOSTILE} field, number 0"
    assert client.post("/easel/bulk/undo").json()["undone"] == 2
    assert shelf(client)[0]["caption"] == "a plain field, number 0"
    bad = client.post("/easel/bulk", json={"do": "replace", "find": "(", "regex": True})
    assert "pattern" in bad.json()["problem"]


def test_the_trigger_word_reaches_every_caption(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    answer = client.post("/easel/bulk", json={"do": "trigger", "apply": True}).json()
    assert "No trigger word yet" in answer["problem"]
    app_state.project.update_draft(trigger="sks")
    client.post("/easel/bulk", json={"do": "trigger", "apply": True})
    assert [one["caption"] for one in shelf(client)] == [
        "sks, a plain field, number 0",
        "sks, a plain field, number 1",
        "sks",
    ]
    assert dict(client.get("/easel/tags").json()["tags"])["sks"] == 3


def test_the_check_finds_twins_and_names_both(client: TestClient, app_state: AppState) -> None:
    files = {f"{n}.png": png(n) for n in range(3)} | {"copy.png": png(1, (160, 120)), "bad.png": b"x"}
    imported(client, files)
    (app_state.project.image_folder / "bad.png").write_bytes(b"x")
    client.post("/easel/check", json={})
    found = settled(client, "check")
    assert found["fresh"]
    kinds = {(row["picture"], row["kind"], row.get("twin")) for row in found["problems"]}
    assert ("copy.png", "twins", "1.png") in kinds
    assert ("bad.png", "unreadable", None) in kinds
    assert all(words in found["parts"]["issues"] for words in (">1 near duplicate<", ">1 unreadable<"))
    client.post("/easel/leave-out", json={"pictures": ["copy.png"]})
    assert not client.get("/easel/check").json()["fresh"]


@pytest.mark.parametrize("path", ["leave-out", "take-back", "hold-out"])
@pytest.mark.parametrize("body", [b"", b"[1]", b'{"pictures": "a.png"}', b'{"pictures": 3}'])
def test_broken_requests_do_no_harm(client: TestClient, pictures: list[Path], path: str, body: bytes) -> None:
    assert client.post(f"/easel/{path}", content=body).status_code == 404
    assert len(shelf(client)) == 3


@pytest.mark.parametrize("path", ["leave-out", "hold-out", "crop"])
def test_the_demo_stays_as_it_is(client: TestClient, app_state: AppState, path: str) -> None:
    app_state.project.update_draft(dataset="demo")
    name = shelf(client)[0]["name"]
    sent = {"pictures": [name], "on": True, "picture": name, "box": [0, 0, 1, 0.5]}
    assert "demo" in client.post(f"/easel/{path}", json=sent).json()["problem"]


def test_a_page_of_another_project_changes_nothing(client: TestClient, app_state: AppState) -> None:
    imported(client, {"a.png": png(), "a.txt": b"of this project"})
    caption = app_state.project.dataset_folder / "a.txt"
    left_behind = {"X-Easel-Project": "an%20older%20one"}
    for path, sent in (
        ("caption", {"picture": "a.png", "text": "?"}),
        ("leave-out", {"pictures": ["a.png"]}),
    ):
        answer = client.post(f"/easel/{path}", json=sent, headers=left_behind)
        assert "another project" in answer.json()["problem"]
    assert caption.read_text() == "of this project"
    here = {"X-Easel-Project": app_state.project.path.name}
    assert client.post("/easel/caption", json={"picture": "a.png", "text": "mine"}, headers=here).json()[
        "saved"
    ]
    assert caption.read_text() == "mine"


def test_what_waits_while_another_project_is_opened_changes_nothing(
    client: TestClient, app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stroke that came before the other project was opened, and has its turn after it."""
    opened, first = app_state.projects, app_state.project.path.name
    opened.new("Other")
    opened.open(first)
    folders = [opened.folder / key / "pictures" for key in (first, "other")]
    for folder in folders:
        (folder / "a.png").write_bytes(png())
        (folder / "a.txt").write_text("as it was")
    lock = app_state.project._file_lock
    acquire = lock.acquire

    def switched(timeout: float) -> object:
        other = threading.Thread(target=opened.open, args=("other",))
        other.start()
        other.join()
        return acquire(timeout)

    monkeypatch.setattr(lock, "acquire", switched)
    sent = {"picture": "a.png", "text": "mine"}
    answer = client.post("/easel/caption", json=sent, headers={"X-Easel-Project": first})
    assert answer.json()["problem"] == OTHER_PROJECT
    assert [(folder / "a.txt").read_text() for folder in folders] == ["as it was"] * 2
    # Neither is locked for good.
    monkeypatch.undo()
    for key in (first, "other"):
        opened.open(key)
        assert client.post("/easel/caption", json=sent, headers={"X-Easel-Project": key}).json()["saved"]


def test_fields_of_gradio_change_the_project_that_their_page_shows(app_state: AppState) -> None:
    first = app_state.project.path.name
    with TestClient(build_app(app_state, ["testserver"])) as page:
        config = page.get("/config").json()

        def fired(name: str, shown: str, *data: str) -> Any:
            """The answer to the first event of a component, sent by a page that shows a project."""
            own = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == name)
            events = (
                one for one in config["dependencies"] if own in [target for target, _ in one["targets"]]
            )
            sent = {"data": data, "fn_index": next(events)["id"], "session_hash": "page"}
            return page.post("/gradio_api/run/predict", json=sent, headers={"X-Easel-Project": shown}).json()

        assert "error" not in fired("trigger", first, "zwx")
        assert app_state.project.draft()["trigger"] == "zwx"
        app_state.projects.new("Other")
        assert fired("trigger", first, "abc")["error"] == OTHER_PROJECT
        assert not app_state.project.draft().get("trigger")
        # What opens a project goes on in it.
        assert "error" not in fired("use-demo", "other")
        assert app_state.project.uses_demo
    assert (app_state.project.path.parent / first / "draft.json").read_bytes().count(b"zwx") == 1


@pytest.mark.skipif(os.name == "nt", reason="no pipes and no such names there")
def test_a_hostile_folder_comes_in_without_harm(
    client: TestClient, app_state: AppState, tmp_path: Path
) -> None:
    """A pipe once hung the import for good, and a lone surrogate broke the page."""
    folder = tmp_path / "from"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    (folder / "metadata.jsonl").write_text(r'{"file_name": "\ud800.png", "text": "x"}')
    os.mkfifo(folder / "pipe.png")
    (folder / "a.txt").symlink_to("/etc/hostname")
    (folder / "zero.txt").symlink_to("/dev/zero")
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write(png(2))
    client.post("/easel/import", json={"path": str(folder)})
    state = settled(client, "import")
    assert state["state"] == "done"
    assert state["note"].startswith("1 image added. 5 files skipped, the first: a.txt is a link to a file")
    shutil.copy(folder / "a.png", os.fsencode(app_state.project.image_folder) + b"/\xfe.png")
    app_state.project.invalidate()
    (app_state.project.image_folder / "mask").mkdir()
    (app_state.project.image_folder / "mask" / "z.png").write_bytes(png(3))
    assert [(one["name"], one["caption"]) for one in shelf(client)] == [("a.png", "")]
    found = summarize(app_state.project.dataset(), app_state.project.notes, False, [])
    shown = "\n".join(found["sentences"])
    for words in ("pipe.png is a pipe", "a.txt is a link to a file outside", "�.png", "mask/z.png is a mask"):
        assert words in shown
    shown.encode()
    client.post("/easel/check", json={})
    rows = {(row["picture"], row["kind"]) for row in settled(client, "check")["problems"]}
    assert {("mask/z.png", "mask"), ("�.png", "name")} <= rows
    assert client.post("/easel/leave-out", json={"pictures": ["�.png"]}).json() == {"left_out": 1}


def test_the_demo_is_a_project_of_its_own(app_state: AppState, client: TestClient) -> None:
    app_state.projects.open_titled("Demo")
    app_state.project.update_draft(dataset="demo")
    demo = app_state.project.path
    # An import opens the project of the user's own images.
    state = imported(client, {"a.png": png()})
    assert (state["note"], state["project"]) == ("1 image added.", "default")
    assert (app_state.project.title, app_state.project.uses_demo) == ("My images", False)
    assert len(app_state.project.dataset().records) == 1
    assert not list((demo / "pictures").iterdir())
    app_state.projects.open_titled("Demo")
    assert (app_state.project.path, app_state.project.uses_demo) == (demo, True)


def test_concepts_are_made_edited_and_taken_back(client: TestClient, app_state: AppState) -> None:
    files = {f"{folder}/{n}.png": png(n + at) for folder, at in (("3_cat", 0), ("dog", 4)) for n in (0, 1)}
    imported(client, files)
    folder = app_state.project.image_folder

    def table() -> str:
        return client.get("/easel/concepts").json()["html"]

    def change(**sent: Any) -> dict[str, Any]:
        return client.post("/easel/concepts", json=sent).json()

    assert 'id="concepts-make"' in table()
    assert "data-concept" not in table()
    made = change(do="make")
    assert (made["before"], (folder / "dataset.toml").read_text()) == ("", made["after"])
    assert "75.0%" in table()
    shares = [change(do="set", number=number, key="share", value=1) for number in (1, 2)]
    change(do="set", number=2, key="trigger", value=HOSTILE)
    assert "<img" not in table()
    assert "50.0%" in table()
    assert [record.concept.share for record in app_state.project.dataset().records] == [1.0] * 4
    texts = [
        client.post("/easel/tokens", json={"text": "a cat", "picture": f"{of}/0.png"})
        for of in ("3_cat", "dog")
    ]
    plain, own = (answer.json()["tokens"] for answer in texts)
    assert own > plain  # the trigger of its concept comes to it
    # What was changed since is not overwritten.
    late = change(do="restore", text=shares[1]["before"], now=shares[1]["after"])
    assert "changed since" in late["problem"]
    change(do="set", number=2, key="trigger", value="")
    change(do="restore", text=shares[1]["before"], now=shares[1]["after"])
    assert "gives some concepts a share and others none (dog)" in table()
    for sent, says in (
        ({"number": 1, "key": "num_repeats", "value": 0}, "num_repeats = 0 is not"),
        ({"number": "x", "key": "role", "value": "style"}, "no concept 0"),
        ({"number": 1, "key": "role", "value": {"a": [1]}}, "is not one of subject"),
        ({"do": "make"}, "gives some concepts a share"),
    ):
        assert says in change(**sent)["problem"]
    (folder / "late").mkdir()
    (folder / "late" / "new.png").write_bytes(png(9))
    change(do="restore", text=made["after"], now=shares[0]["after"])
    assert "1 image in no concept" in table()
    change(do="make")
    assert [one.concept.name for one in app_state.project.dataset().records][-1] == "late"
    change(do="restore", text="", now=(folder / "dataset.toml").read_text())
    assert not (folder / "dataset.toml").exists()


def test_an_import_that_is_cancelled_goes_on_another_time(
    client: TestClient, app_state: AppState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "originals"
    folder.mkdir()
    for seed in range(6):
        (folder / f"{seed}.png").write_bytes(png(seed))
    plain = importer.transfer_file

    def transfer(source: Path, *more: Any) -> None:
        plain(source, *more)
        if source.name == "2.png":
            app_state.importer.cancel()

    monkeypatch.setattr(importer, "transfer_file", transfer)
    client.post("/easel/import", json={"path": str(folder)})
    state = settled(client, "import")
    assert state["state"] == "failed"
    assert "cancelled" in state["note"]
    assert [one["name"] for one in shelf(client)] == ["0.png", "1.png", "2.png"]
    client.post("/easel/import", json={"path": str(folder)})
    assert settled(client, "import")["note"] == "3 images added. 3 images are already here, skipped."


def test_a_check_that_is_cancelled_goes_on_another_time(
    client: TestClient, app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, opened, go_on = audit.open_image, [], threading.Event()

    def slow(record: Any, *more: Any) -> Any:
        opened.append(record.path.name)
        assert go_on.wait(PATIENCE)
        return plain(record, *more)

    monkeypatch.setattr(audit, "open_image", slow)
    monkeypatch.setattr(audit, "_THREADS", 1)
    assert client.post("/easel/check", json={}).json()["state"] == "working"
    wait_for(lambda: opened)
    assert client.post("/easel/check", json={"do": "cancel"}).json()["state"] == "idle"
    go_on.set()
    wait_for((app_state.project.path / findings.LOOKS).is_file)
    client.post("/easel/check", json={})
    assert settled(client, "check")["state"] == "done"
    assert sorted(opened) == sorted(picture.name for picture in pictures)


def test_a_look_at_many_images_counts_them_once(
    app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    plain = preflight.varies_by_draw
    monkeypatch.setattr(app_state.checks, "known", lambda config, dataset: [])
    monkeypatch.setattr(
        preflight, "varies_by_draw", lambda one, rules: (asked.append(one.caption), plain(one, rules))[1]
    )
    shown = [details(take_snapshot(app_state)) for _ in range(3)]
    assert len(set(shown)) == 1
    assert len(asked) == 3
    assert app_state.project.images() is app_state.project.images()
    app_state.project.save_caption("picture-0.png", "a red | a blue one")
    assert details(take_snapshot(app_state)) != shown[0]
    assert len(asked) == 6


def test_a_long_choice_is_taken_and_one_that_is_too_long_is_said_to_be(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"a folder/and an image with a long name, {n}.png" for n in range(30_000)]
    answer = client.post("/easel/leave-out", json={"pictures": names})
    assert "There is no image named" in answer.json()["problem"]
    too_many = "That is more than can be sent at once; choose fewer images."
    for sent in ({"pictures": ["a"] * 100_001}, {"folders": dict.fromkeys(map(str, range(100_001)), "")}):
        path = "leave-out" if "pictures" in sent else "move"
        assert client.post(f"/easel/{path}", json=sent).json() == {"problem": too_many}
    monkeypatch.setattr(routes, "LARGEST_JSON", 1000)
    answer = client.post("/easel/leave-out", json={"pictures": ["a" * 1000]})
    assert (answer.status_code, answer.json()) == (200, {"problem": too_many})


def test_a_concept_that_moved_up_is_not_taken_for_another(client: TestClient, app_state: AppState) -> None:
    imported(client, {"cat/a.png": png(1), "dog/b.png": png(2)})
    client.post("/easel/concepts", json={"do": "make"})
    removal = {"do": "set", "number": 1, "was": "cat", "key": "image_dir", "value": ""}
    assert "problem" not in client.post("/easel/concepts", json=removal).json()
    # As a second press of the same button, where the next concept has the number now.
    assert "changed since" in client.post("/easel/concepts", json=removal).json()["problem"]
    assert 'image_dir = "dog"' in (app_state.project.image_folder / "dataset.toml").read_text()
