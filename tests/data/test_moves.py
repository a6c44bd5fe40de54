"""A picture and its caption stay together: whatever is killed, fails, or happens at once."""

import base64
import functools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lora_core.data import importer
from lora_core.data.images import ImageInfo, check_mask_png
from lora_core.errors import DatasetError, RunError
from lora_core.projects import caption_edits
from lora_core.projects import project as moves
from lora_core.projects.caption_edits import Edit
from lora_core.projects.project import Project, leave_out, list_left_out, take_back
from lora_core.verbs import datasets
from tests.data.conftest import Draw, listed
from tests.faults import Fault, armed

NAMES = ["a.png", "sub/b.png", "c.png"]


@pytest.fixture
def project(tmp_path: Path, draw: Draw) -> Project:
    made = Project(tmp_path / "projects" / "mine")
    for seed, name in enumerate(NAMES):
        draw(made.image_folder / name, (16, 16), seed, f"words of {name}")
    draw(made.image_folder / "a-masklabel.png", (16, 16), 7)
    return made


def together(project: Project) -> dict[str, str]:
    """Picture to the folder that it is in, and nothing may be parted, doubled or without its own caption."""
    found = {}
    for folder in (project.image_folder, project.left_out_folder):
        names = listed(folder) if folder.is_dir() else []
        pictures = [name for name in names if name.endswith(".png") and "masklabel" not in name]
        for name in pictures:
            assert name not in found, f"{name} is there twice"
            found[name] = folder.name
            assert (folder / name).with_suffix(".txt").read_text() == f"words of {name}"
        stems = {Path(name).stem.removesuffix("-masklabel") for name in names}
        assert stems == {Path(name).stem for name in pictures}, folder.name
    assert sorted(found) == sorted(NAMES)
    assert found["a.png"] == (
        "pictures" if (project.image_folder / "a-masklabel.png").exists() else "left out"
    )
    return found


def test_a_mask_of_any_name_goes_with_its_image(project: Project, draw: Draw) -> None:
    """Left behind, it would be an image to train on."""
    draw(project.image_folder / "c_mask.png", (16, 16), 8)
    leave_out(project, ["c.png"])
    assert [record.path.name for record in project.dataset().records] == ["a.png", "b.png"]
    take_back(project, ["c.png"])
    masks = {record.path.name: record.mask and record.mask.name for record in project.dataset().records}
    assert masks == {"a.png": "a-masklabel.png", "b.png": None, "c.png": "c_mask.png"}


# Forks one child for each kill, as starting an interpreter for each would take a second.
KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from lora_core.projects.caption_edits import Edit, apply, undo
from lora_core.projects.project import Project, leave_out, take_back

folder, how, names = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
WRITES = ("os.rename", "os.remove", "os.mkdir", "shutil.copyfile")
EDIT = Edit("replace", "words", "signs")
WORKS = {
    "caption": lambda project: project.save_caption("a.png", "other words"),
    "stroke": lambda project: project.write_mask("a.png", names[-1]),
    "edit": lambda project: apply(project, EDIT, None),
    "undo": undo,
}

def move(project):
    (take_back if (folder / "left out" / names[0]).exists() else leave_out)(project, names)

def act(placed, work=move):
    project = Project(folder)
    if work is undo:
        apply(project, EDIT, None)
    left = placed

    def hook(event, arguments):
        nonlocal left
        if event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if placed:
        sys.addaudithook(hook)
    work(project)

def round(placed, wait, *work):
    child = os.fork()
    if not child:
        try:
            act(placed, *work)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, status
    print("killed" if os.WIFSIGNALED(status) else "done", flush=True)
    sys.stdin.readline()
    return os.WIFSIGNALED(status)

if how in WORKS:
    placed = 1
    while round(placed, None, WORKS[how]):
        placed += 1
elif how == "placed":
    for _ in range(2):
        placed = 1
        while round(placed, None):
            placed += 1
else:
    began = time.monotonic()
    round(0, None)
    took, draw = time.monotonic() - began, random.Random(int(how))
    for _ in range(25):
        round(0, draw.random() * took)
    # On a machine that became busy meanwhile all of them may have come before the first move.
    round(0, None)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
