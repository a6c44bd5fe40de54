"""How each other tool is told by its files, and what its own settings say of its model folders.

Only the few lines that name folders are read, with no YAML library: a file that is written in another way
than the tools' own examples says less, and the usual folders stay.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_core.spec.untrusted import parsed_json

LARGEST_SETTINGS = 1_000_000

Folders = tuple[list[Path], list[Path]]
"""Folders with bases, and those with LoRAs, the one that files go into first."""


@dataclass(frozen=True)
class Kind:
    """One tool.

    Attributes:
        name: what people call it.
        markers: sets of paths below its root; it is the tool where all of one set are there.
        folders: from the root to its folders, whether they are there or not.
    """

    name: str
    markers: tuple[tuple[str, ...], ...]
    folders: Callable[[Path], Folders]


def json_path(file: Path, key: str) -> Path | None:
    """The path that a JSON file holds under `key`, or None."""
    try:
        found = parsed_json(_text(file)).get(key)
    except (ValueError, AttributeError):
        return None
    return Path(found) if isinstance(found, str) and found else None


def _text(file: Path) -> str:
    """A small settings file, or "" where there is none."""
    try:
        if file.stat().st_size > LARGEST_SETTINGS:
            return ""
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def extra_model_paths(file: Path) -> Folders:
    """What ComfyUI's `extra_model_paths.yaml` adds: its checkpoints and its LoRA folders.

    Two levels are read: sections, and in them `name: value` or `name: |` with one value a line. A section
    with
    `is_default: true` goes before the others.
    """
    sections: list[dict[str, list[str]]] = []
    name, depth = "", 0
    for line in _text(file).splitlines():
        words = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if not words.strip():
            continue
        indent = len(words) - len(words.lstrip())
        named = re.fullmatch(r"\s*([\w-]+)\s*:(?:\s+(.*)|)", words)
        if indent == 0:
            sections.append({})
            name = ""
        elif sections and named and (not name or indent <= depth):
            name, depth = named[1], indent
            value = (named[2] or "").strip().strip("\"'")
            sections[-1][name] = [value] if value not in ("", "|", "|-", ">", ">-") else []
        elif sections and name:
            sections[-1][name].append(words.strip().lstrip("- ").strip("\"'"))
    sections.sort(key=lambda section: section.get("is_default") != ["true"])
    models, loras = [], []
    for section in sections:
        base = Path(_expanded((section.get("base_path") or [""])[0]))
        models += [file.parent / base / _expanded(value) for value in section.get("checkpoints", [])]
        loras += [file.parent / base / _expanded(value) for value in section.get("loras", [])]
    return models, loras


def _defaults_first(file: Path) -> bool:
    return re.search(r"^[ \t]+is_default:\s*true\s*$", _text(file), re.M) is not None


def _expanded(text: str) -> str:
    return os.path.expandvars(os.path.expanduser(text))


def command_options(root: Path) -> dict[str, list[Path]]:
    """The folders that A1111's and Forge's `webui-user` files give on the command line, by option."""
    found: dict[str, list[Path]] = {}
    for name in ("webui-user.sh", "webui-user.bat"):
        for line in _text(root / name).splitlines():
            if re.match(r"\s*(#|::|@?rem\b)", line, re.I):
                continue
            line = line.replace('\\"', '"')
            options = re.finditer(r"--([a-z-]+-dirs?)(?:=|\s+)(?:\"([^\"]+)\"|'([^']+)'|([^\s\"']+))", line)
            for option in options:
                value = _expanded(option[2] or option[3] or option[4])
                found.setdefault(option[1].rstrip("s"), []).append(root / value)
    return found


def _webui(root: Path) -> Folders:
    options = command_options(root)
    tops = options.get("models-dir") or [path / "models" for path in options.get("data-dir", [])]
    tops = tops or [root / "models"]
    models = [*options.get("ckpt-dir", []), *(top / "Stable-diffusion" for top in tops)]
    return models, [*options.get("lora-dir", []), *(top / "Lora" for top in tops)]


def _sdnext(root: Path) -> Folders:
    config = root / "config.json"
    models = [
        json_path(config, "ckpt_dir"),
        json_path(config, "diffusers_dir"),
        Path("models/Stable-diffusion"),
    ]
    loras = [json_path(config, "lora_dir"), Path("models/Lora")]
    return (
        [root / path for path in (*models, Path("models/Diffusers")) if path is not None],
        [root / path for path in loras if path is not None],
    )


def _comfy(root: Path) -> Folders:
    file = root / "extra_model_paths.yaml"
    models, loras = extra_model_paths(file)
    own = root / "models" / "loras"
    return (
        [root / "models" / "checkpoints", root / "models" / "diffusers", *models],
        [*loras, own] if _defaults_first(file) else [own, *loras],
    )


def _invoke(root: Path) -> Folders:
    named = re.search(r"^models_dir:\s*([^#\n]+)", _text(root / "invokeai.yaml"), re.M)
    folder = named[1].strip().strip("\"'") if named else "models"
    # Its database lists its models: a file that is only put among them is not seen. Old versions import from
    # here.
    return [root / _expanded(folder)], [root / "autoimport" / "lora"]


def _fooocus(root: Path) -> Folders:
    return [root / "models" / "checkpoints"], [root / "models" / "loras"]


def _stability_matrix(root: Path) -> Folders:
    return [root / "Models" / "StableDiffusion"], [root / "Models" / "Lora"]


KINDS = (
    Kind("Forge", (("webui.py", "modules_forge"),), _webui),
    Kind("SD.Next", (("installer.py", "launch.py", "modules"),), _sdnext),
    Kind("AUTOMATIC1111", (("webui.py", "modules", "models/Stable-diffusion"),), _webui),
    Kind("Fooocus", (("fooocus_version.py", "models"),), _fooocus),
    # Its desktop version keeps models and nodes of a person, and its own code elsewhere.
    Kind("ComfyUI", (("main.py", "comfy", "models"), ("custom_nodes", "models/checkpoints")), _comfy),
    Kind("InvokeAI", (("invokeai.yaml",), ("databases/invokeai.db", "models")), _invoke),
    Kind("Stability Matrix", (("Models/StableDiffusion", "Packages"),), _stability_matrix),
)
"""The tools, the more special before those that they were made from."""
