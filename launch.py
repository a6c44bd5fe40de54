"""LoRA Easel in one command.

    python launch.py [options]             sets up on the first start, then opens the app in the browser
    python launch.py test [pytest args]    sets up with the test tools, then runs the tests
    python launch.py update                brings a git clone to its newest version, and what it needs
    python launch.py repair                makes .venv afresh, as for a new card or driver
    python launch.py wheels                downloads all packages into wheels/, to set up without a network
    python launch.py uninstall             says what goes and what stays, asks, and removes .venv

Only Python itself is needed (3.11, 3.12 or 3.13). Everything is installed into the folder .venv beside this
file, once, and again when pyproject.toml changes (`app/install.py`). If there is a folder wheels beside this
file, packages are taken from it alone. `uninstall --workspace` removes images, runs and exports too.
"""

# This file has to parse and run on Pythons that are too old, so that they show the sentence that says so:
# everything that needs more than Python 3.6 is imported after the version is known to fit.
import contextlib
import os
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 13)
AGAIN = "LORA_EASEL_AGAIN"
# Where nobody has chosen among the tests: with two processes, two cores idle a fifth of the time.
ALL_TESTS = ("-n", "3")


def version_problem(version: "tuple[int, ...]") -> str:
    """Why this Python (major, minor, ...) cannot be used, or "" if it can."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return ""
    oldest, newest, this = ("{}.{}".format(*numbers) for numbers in (OLDEST, NEWEST, version))
    return (
        f"LoRA Easel needs Python {oldest} to {newest}, and this is Python {this}: install Python {newest}"
        f" and start launch.py with it (`python{newest} launch.py`, on Windows `py -{newest} launch.py`)."
    )


def held(code: int) -> int:
    """`code`; after a failure, a console that Windows opened for a double-click stays open to be read."""
    if (
        os.name == "nt"
        and code not in (0, 130)
        and AGAIN not in os.environ
        and sys.stdin
        and sys.stdin.isatty()
    ):
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            input("Press Enter to close. ")
    return code


def go_on(*command: str) -> int:
    """Become `command`, or where a process cannot (Windows), wait for it and give its exit code."""
    if os.name != "nt":
        os.execv(command[0], command)
    with subprocess.Popen(command) as child:
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # the child gets Ctrl-C too and ends in its own way
                return child.wait()


def fetch_newest() -> str:
    """Bring a git clone to its newest version. Returns why that cannot be done, or ""."""
    here = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(here, ".git")):
        return "This folder is not a git clone: unpack the newest version over it and start launch.py again."
    try:
        failed = subprocess.call(["git", "-C", here, "pull", "--ff-only"])
    except OSError as error:
        failed, reason = 1, f"git cannot be started ({error.strerror}): install git"
    else:
        reason = "git says why above: put that right"
    return reason + " and run `python launch.py update` again; nothing was changed." if failed else ""


def main(arguments: "list[str]") -> int:
    """Set up if needed, then do what the first word says, or open the app; the exit code."""
    word = arguments[0] if arguments else ""
    problem = fetch_newest() if word == "update" else ""
    if problem:
        sys.stdout.write(problem + "\n")
        return held(1)
    from app import install  # of the newest version, after an update

    testing = word == "test"
    extra = "test" if testing or install.written_stamp().get("extra") == "test" else ""
    try:
        if word in ("repair", "uninstall"):
            if install.runs_in_venv():  # which is about to be removed
                return held(go_on(install.base_python(), str(install.ROOT / "launch.py"), *arguments))
            if word == "uninstall":
                install.uninstall(arguments[1:])
            else:
                install.set_up(extra, afresh=True)
            return 0
        if not install.is_ready(extra):
            install.set_up(extra)
        if testing:
            os.chdir(install.ROOT)
            return held(go_on(str(install.PYTHON), "-m", "pytest", *(arguments[1:] or ALL_TESTS)))
        if word == "wheels":
            install.download_wheels()
        if word in ("update", "wheels"):
            return 0
        if install.runs_in_venv():
            os.environ.pop(AGAIN, None)
            install.note_new_card()
            return open_app(arguments)
        if AGAIN in os.environ:
            raise install.SetupError(f"The environment {install.VENV} is broken: delete it and start again.")
        os.environ[AGAIN] = "1"
        code = go_on(str(install.PYTHON), str(install.ROOT / "launch.py"), *arguments)
        del os.environ[AGAIN]
        return held(code)
    except install.SetupError as error:
        install.say(str(error))
        return held(1)
    except KeyboardInterrupt:
        install.say("Interrupted; start again to continue.")
        return 130


def open_app(arguments: "list[str]") -> int:
    """Open the window, in .venv's own process.

    Raises:
        SetupError: the project or one of its packages cannot be imported.
    """
    from app.install import VENV, SetupError

    try:
        from lora_core.system.processes import without_collecting

        with without_collecting():
            from app.main import main as app_main
    except ImportError as error:
        raise SetupError(f"The app cannot be loaded ({error}): delete {VENV} and start again.") from error
    return app_main(arguments)


if __name__ == "__main__":
    problem = version_problem(tuple(sys.version_info[:2]))
    if problem:
        sys.stderr.write(problem + "\n")
    sys.exit(held(1) if problem else main(sys.argv[1:]))