@pytest.mark.parametrize("how", ["placed", "0"])
def test_a_kill_parts_no_picture_from_its_caption(project: Project, how: str) -> None:
    command = [sys.executable, "-c", KILLED, str(project.path), how, json.dumps(NAMES[:2])]
    kills, places = 0, set()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            kills += line == "killed\n"
            found = together(Project(project.path))
            # All of one request, or none of it.
            assert found["a.png"] == found["sub/b.png"]
            places.add(found["a.png"])
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert kills >= 10 or how != "placed"
    assert places == {"pictures", "left out"}
    assert not (project.path / moves.JOURNAL).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
@pytest.mark.parametrize("how", ["caption", "stroke", "edit", "undo"])
def test_a_kill_loses_no_caption_and_no_mask(project: Project, draw: Draw, tmp_path: Path, how: str) -> None:
    """At each write: every file is as it was or as it will be, and what was edited can be undone."""
    draw(tmp_path / "new.png", (16, 16), 9)
    stroke = base64.b64encode((tmp_path / "new.png").read_bytes()).decode()
    new_mask = check_mask_png(stroke, ImageInfo(16, 16, False), "")
    command = [sys.executable, "-c", KILLED, str(project.path), how, json.dumps([stroke])]
    mask = project.image_folder / "a-masklabel.png"
    old, old_mask, ends = {name: f"words of {name}" for name in NAMES}, mask.read_bytes(), list[str]()
    new = {name: words.replace("words", "signs") for name, words in old.items()}
    new = {**old, "a.png": "other words"} if how == "caption" else new
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            ends.append(line.strip())
            again = Project(project.path)
            found = {name: record.caption for name, record in again.images().items()}
            assert all(found[name] in (old[name], new[name]) for name in NAMES)
            assert mask.read_bytes() in (old_mask, new_mask)
            assert again.dataset().problems == []
            if how in ("edit", "undo"):
                # What is noted comes before what is written, so that it can be taken back.
                assert found == old or caption_edits.last_change(again)
                if caption_edits.last_change(again):
                    caption_edits.undo(again)
                assert {name: record.caption for name, record in again.images().items()} == old
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert ends == ["killed"] * (len(ends) - 1) + ["done"]
    assert len(ends) > (6 if how in ("edit", "undo") else 2)
    assert found == (new if how in ("caption", "edit") else old)
    assert (mask.read_bytes() == new_mask) == (how == "stroke")


@pytest.mark.parametrize("text", ["", "{", "[3]", '[["/x", "a", 0]]', '[["../x", "../y", 0]]', "[" * 9999])
def test_a_journal_of_somebody_else_moves_nothing(project: Project, tmp_path: Path, text: str) -> None:
    (tmp_path / "projects" / "x").write_text("outside")
    (project.path / moves.JOURNAL).write_text(text)
    assert set(together(Project(project.path)).values()) == {"pictures"}
    assert (tmp_path / "projects" / "x").read_text() == "outside"
    assert not (project.path / moves.JOURNAL).exists()


