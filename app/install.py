"""Setup: the environment .venv beside launch.py, the PyTorch build that suits the machine, and the project.

Standard library only, as it runs before anything is installed. A stamp written after everything succeeded
marks a finished setup: an interrupted one is resumed, and later starts cost nothing. A connection that breaks
is retried; downloads are kept.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
TORCH_INDEX = "https://download.pytorch.org/whl/"
PROBE_SECONDS, SIGN_SECONDS = 5, 20
OLDEST_DRIVER = 525
"""Of NVIDIA's, that runs CUDA 12."""
LOCK = "launch.lock"
WHEELS = "wheels"
"""The folder beside launch.py whose packages are installed without a network."""
TRIES = 4
BROKEN = re.compile(
    r"IncompleteRead|Connection ?(broken|reset|aborted|error)|ReadTimeout|RemoteDisconnected"
    r"|Could not find a version|InvalidWheel|do not match the hash",
    re.IGNORECASE,
)
"""What pip's log says after a connection broke: of a page of the index or a wheel that was cut short, older
versions of pip only notice the missing part. Other failures would only repeat."""
EXTRAS = ("optimizers", "tensorboard", "kinds")
"""Extras of pyproject.toml that every installation gets: the window offers their features."""
CARD_EXTRAS = ("eight-bit",)
"""Extras that need an NVIDIA card."""


def say(text: str) -> None:
    """Write to the user, whatever the console's encoding."""
    with contextlib.suppress(AttributeError, OSError):  # started without a console
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stdout.flush()


class SetupError(Exception):
    """Something that the user has to fix first; the message says what and how."""


