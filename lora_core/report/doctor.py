"""Diagnoses this computer: a list of checks with findings and fixes, and a zip of them for a bug report.

Nothing is changed and nothing is downloaded. PyTorch is imported in a function, so that a broken one is a
finding.
"""

import contextlib
import gettext
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lora_core.errors import RunError
from lora_core.runs.diagnosis import debug_zip
from lora_core.runs.folder import all_runs
from lora_core.system.files import (
    ASSETS,
    IS_CHECKOUT,
    folder_bytes,
    free_bytes,
    workspace_path,
    write_atomically,
)
from lora_core.system.files import workspace as workspace_folder
from lora_core.system.hardware import REINSTALL, Card, card_problem, find_card
from lora_core.system.other_tools import find_tools
from lora_core.system.processes import FIRST_PORT, LANGUAGE, PORTS_TRIED

PROJECT = "lora-easel"
LITTLE_DISK, LITTLE_MEMORY = 5 * 10**9, 2 * 10**9
LARGE_CACHE = 10**9
"""Bytes whose removal is advised where the drive is nearly full."""
LONGEST_BELOW = 130
"""Characters that the path of a file inside a workspace adds to that of the workspace."""
LONGEST_PATH = 260
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "ACCELERATE_USE_CPU", "HSA_OVERRIDE_GFX_VERSION",
    "PYTORCH_ENABLE_MPS_FALLBACK", "HF_HUB_OFFLINE",
)  # fmt: skip


def _(text: str, **values: object) -> str:
    """A text in the language that is asked for; the values fill its {placeholders}."""
    languages = [os.environ.get(LANGUAGE, "en")]
    return (
        gettext.translation("easel", ASSETS / "locale", languages, fallback=True)
        .gettext(text)
        .format(**values)
    )


@dataclass(frozen=True)
class Check:
    """The name of the check, in English, the finding, and the fix, a sentence; "" if all is well."""

    name: str
    found: str
    fix: str = ""


def diagnosis(workspace: Path | None = None) -> dict[str, Any]:
    """All checks: `ok`, and `checks` with `name`, `found`, `ok` and `fix` each."""
    checks = [
        check
        for part in (_python, _packages, _torch, _memory, lambda: _folders(workspace), _port, _others)
        for check in part()
    ]
    rows = [{**asdict(check), "ok": not check.fix} for check in checks]
    return {"ok": all(row["ok"] for row in rows), "checks": rows}


def write_zip(target: Path, found: dict[str, Any], workspace: Path | None = None) -> None:
    """Write a zip for a bug report: what `diagnosis` found, and of the newest run what `debug_zip` takes."""
    # These name projects, runs and folders of the user.
    private = ("Permissions", "Hub cache", "Temporary files", "Other tools")
    lines = [
        f"{'ok   ' if row['ok'] else 'WRONG'} {row['name']}:"
        f" {'left out' if row['name'] in private else row['found']} {row['fix']}".rstrip()
        for row in found["checks"]
    ]
    home, more = workspace_path(workspace), {"doctor.txt": "\n".join(lines)}
    newest = next(iter(all_runs(home)), None)
    write_atomically(target, debug_zip(newest, home, _card_words(find_card(hidden=True)), more))


def _python() -> Iterator[Check]:
    bits = 64 if sys.maxsize > 2**32 else 32
    *older, newest = _supported_pythons()
    fits = "{}.{}".format(*sys.version_info) in (*older, newest) and bits == 64
    versions = _("{older} or {newest}", older=", ".join(older), newest=newest) if older else newest
    then = _("start `python launch.py repair` with it")
    if not IS_CHECKOUT:
        then = _("install LoRA Easel's wheel with it")
    fix = _("Install a 64-bit Python {versions} and {then}.", versions=versions, then=then)
    found = _(
        "{version}, {bits} bit, {path}", version=platform.python_version(), bits=bits, path=sys.executable
    )
    yield Check("Python", found, "" if fits else fix)
    intel_mac = (sys.platform, platform.machine()) == ("darwin", "x86_64")
    no_mac = _(
        "PyTorch needs an Apple processor and a Python made for it (arm64): install that and {then}.",
        then=then,
    )
    yield Check("System", platform.platform(), no_mac if intel_mac else "")