def test_a_move_that_fails_leaves_everything_where_it_was(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def locked(source: Path, target: Path) -> None:
        if Path(source).name == "b.txt" and "left out" in str(target):
            raise PermissionError(13, "Permission denied", str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", locked)
    with pytest.raises(DatasetError, match=r"b\.txt cannot be moved \(Permission denied\)"):
        leave_out(project, NAMES)
    assert set(together(project).values()) == {"pictures"}
    monkeypatch.undo()
    assert leave_out(project, NAMES) == 3
    assert set(together(project).values()) == {"left out"}


def test_a_caption_of_two_pictures_stays_with_both(project: Project, draw: Draw) -> None:
    draw(project.image_folder / "two.png", seed=8, caption="both")
    draw(project.image_folder / "two.jpg", seed=9)
    project.invalidate()
    leave_out(project, ["two.png"])
    assert project.find_image("two.jpg").caption == "both"
    assert [record.caption for record in list_left_out(project)] == ["both"]
    take_back(project, ["two.png"])
    assert [project.find_image(name).caption for name in ("two.jpg", "two-2.png")] == ["both", "both"]
    draw(project.image_folder / "two-2.jpg", seed=10)
    project.invalidate()
    with armed(Fault("rename", "left out/two-2.txt")), pytest.raises(DatasetError, match="No space left"):
        leave_out(project, ["two-2.png"])
    assert list(project.left_out_folder.rglob(".*")) == []


def test_a_caption_that_waits_for_its_picture_is_met_again(project: Project) -> None:
    leave_out(project, ["c.png"])
    (project.left_out_folder / "c.txt").rename(project.image_folder / "c.txt")
    take_back(project, ["c.png"])
    assert set(together(project).values()) == {"pictures"}


def test_nothing_is_written_over(project: Project, draw: Draw) -> None:
    leave_out(project, ["c.png"])
    (project.image_folder / "c.txt").write_text("another")
    take_back(project, ["c.png"])
    assert (project.image_folder / "c.txt").read_text() == "another"
    assert (project.image_folder / "c-2.txt").read_text() == "words of c.png"


def test_two_pages_at_once_leave_no_orphans(project: Project) -> None:
    """Bulk changes and their undo in one, leaving out and taking back in another."""
    ended: list[int] = []

    def page(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(15):
            name = draw.choice(NAMES)
            try:
                match draw.randrange(4):
                    case 0:
                        caption_edits.apply(project, Edit("append", put=f", {seed}"), None)
                    case 1:
                        caption_edits.undo(project)
                    case 2:
                        leave_out(project, [name])
                    case 3:
                        take_back(project, [name])
            except DatasetError:  # it is in the other folder now
                continue
        ended.append(seed)

    pages = [threading.Thread(target=page, args=(seed,)) for seed in range(4)]
    for thread in pages:
        thread.start()
    for thread in pages:
        thread.join()
    assert sorted(ended) == [0, 1, 2, 3]
    files = [name for folder in (project.image_folder, project.left_out_folder) for name in listed(folder)]
    assert sorted(files) == sorted([*NAMES, *(n.replace("png", "txt") for n in NAMES), "a-masklabel.png"])
    for folder in (project.image_folder, project.left_out_folder):
        stems = {Path(name).stem for name in listed(folder) if name.endswith(".png") and "mask" not in name}
        assert {Path(name).stem for name in listed(folder) if name.endswith(".txt")} == stems


def test_another_process_that_holds_the_project_is_waited_for(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_core.projects.project._PATIENCE", 0.05)
    with Project(project.path).lock(), pytest.raises(DatasetError, match="being changed by another"):
        leave_out(project, ["a.png"])
    assert leave_out(project, ["a.png"]) == 1


def test_an_import_of_another_process_is_waited_for(
    project: Project, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each looks for a free name first: of two at once, one would write over the other's images."""
    monkeypatch.setattr("lora_core.projects.project._PATIENCE", 0.05)
    draw(tmp_path / "more" / "a.png", seed=9, caption="another")
    bring = functools.partial(
        datasets.projects_import, project.path.name, tmp_path / "more", workspace=tmp_path
    )
    with Project(project.path).importing(), pytest.raises(RunError, match="Another import into the project"):
        bring()
    assert bring()["added"] == 2


def test_two_windows_keep_what_each_wrote_into_the_form(project: Project, tmp_path: Path) -> None:
    other = Project(project.path)
    project.update_draft(trigger="sks", values={"train.steps": 77})
    other.link(tmp_path)
    project.update_draft(goal="style")
    kept = {"trigger": "sks", "values": {"train.steps": 77}, "linked": [str(tmp_path)], "goal": "style"}
    assert project.draft() == Project(project.path).draft() == kept
    # A file that was removed or spoiled meanwhile takes nothing along.
    (project.path / "draft.json").unlink()
    project.update_draft(goal="object")
    assert Project(project.path).draft() == kept | {"goal": "object"}


def test_what_a_killed_write_left_beside_images_goes_when_the_project_opens(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder, large = project.image_folder, project.path / "former masks"
    large.mkdir()
    left = [folder / f".a.txt.{gone.pid}-1.tmp", folder / "sub" / f".b-masklabel.png.{gone.pid}-77.tmp"]
    # Perhaps of another computer, of other programs, and what a page may still put back.
    now = [folder / f".c.txt.{gone.pid}-1.tmp", large / "new"]
    others = [folder / ".own.tmp", folder / ".own.1.tmp", folder / f".notes.{gone.pid}-11.tmp"]
    stays, old = [*now, *others], large / "old"
    for file in (*left, *stays, old):
        file.write_bytes(b"half")
    seen: list[Path] = []

    def killed(source: Path, into: Path, **more: object) -> None:
        seen.append(into.parent)
        raise DatasetError("as if killed")

    monkeypatch.setattr(importer, "unpack", killed)
    importer.import_files([tmp_path / "images.zip"], folder)
    left.append(seen[0])
    (seen[0] / "files").mkdir(parents=True)
    for file in (*left, *others, old):
        os.utime(file, (0, 0))
    Project(project.path)
    assert [file for file in (*left, old) if file.exists()] == []
    assert all(file.exists() for file in stays)
