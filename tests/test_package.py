"""The wheel, built from the sdist and used where the checkout cannot be read; workflows, their scripts, and
the container."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

import launch
from app import install
from app.main import main as window_main
from lora_core.system import hardware
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OUT_OF_REACH = """
import os, sys
def refuse(event, arguments, within={within!r}):
    if event == "open" and isinstance(arguments[0], str) and os.path.abspath(arguments[0]).startswith(within):
        raise PermissionError(13, "is in the checkout", arguments[0])
sys.addaudithook(refuse)
"""
COMMAND = "import importlib.metadata as m, sys; name = sys.argv.pop(1);"
COMMAND += "(one,) = m.distribution('lora-easel').entry_points.select(name=name); sys.exit(one.load()())"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist alone, without a network."""
    pytest.importorskip("hatchling", reason="the extra `test` brings hatchling: python launch.py test")
    folder = tmp_path_factory.mktemp("package")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True, capture_output=True)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / source.name.removesuffix(".tar.gz")
    assert (unpacked / "tests" / "conftest.py").is_file()
    (unpacked / "site" / "assets").mkdir(parents=True)
    for name in ("index.html", "assets/site.js.map"):
        (unpacked / "site" / name).touch()
    subprocess.run([*build, "wheel"], cwd=unpacked, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with the wheel installed by pip, and with the checkout out of reach of what runs from it."""
    target = wheel.parent / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, cwd=wheel.parent)
    within = tuple(str(ROOT / name) + os.sep for name in ("app", "lora_core", "assets", "docs"))
    (target / "sitecustomize.py").write_text(OUT_OF_REACH.format(within=within), encoding="utf-8")
    return target


def environment(installed: Path) -> dict[str, str]:
    one_core = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **one_core, "PYTHONPATH": str(installed)}


def test_window_and_training_work_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    words = ["lora-easel-window", "--no-browser", "--port", "0", "--workspace", str(tmp_path)]
    window = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        cwd=tmp_path,
        env=environment(installed),
        stdout=subprocess.PIPE,
        text=True,
    )
    sets = ("train.steps=2", "validation.every=0", "sample.every=0", "train.batch_size=1")
    words = ["lora-easel", "train", "demo", "--name", "a", "--workspace", str(tmp_path)]
    words += [word for one in sets for word in ("--set", one)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *words],
            cwd=tmp_path,
            env=environment(installed),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        exported = Path(done.stdout.splitlines()[-1])
        assert exported.suffix == ".safetensors"
        assert exported.is_file()
        assert window.stdout is not None
        address = window.stdout.readline().removeprefix("Ready at ").strip()
        for path, words_in_it in (("", "gradio"), ("easel/assets/page.js", "window.easel")):
            with urllib.request.urlopen(f"{address}/{path}") as answer:
                assert words_in_it in answer.read().decode(), path
    finally:
        window.terminate()
        window.communicate()


def test_what_is_installed_knows_that_it_is_no_checkout(installed: Path, tmp_path: Path) -> None:
    code = "from lora_core.system import files, hardware; print(files.ASSETS, hardware.REINSTALL, sep='\\n')"
    command, around = [sys.executable, "-c", code], environment(installed)
    said = subprocess.run(command, cwd=tmp_path, env=around, stdout=subprocess.PIPE, text=True, check=True)
    assets, advice = said.stdout.splitlines()
    assert Path(assets) == installed / "lora_core" / "assets"
    assert "launch.py" not in advice
    assert "launch.py" in hardware.REINSTALL


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = message_from_bytes(archive.read(next(n for n in names if n.endswith("dist-info/METADATA"))))
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"app", "lora_core", "lora_easel"}
    assert wheel.name == f"lora_easel-{PROJECT['version']}-py3-none-any.whl"
    assert (about["Name"], about["Version"]) == (PROJECT["name"], PROJECT["version"])
    # Everything that has a licence of its own ships with it, and is named in NOTICE.
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "assets").rglob("*LICENSE")}
    assert set(about.get_all("License-File")) == {"LICENSE", "NOTICE", *ours}
    vendor = {path.name.split(".")[0] for path in (ROOT / "assets" / "vendor").iterdir()}
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert [name for name in vendor if f"assets/vendor/{name}" not in notice] == []
    missing = [name for name in vendor if f"assets/vendor/{name}.LICENSE" not in ours]
    assert missing == []
    assert not [name for name in names if "/make/" in name or name.endswith(("install.py", ".pyc"))]
    site = [name for name in names if "/site/" in name]
    assert site == ["lora_core/assets/site/index.html"]
    tables = {path.name for path in (ROOT / "assets").glob("*.toml")}
    assert tables <= {Path(name).name for name in names if name.startswith("lora_core/assets/")}


def test_name_and_version_are_written_once() -> None:
    version = re.compile(rf"\b{re.escape(PROJECT['version'])}\b")
    texts = {
        path: path.read_text(encoding="utf-8")
        for top in ("app", "lora_core")
        for path in (ROOT / top).rglob("*.py")
    }
    assert [path.name for path, text in texts.items() if version.search(text)] == []


def test_the_extras_are_those_that_launch_installs() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {*install.EXTRAS, *install.CARD_EXTRAS} <= set(extras)
    (everything,) = extras["all"]
    assert everything == f"{PROJECT['name']}[{','.join(install.EXTRAS)}]"


def test_nothing_says_to_install_our_name_from_an_index() -> None:
    """No index has the project: another's package could be given its name there."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "launch.py"]
    for top in ("app", "lora_core", "assets"):
        pages += [
            path for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".html", ".js", ".j2", ".toml")
        ]
    asks = re.compile(
        r"(pip|pipx|uv tool) install[^\n`]*(?<![\w./-])lora[-_]easel(?![\w-]*\.whl|[-_][\d*])|uvx lora-easel"
    )
    found = [f"{page}: {hit[0]}" for page in pages for hit in asks.finditer(page.read_text(encoding="utf-8"))]
    assert found == []