def _supported_pythons() -> list[str]:
    """Minor versions ("3.11") that pyproject.toml allows; where the project is not installed, this one."""
    try:
        declared = SpecifierSet(importlib.metadata.metadata(PROJECT)["Requires-Python"])
    except importlib.metadata.PackageNotFoundError:
        return ["{}.{}".format(*sys.version_info)]
    return [f"3.{minor}" for minor in range(50) if declared.contains(f"3.{minor}")]


def _packages() -> Iterator[Check]:
    try:
        lines = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        found = _("{name} is not installed in this Python", name=PROJECT)
        yield Check("Packages", found, _("Start it by `python launch.py`."))
        return
    versions: list[str] = []
    absent: list[str] = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker and any(marker.evaluate({"extra": extra}) for extra in ("test", "base", "all")):
            continue  # for those who work on the project, or named by another extra
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if marker is None and not (version and requirement.specifier.contains(version, prereleases=True)):
            asked = _(
                "{version}; it has to be {range}",
                version=version or _("not installed"),
                range=requirement.specifier,
            )
            pip = f'"{sys.executable}" -m pip install "{requirement.name}{requirement.specifier}"'
            fix = _(REINSTALL) if IS_CHECKOUT else _("Run `{command}`.", command=pip)
            yield Check(requirement.name, asked, fix)
        (versions if version or marker is None else absent).append(f"{requirement.name} {version}".strip())
    yield Check("Packages", ", ".join(versions))
    yield Check("Optional packages that are absent", ", ".join(absent) or _("none"))