def expected_stamp(extra: str) -> dict[str, str]:
    """The stamp of an environment that has everything this start needs."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return {"pyproject": digest, "extra": extra, "place": str(ROOT)}


def written_stamp() -> dict[str, str]:
    """The stamp of the last finished setup, or {}."""
    try:
        return dict(json.loads((VENV / "launch.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_stamp(extra: str, python: str, backend: str = "") -> None:
    """Record that everything is installed, for this Python version ("3.11") and with this `torch_backend`."""
    temporary = VENV / "launch.json.tmp"
    stamp = {**expected_stamp(extra), "python": python, "backend": backend, "cards": list_cards()}
    temporary.write_text(json.dumps(stamp), encoding="utf-8")
    os.replace(temporary, VENV / "launch.json")


def is_ready(extra: str) -> bool:
    """Whether .venv is complete; reads three small files, to keep starts fast."""
    stamp = written_stamp()
    python, *_ = (stamp.pop(key, "") for key in ("python", "backend", "cards"))
    if stamp != expected_stamp(extra) or not PYTHON.exists() or not has_base():
        return False
    # A system upgrade can change the version behind the same name.
    same = os.path.realpath(PYTHON) == os.path.realpath(sys.executable)
    return not same or python == "{}.{}".format(*sys.version_info)


def has_base() -> bool:
    """Whether the Python that .venv was made from still exists."""
    return Path(venv_value("home") or ROOT / "nowhere").is_dir()


def base_python() -> str:
    """The Python that .venv was made from.

    Raises:
        SetupError: .venv does not say, or it is gone.
    """
    python = venv_value("executable")
    if not os.path.isfile(python):
        raise SetupError(f"Start it with the Python that is installed, not with the one in {VENV}.")
    return python


def runs_in_venv() -> bool:
    """Whether this Python is that of .venv."""
    return VENV.is_dir() and os.path.samefile(sys.prefix, VENV)


def venv_value(key: str) -> str:
    """A value of .venv's pyvenv.cfg, or ""."""
    with contextlib.suppress(OSError):
        text = (VENV / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace")
        pairs = (line.partition(" = ") for line in text.splitlines())
        return next((value for name, _, value in pairs if name == key), "")
    return ""


@dataclass(frozen=True)
class Cards:
    """The graphics cards of this machine, as far as drivers and the system tell without PyTorch.

    Attributes:
        nvidia: whether there is an NVIDIA card.
        driver: its driver's number (580.65 -> 580), 0 if unknown.
        capabilities: compute capability of each NVIDIA card; drivers before 510 do not tell it.
        amd: whether there is a card that AMD's ROCm runs on.
        intel: whether there is a card of Intel's beside the processor's own graphics.
    """

    nvidia: bool = False
    driver: int = 0
    capabilities: tuple[float, ...] = ()
    amd: bool = False
    intel: bool = False


def find_cards() -> Cards:
    """Detect the graphics cards."""
    # Separate queries: drivers without `compute_cap` fail a combined one.
    drivers, capabilities = nvidia_smi("driver_version"), nvidia_smi("compute_cap")
    nvidia = bool(drivers) or bool(shutil.which("nvidia-smi")) or os.path.exists("/proc/driver/nvidia")
    names = windows_adapters()
    return Cards(
        nvidia or any("NVIDIA" in name for name in names),
        int(max(drivers, default=0)),
        tuple(capabilities),
        # APUs may have /dev/kfd too; ROCm's build falls back to the processor.
        os.path.exists("/dev/kfd") or any("Radeon RX" in name or "Radeon PRO" in name for name in names),
        intel_card() or any("Arc" in name for name in names),
    )


def list_cards() -> str:
    """Cards and drivers as the system lists them, without starting a program: other ones change it."""
    found = [*windows_adapters(), *map(str, sorted(Path("/proc/driver/nvidia/gpus").glob("*")))]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    return repr([*found, os.path.exists("/dev/kfd"), intel_card()])


def note_new_card() -> None:
    """Say if another PyTorch fits the cards and drivers than those of the set-up."""
    stamp = written_stamp()
    if "cards" in stamp and stamp["cards"] != list_cards():
        backend = torch_backend(platform.system(), find_cards())
        if backend == stamp.get("backend"):
            write_stamp(stamp["extra"], stamp["python"], backend)
        else:
            say(
                "The graphics card or its driver has changed since the set-up: `python launch.py repair`"
                " installs the PyTorch for it."
            )


def windows_adapters() -> list[str]:
    """Names and driver versions of display adapters on Windows, [] elsewhere."""
    names: list[str] = []
    if sys.platform == "win32":
        import winreg

        display = r"SYSTEM\CurrentControlSet\Control\Class\{4d36e968-e325-11ce-bfc1-08002be10318}"
        for number in range(16):
            path = rf"{display}\{number:04}"
            with contextlib.suppress(OSError), winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
                for value in ("DriverDesc", "DriverVersion"):
                    names.append(str(winreg.QueryValueEx(key, value)[0]))
    return names


def intel_card(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether Linux lists an Intel display controller besides the integrated one (always 00:02.0)."""
    for device in devices.glob("*") if devices.is_dir() else ():
        with contextlib.suppress(OSError):
            if device.name.endswith("00:02.0") or (device / "vendor").read_text().strip() != "0x8086":
                continue
            if (device / "class").read_text().startswith("0x03"):
                return True
    return False


def nvidia_smi(field: str) -> list[float]:
    """A field of each card as a float (580.65.06 becomes 580.65), [] if the driver does not report it."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    found = []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        for line in done.stdout.splitlines():
            with contextlib.suppress(ValueError):
                found.append(float(".".join(line.strip().split(".")[:2])))
    return found


def torch_backend(system: str, cards: Cards) -> str:
    """The part of PyTorch's own index that suits the machine better than PyPI's build, or "".

    The default index has CPU builds for Windows and macOS, and for Linux those of the newest CUDA. CUDA 13
    wants a driver from 580 on and a card from Turing (7.5) on; CUDA 12.6 serves cards from Maxwell (5.0) up
    to Hopper (9.0). Of several cards the newest is served, and the older ones too where one build serves all.
    AMD's cards have builds for Linux only.

    Source: the CUDA support matrix in RELEASE.md of github.com/pytorch/pytorch.
    """
    if system not in ("Windows", "Linux"):
        return ""
    if cards.nvidia:
        newest = max(cards.capabilities, default=0.0)
        # Cards below 5.0 have no build at all, so they are ignored.
        oldest = min((each for each in cards.capabilities if each >= 5.0), default=newest)
        if 0 < cards.driver < 580 or (0 < oldest < 7.5 and newest < 10):
            return "cu128" if newest >= 10 else "cu126"
        return "cu130" if system == "Windows" else ""
    if cards.amd and system == "Linux":
        return "rocm6.4"
    if cards.intel:
        return "xpu"
    return "cpu" if system == "Linux" else ""


def card_notes(system: str, cards: Cards) -> list[str]:
    """What keeps a card from being used, one sentence each."""
    found = []
    if 0 < cards.driver < OLDEST_DRIVER:
        found.append(
            f"The NVIDIA driver {cards.driver} is too old for PyTorch: install driver 580 or newer from"
            " nvidia.com, or the processor trains."
        )
    if cards.capabilities and max(cards.capabilities) < 5.0:
        found.append(
            f"The NVIDIA card (compute capability {max(cards.capabilities)}) is older than PyTorch supports"
            " (5.0), so the processor trains."
        )
    if system == "Windows" and cards.amd and not cards.nvidia:
        found.append(
            "PyTorch's index has no build for AMD cards on Windows, so the processor trains; on Linux the"
            " card can be used."
        )
    return found


def answers(url: str) -> bool:
    """Whether a server answers within PROBE_SECONDS, DNS included."""
    import urllib.request

    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(request, timeout=PROBE_SECONDS):
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(PROBE_SECONDS)


def pip(*arguments: str, quiet: bool = False, verb: str = "install") -> bool:
    """Run `pip install` in .venv, again where the connection broke; returns whether it succeeded."""
    command = [str(PYTHON), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    for left in reversed(range(TRIES)):
        (VENV / "pip.log").unlink(missing_ok=True)
        if run_install([*command, "--log", str(VENV / "pip.log"), verb, *arguments], quiet):
            return True
        offline = "--no-index" in arguments or (verb == "install" and (ROOT / WHEELS).is_dir())
        if offline or not left or not BROKEN.search("\n".join([pip_errors(), *pip_log()[-20:]])):
            break
        say("The connection may have broken; trying again.")
    return False


def run_install(command: list[str], quiet: bool = False) -> bool:
    """Run an installer on .venv and show its progress; returns whether it succeeded."""
    foreign = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PYTHONHOME", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    environment["PYTHONIOENCODING"] = "utf-8"
    environment.setdefault("PIP_RESUME_RETRIES", "8")  # older versions of pip do not know it
    environment.setdefault("PIP_COMPILE", "0")  # a part of it is ever imported, and is compiled then, once
    if (ROOT / WHEELS).is_dir() and "download" not in command:
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (ROOT / WHEELS).as_uri()}
    if quiet or (sys.stdout and sys.stdout.isatty()):  # on a terminal pip draws its own progress bars
        output = subprocess.DEVNULL if quiet else None
        return not subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode
    ended = threading.Event()
    threading.Thread(target=give_signs, args=(ended,), daemon=True).start()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout or ():
            text = worth_saying(line.decode("utf-8", "replace").strip())
            if text:
                say(f"  {text}")
    ended.set()
    return process.returncode == 0


def give_signs(ended: threading.Event) -> None:
    """Print a sign of life regularly."""
    began = time.monotonic()
    while not ended.wait(SIGN_SECONDS):
        say(f"  still at work after {time.monotonic() - began:.0f} s")


def worth_saying(line: str) -> str:
    """The short form of a line of pip's output that the user wants to see, or ""."""
    if line.startswith("Downloading ") and line.endswith(" MB)"):
        return line if float(line[:-4].rpartition("(")[2]) >= 10 else ""
    if line.startswith("Installing collected packages:"):
        return f"unpacking {line.count(',') + 1} packages" if "," in line else ""
    return ""


def pip_log() -> list[str]:
    """The lines of pip's log, without their times."""
    with contextlib.suppress(OSError):
        log = (VENV / "pip.log").read_text(encoding="utf-8", errors="replace")
        return [line.partition(" ")[2].strip() for line in log.splitlines()]
    return []


def pip_errors() -> str:
    """The last errors in pip's log."""
    return "\n".join(f"  {text}" for text in [t for t in pip_log() if t.startswith("ERROR")][-4:])


def environment_version() -> str:
    """The Python version ("3.11") of a complete .venv, or ""."""
    version = ask_python("import pip, sys; print('{}.{}'.format(*sys.version_info))")
    return (version or "") if has_base() else ""


def make_environment() -> None:
    """Make .venv from scratch.

    Raises:
        SetupError: it cannot be made.
    """
    import venv

    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "This Python lacks the package that makes environments: install it (Debian and Ubuntu:"
            " `sudo apt install python3-venv`) and start again."
        )
    try:
        for path in VENV.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        venv.EnvBuilder(symlinks=os.name != "nt", with_pip=True).create(VENV)
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(
            f"The environment {VENV} cannot be made ({error}): close what uses it, see that the disk is not"
            " full and that the folder can be written, and start again."
        ) from error


def install_torch(cards: Cards) -> None:
    """Install the PyTorch build that suits `cards`, where that is not the default index's."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = next(text for text in project["dependencies"] if text.startswith("torch"))
    for note in card_notes(platform.system(), cards):
        say(note)
    backend = torch_backend(platform.system(), cards)
    if not backend:
        return
    say(f"PyTorch, the build for {'this processor' if backend == 'cpu' else 'the graphics card'} ...")
    if pip("--no-index", "--no-deps", torch, quiet=True):  # it may be there, or on a local disk
        return
    if not answers(f"{TORCH_INDEX}{backend}/"):
        say("PyTorch's own index does not answer; its default build is taken (on Linux 3 GB to download).")
        return
    # uv knows AMD cards and drivers, but not which cards a CUDA build lacks kernels for.
    found_by_uv = backend in ("cpu", "cu130") or backend.startswith("rocm")
    by_uv = f"--torch-backend={'auto' if found_by_uv else backend}"
    if not uv(by_uv, torch) and not pip(torch, "--index-url", f"{TORCH_INDEX}{backend}"):
        say("That failed; the default build is taken instead.")


def uv(*arguments: str) -> bool:
    """Install by uv, with a part of pip's work; returns whether it could.

    It is not asked where pip is set up for another index, as it does not read that.
    """
    if (ROOT / WHEELS).is_dir() or "PIP_INDEX_URL" in os.environ or _configured_index(PYTHON):
        return False
    there = PYTHON.with_name("uv" + PYTHON.suffix).exists()
    if not there and not pip("uv", "--only-binary", ":all:", quiet=True):
        return False
    command = [str(PYTHON), "-m", "uv", "pip", "install", "--python", str(PYTHON)]
    return run_install([*command, *arguments])


@functools.cache
def _configured_index(python: Path) -> bool:
    """Whether a file sets pip up for an index other than the usual one."""
    with contextlib.suppress(OSError):
        command = [str(python), "-m", "pip", "config", "get", "global.index-url"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let one process set up at a time. The lock is the system's: it is released when its holder dies.

    Raises:
        SetupError: the folder cannot be written.
    """
    try:
        VENV.mkdir(exist_ok=True)
        handle = os.open(VENV / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise SetupError(
            f"{VENV} cannot be written ({error.strerror}): move the project to a folder of yours."
        ) from error
    try:
        if not locked(handle):
            say("Another start is setting up; waiting for it.")
            while not locked(handle):
                time.sleep(0.5)
        yield
    finally:
        os.close(handle)


def locked(handle: int) -> bool:
    """Try to take the lock. File systems without locks count as taken."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def compile_imports() -> None:
    """Compile what the window and a run import. Python would at the first start, but where
    PYTHONDONTWRITEBYTECODE is set, it would compile all of it at each start and keep nothing."""
    around = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with contextlib.suppress(OSError):
        command = [str(PYTHON), "-c", "import app.main, lora_core.train.trainer"]
        subprocess.run(command, cwd=ROOT, env=around, capture_output=True, check=False)


def set_up(extra: str, afresh: bool = False) -> None:
    """Make .venv if it is incomplete or `afresh`, and install the project into it.

    Raises:
        SetupError: something failed that a user can fix.
    """
    if (platform.system(), platform.machine()) == ("Darwin", "x86_64"):
        raise SetupError("On a Mac, PyTorch needs an Apple processor and a Python made for it (arm64).")
    began = time.monotonic()
    with alone():
        if not afresh and is_ready(extra):  # by the start that was waited for
            return
        python = "" if afresh else environment_version()
        if not python:
            say(f"Setting up in {VENV}, once: 2 GB of disk and some minutes, more with a graphics card.")
            make_environment()
            python = environment_version()
        cards = find_cards()
        install_torch(cards)
        say("Installing the project and its dependencies ...")
        project = ("--editable", wanted(cards, extra))
        if not uv(*project) and not pip(*project):
            advice = "See that the internet can be reached and that the disk is not full"
            if (ROOT / WHEELS).is_dir():
                advice = (
                    f"Packages are taken from {ROOT / WHEELS} alone: make it by `python launch.py wheels` on"
                    " a computer of the same kind with the same Python, or remove it"
                )
            raise SetupError(
                f"The installation failed.\n{pip_errors()}\n{advice}, and start again: downloads are kept. "
                f"All of it: {VENV / 'pip.log'}"
            )
        compile_imports()
        write_stamp(extra, python, torch_backend(platform.system(), cards))
    say(f"Set up in {time.monotonic() - began:.0f} s.")


def wanted(cards: Cards, extra: str = "") -> str:
    """The project with its extras, as pip takes it."""
    extras = [*EXTRAS, *(CARD_EXTRAS if cards.nvidia else ()), *([extra] if extra else [])]
    return f".[{','.join(extras)}]"


def download_wheels() -> None:
    """Fill the folder of wheels: with it, a copy of this folder sets up without a network.

    Raises:
        SetupError: a download failed.
    """
    import tomllib

    folder, cards = ROOT / WHEELS, find_cards()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    backend = torch_backend(platform.system(), cards)
    index = ["--index-url", f"{TORCH_INDEX}{backend}"] if backend else []
    torch = next(text for text in project["project"]["dependencies"] if text.startswith("torch"))
    # uv, which is asked for the build of PyTorch elsewhere, is not needed: this build is the one that fits.
    tools = [*project["build-system"]["requires"], "editables", "pip"]
    for packages in ([torch, "--no-deps", *index], [wanted(cards), *tools, "--find-links", folder.as_uri()]):
        if not pip("--dest", str(folder), *packages, verb="download"):
            raise SetupError(f"The download failed.\n{pip_errors()}\nStart it again to continue.")
    say(f"{folder} is complete: copy it together with the project, to a computer of the same kind.")


def uninstall(words: list[str]) -> None:
    """Say what goes and what stays, and remove .venv, with `--workspace` the workspace too.

    Raises:
        SetupError: it was not confirmed, an option is unknown, a run is active, or something cannot be
            removed.
    """
    if unknown := set(words) - {"--workspace", "--yes"}:
        raise SetupError(f"uninstall takes --workspace and --yes, not {' '.join(sorted(unknown))}.")
    home, goes = find_workspace(), [VENV] if VENV.exists() else []
    if live := ask_python(LIVE, str(home)) if home else None:
        raise SetupError(f"Stop the running training first ({live}); nothing was removed.")
    if live is None and "--yes" not in words and ask_python("") is not None:
        raise SetupError(
            "Whether something is being trained could not be checked, so nothing was removed; see that"
            " nothing is, then give --yes."
        )
    if "--workspace" in words:
        # A home folder may have projects of another sort, and contains more than a workspace.
        within = (Path.home(), ROOT)
        if home is None or not (home / "projects").is_dir() or any(p.is_relative_to(home) for p in within):
            raise SetupError(f"{home or 'The workspace'} is not known as a workspace; nothing was removed.")
        goes.append(home)
    for path in goes:
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        say(f"To be removed: {path}, {size / 1e9:.1f} GB")
    if home not in goes:
        kept = "images, captions, runs and exports (--workspace removes it)"
        say(f"Stays: {home or 'the workspace'}, with {kept}")
    say(f"Stays: {ROOT}, which you can delete then")
    if "--yes" not in words:
        answer = ""
        with contextlib.suppress(EOFError):
            answer = input("Type yes to remove it: ")
        if answer.strip().lower() != "yes":
            raise SetupError("Nothing was removed.")
    try:
        for path in goes:
            shutil.rmtree(path)
    except OSError as error:
        raise SetupError(
            f"{error.filename} cannot be removed ({error.strerror}): close what uses it."
        ) from error
    say("Removed.")


def find_workspace() -> Path | None:
    """The workspace that a start without options uses, None where .venv cannot say."""
    found = ask_python("from lora_core.system.files import workspace_path; print(workspace_path())")
    return Path(found) if found else None


LIVE = """import pathlib, sys
from lora_core.runs.folder import all_runs
print(*(run.name for run in all_runs(pathlib.Path(sys.argv[1])) if run.live_process()), sep=", ")"""


def ask_python(code: str, *words: str) -> str | None:
    """What the Python of .venv prints for `code`, None where it cannot."""
    command = [str(PYTHON), "-c", code, *words]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # A path may have letters that the console's encoding lacks.
        around = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            command, cwd=ROOT, env=around, capture_output=True, encoding="utf-8", check=True, timeout=120
        )
        return done.stdout.strip()
    return None