# What others run: workflows, their scripts, the container


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BASH = pytest.mark.skipif(os.name == "nt" or not shutil.which("bash"), reason="needs bash")


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    return [step for job in jobs for step in job.get("steps", ())]


def test_the_workflows_run_what_there_is() -> None:
    words = {step["run"] for workflow in WORKFLOWS for step in steps(workflow) if "run" in step}
    scripts = {script for line in words for script in re.findall(r"\.ci/\w+", line)}
    assert {f".ci/{path.name}" for path in (ROOT / ".ci").iterdir()} == scripts
    assert [name for name in scripts if os.name != "nt" and not os.access(ROOT / name, os.X_OK)] == []
    assert {"python launch.py test", "python launch.py test -m slow"} <= words
    test = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    matrix = test["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["system"]} == {"ubuntu", "windows", "macos"}
    assert {launch.version_problem(tuple(map(int, one.split(".")))) for one in matrix["python"]} == {""}


def test_no_package_registry_is_named() -> None:
    files = [*WORKFLOWS, *(ROOT / ".ci").iterdir(), *(ROOT / name for name in ("Dockerfile", "compose.yaml"))]
    texts = [file.read_text(encoding="utf-8") for file in files]
    hosts = {host for text in texts for host in re.findall(r"https?://([\w.-]+)", text)}
    assert hosts <= {"localhost", "127.0.0.1", urlsplit(install.TORCH_INDEX).hostname}


@BASH
@pytest.mark.parametrize("page", ["a page of gradio", "something else"])
def test_the_window_is_asked_for_its_page(page: str, tmp_path: Path) -> None:
    server = (
        "import http.server as h, os\n"
        "class Page(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        f"        self.send_response(200); self.end_headers(); self.wfile.write({page.encode()!r})\n"
        "server = h.HTTPServer(('127.0.0.1', 0), Page)\n"
        "print(f'Ready at http://127.0.0.1:{server.server_port}', flush=True)\n"
        "server.serve_forever()\n"
    )
    (tmp_path / "server.py").write_text(server)
    python = tmp_path / "python"
    script = f'#!/bin/sh\n[ "$1" = launch.py ] && exec "{sys.executable}" -S "{tmp_path}/server.py"\n'
    python.write_text(script + f'exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    around = {**os.environ, "PATH": path}
    done = subprocess.run([ROOT / ".ci" / "window"], env=around, capture_output=True, check=False)
    assert (done.returncode == 0) == ("gradio" in page)


@BASH
@pytest.mark.parametrize(("tag", "code"), [("v1.2.0", 0), ("v1.3.0", 1)])
def test_a_release_is_of_the_version_that_its_tag_says(tag: str, code: int, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "package", tmp_path / ".ci")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    answers = '"hatchling version") echo 1.2.0;; "hatchling build") mkdir "$5";; "mkdocs build") mkdir site;;'
    python.write_text(f'#!/bin/sh\ncase "$2 $3" in {answers} *) exit 2;; esac\n')
    python.chmod(0o755)
    done = subprocess.run([tmp_path / ".ci" / "package", tag], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert (tmp_path / "dist").is_dir() == (tmp_path / "site").is_dir() == (code == 0)
    assert ("v1.3.0 is not that of version 1.2.0" in done.stderr) == (code == 1)


def test_the_container_is_built_from_what_the_project_says(tmp_path: Path) -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.M))
    assert launch.version_problem(tuple(map(int, arguments["PYTHON"].split(".")))) == ""
    assert arguments["EXTRAS"] in PROJECT["optional-dependencies"]
    assert f'--index-url "{install.TORCH_INDEX}${{TORCH}}"' in text
    # The range of PyTorch's versions is read from pyproject.toml by the same expression.
    (expression,) = re.findall(r"sed -n '(.*)' pyproject.toml", text)
    pattern, put = re.fullmatch(r"s/(.*)/(.*)/p", expression).groups()  # type: ignore[union-attr]
    python = pattern.replace(r"\(", "(").replace(r"\)", ")")
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    found = [re.sub(python, put, line) for line in lines if re.search(python, line)]
    assert found == [one for one in PROJECT["dependencies"] if one.startswith("torch")]


def test_the_context_of_the_container_is_enough_for_the_wheel() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    needed = {path.strip("/") for path in hatch["targets"]["wheel"]["include"]}
    needed |= {path for path in PROJECT["license-files"] if "/" not in path}
    needed |= {PROJECT["readme"], "pyproject.toml"}
    assert let_in == needed


def test_a_published_port_needs_a_password() -> None:
    (service,) = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    assert service["environment"]["LORA_EASEL_PASSWORD"].startswith("${LORA_EASEL_PASSWORD:?")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
    command, *options = json.loads(entry)
    assert command in PROJECT["scripts"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORA_EASEL_PASSWORD", raising=False)
        assert window_main(options) == 1