def _torch() -> Iterator[Check]:
    card = find_card(hidden=True)
    restart = _("Restart the computer; if `nvidia-smi` still names no card, reinstall the driver.")
    silent = card is None and (shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia"))
    yield Check(
        "Graphics card, as its driver says",
        _("an NVIDIA driver is installed, but names no card") if silent else _card_words(card),
        restart if silent else "",
    )
    try:
        from lora_core.models.device import describe_torch, devices, free_memory
    except (ImportError, OSError) as error:
        yield Check("PyTorch", _("cannot be imported: {error}", error=error), _(REINSTALL))
        return
    try:
        import_module("lora_core.models.load")
        yield Check("Engine", _("diffusers and transformers can be imported"))
    except (ImportError, OSError, RuntimeError) as error:  # transformers keeps the last one it meets
        yield Check("Engine", _("cannot be imported: {error}", error=error), _(REINSTALL))
    found = describe_torch()
    fix = card_problem(card, found) if card is not None and found["device"] == "cpu" else ""
    built = _("{version}, built for {device}", version=found["torch"], device=found["build"])
    yield Check("PyTorch", built, fix)
    for one in devices():
        title = " ".join(part for part in (one["device"], one["name"]) if part)
        words = title + (
            _(", compute capability {number}", number=one["capability"]) if one["capability"] else ""
        )
        words += "" if one["usable"] else _(", which this PyTorch has no code for")
        short, memory = "", free_memory(one["device"]) if one["usable"] else None
        if memory is not None:
            words += ", " + _(
                "{free:.1f} of {total:.1f} GB free", free=memory[0] / 1e9, total=memory[1] / 1e9
            )
            short = (
                ""
                if memory[0] >= LITTLE_MEMORY
                else _("Close other programs that use {device}.", device=title)
            )
        yield Check("PyTorch sees", words, short)
    yield Check("Computes on", found["device"])
    for name in VARIABLES:
        if name in os.environ:
            yield Check("Environment variable", f"{name} = {os.environ[name]}")


def _card_words(card: Card | None) -> str:
    if card is None:
        return _("none")
    driver = _(", driver {number}", number=card.driver) if card.driver else ""
    capability = _(", compute capability {number}", number=card.generation) if card.generation else ""
    return f"{card.name}, {card.total / 2**30:.1f} GB{driver}{capability}"


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    fix = "" if memory.available >= LITTLE_MEMORY else _("Close other programs.")
    free = _("{free:.1f} of {total:.1f} GB free", free=memory.available / 1e9, total=memory.total / 1e9)
    yield Check("Memory", free, fix)


def _folders(chosen: Path | None) -> Iterator[Check]:
    try:
        home = workspace_folder(chosen)
    except RunError as error:
        yield Check("Workspace", _("cannot be written"), str(error))
    else:
        elsewhere = _("Make room, or choose a folder on another drive with --workspace or LORA_EASEL_HOME.")
        cache = folder_bytes(home / "cache")
        emptied = _("Run `lora-easel caches clean`, which frees {size:.1f} GB, or: ", size=cache / 1e9)
        yield _folder("Workspace", home, (emptied if cache >= LARGE_CACHE else "") + elsewhere)
        yield _folder("Caches", home / "cache", elsewhere, _(", {size:.1f} GB in it", size=cache / 1e9))
        yield _rights(home)
        yield _locks(home)
        if sys.platform == "win32" and len(str(home)) > LONGEST_PATH - LONGEST_BELOW and not _long_paths():
            yield Check(
                "Long paths",
                _(
                    "{path} has {number} characters, and Windows allows {most} for a file",
                    path=home,
                    number=len(str(home)),
                    most=LONGEST_PATH,
                ),
                _(
                    "Choose a shorter --workspace, or turn long paths on: LongPathsEnabled = 1 in the"
                    " registry at {key}.",
                    key=r"HKLM\SYSTEM\CurrentControlSet\Control\FileSystem",
                ),
            )
    from huggingface_hub.constants import HF_HUB_CACHE

    yield _folder("Hub cache", Path(HF_HUB_CACHE), _("Set HF_HOME to a folder on another drive."))
    elsewhere = _("Set TMPDIR (on Windows TEMP) to another folder.")
    yield _folder("Temporary files", Path(tempfile.gettempdir()), elsewhere)


def _rights(home: Path) -> Check:
    """Whether the workspace's contents are writable too: a start with sudo leaves files of another user."""
    inside = [*home.glob("*"), *home.glob("runs/*"), *home.glob("projects/*")]
    closed = [path for path in inside if not os.access(path, os.W_OK)]
    give = f'sudo chown -R "$USER" "{home}"'
    if sys.platform == "win32":
        give = f'icacls "{home}" /grant "%USERNAME%":F /T'
    if closed:
        found = _("{path} cannot be written", path=closed[0])
        return Check("Permissions", found, _("Run `{command}`.", command=give))
    return Check("Permissions", _("all of the workspace can be written"))


def _locks(home: Path) -> Check:
    """Whether files can be locked, which some network drives do not do: run and queue hold locks."""
    file = home / f".doctor-{os.getpid()}.lock"
    try:
        with FileLock(file, timeout=0):
            pass
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", "") or error
        local = _("Choose a folder on a drive of this computer with --workspace or LORA_EASEL_HOME.")
        return Check("File locks", _("{path} takes none: {why}", path=home, why=why), local)
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    return Check("File locks", _("the workspace takes them"))


def _folder(name: str, path: Path, elsewhere: str, more: str = "") -> Check:
    """Whether a folder, or the one that it would be made in, can be written and has room."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
        free = free_bytes(place)
    except OSError as error:
        why = error.strerror or error
        return Check(name, _("{path} cannot be written: {why}", path=path, why=why), elsewhere)
    found = f"{path}{more}, " + _("{size:.1f} GB free", size=free / 1e9)
    return Check(name, found, "" if free >= LITTLE_DISK else elsewhere)


def _long_paths() -> bool:
    """Whether Windows allows paths above 260 characters."""
    if sys.platform == "win32":
        import winreg

        try:
            path = r"SYSTEM\CurrentControlSet\Control\FileSystem"
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
                return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
        except OSError:
            return False
    return True


def _port(is_free: Callable[[int], bool] | None = None) -> Iterator[Check]:
    ports = range(FIRST_PORT, FIRST_PORT + PORTS_TRIED)
    first = next(filter(is_free or _is_free, ports), None)
    found = _("{port} is taken, by this program or another; {other} is free", port=FIRST_PORT, other=first)
    fix = ""
    if first is None:
        found = _("{port} to {other} are all taken", port=FIRST_PORT, other=ports[-1])
        start = "python launch.py" if IS_CHECKOUT else "lora-easel-window"
        command = f"{start} --port {ports[-1] + 1000}"
        fix = _("Start with a port that is free, as by `{command}`.", command=command)
    elif first == FIRST_PORT:
        found = _("{port} is free", port=FIRST_PORT)
    yield Check("Port of the window", found, fix)


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _others() -> Iterator[Check]:
    by_hand = _("none was found; start with --no-browser and open the address that is printed")
    try:
        found = getattr(webbrowser.get(), "name", _("the one of the system"))
    except webbrowser.Error:
        found = by_hand
    yield Check("Browser", found)
    tools = ", ".join(_("{name} in {folder}", name=tool.name, folder=tool.root) for tool in find_tools())
    yield Check("Other tools", tools or _("none found; folders can be named in the Train and Export tabs"))
