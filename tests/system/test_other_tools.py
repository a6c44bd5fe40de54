"""Other tools' folders are found in a made-up home, laid out as the tools' own installers lay them out."""

import json
import os
import time
from pathlib import Path

import pytest

from lora_core.system import other_tools
from lora_core.system.other_tools import (
    InstalledTool,
    Machine,
    command_options,
    detect_machine,
    extra_model_paths,
    find_tools,
    list_base_files,
)

LAYOUTS = {
    "ComfyUI": ["main.py", "comfy/", "models/checkpoints/", "models/loras/"],
    "AUTOMATIC1111": ["webui.py", "launch.py", "modules/", "models/Stable-diffusion/", "models/Lora/"],
    "Forge": [
        "webui.py", "launch.py", "modules/", "modules_forge/", "models/Stable-diffusion/", "models/Lora/",
    ],
    "InvokeAI": ["invokeai.yaml", "databases/invokeai.db", "models/"],
    "SD.Next": ["installer.py", "launch.py", "webui.py", "modules/", "models/Stable-diffusion/",
                "models/Lora/"],
    "Fooocus": ["fooocus_version.py", "launch.py", "models/checkpoints/", "models/loras/"],
    "Stability Matrix": ["Models/StableDiffusion/", "Models/Lora/", "Packages/"],
}  # fmt: skip


def install(root: Path, name: str) -> Path:
    for part in LAYOUTS[name]:
        path = root / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if part.endswith("/") else path.touch()
    return root


def large(path: Path, size: int = 200_000_000, age: float = 0.0) -> Path:
    """A file that is as long as a base but takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)
    os.utime(path, (time.time() - age,) * 2)
    return path


def named(tools: list[InstalledTool]) -> dict[str, InstalledTool]:
    return {tool.name: tool for tool in tools}


@pytest.mark.parametrize(
    ("name", "place", "loras"),
    [
        ("ComfyUI", "ComfyUI", "models/loras"),
        ("ComfyUI", "ComfyUI_windows_portable/ComfyUI", "models/loras"),
        ("ComfyUI", "pinokio/api/comfy.git/app", "models/loras"),
        ("AUTOMATIC1111", "stable-diffusion-webui", "models/Lora"),
        ("AUTOMATIC1111", "sd.webui/webui", "models/Lora"),
        ("Forge", "webui_forge_cu121_torch231/webui", "models/Lora"),
        ("InvokeAI", "invokeai", None),
        ("SD.Next", "automatic", "models/Lora"),
        ("Fooocus", "Fooocus", "models/loras"),
        ("Stability Matrix", "StabilityMatrix/Data", "Models/Lora"),
        ("ComfyUI", "StabilityMatrix/Data/Packages/ComfyUI", "models/loras"),
    ],
)
def test_a_tool_is_found_where_it_is_usually_put(
    tmp_path: Path, name: str, place: str, loras: str | None
) -> None:
    root = install(tmp_path / place, name)
    (tmp_path / "Pictures" / "webui").mkdir(parents=True)
    found = named(find_tools(machine=Machine((tmp_path,))))
    assert found[name].root == root
    assert found[name].loras == (root / loras if loras else None)
    assert len(found) == 1


def test_what_others_say_of_themselves_is_followed(tmp_path: Path) -> None:
    settings = tmp_path / "AppData"
    comfy = install(tmp_path / "D" / "pictures", "ComfyUI")
    invoke = install(tmp_path / "E" / "art", "InvokeAI")
    matrix = install(tmp_path / "F" / "library", "Stability Matrix")
    forge = install(matrix / "Packages" / "my pack", "Forge")
    for program, file, key, where in (
        ("ComfyUI", "config.json", "basePath", comfy),
        ("StabilityMatrix", "library.json", "LibraryPath", matrix),
    ):
        (settings / program).mkdir(parents=True)
        (settings / program / file).write_text(json.dumps({key: str(where)}))
    found = find_tools(machine=Machine((), (settings,), {"INVOKEAI_ROOT": str(invoke)}))
    assert [tool.root for tool in found] == [invoke, comfy, matrix, forge]


def test_a_desktop_comfyui_holds_no_code(tmp_path: Path) -> None:
    for part in ("custom_nodes", "models/checkpoints", "models/loras", "user"):
        (tmp_path / "ComfyUI" / part).mkdir(parents=True)
    assert (
        named(find_tools(machine=Machine((tmp_path,))))["ComfyUI"].loras == tmp_path / "ComfyUI/models/loras"
    )


def test_added_folders_come_first_and_once(tmp_path: Path) -> None:
    comfy = install(tmp_path / "ComfyUI", "ComfyUI")
    plain = tmp_path / "my bases"
    plain.mkdir()
    found = find_tools([plain, comfy, tmp_path / "gone"], Machine((tmp_path,)))
    assert found[0] == InstalledTool("my bases", plain, (plain,), None)
    assert [tool.name for tool in found] == ["my bases", "ComfyUI"]


EXTRA = """# Rename this
a111:
    base_path: %s/stable-diffusion-webui/   # the other tool
    checkpoints: models/Stable-diffusion
    loras: |
         models/Lora

         models/LyCORIS
    vae: models/VAE

#comfyui:
#     checkpoints: never/
mine:
  base_path: "%s/big disk"
  is_default: true
  checkpoints: bases
  loras: own loras
no base:
    checkpoints: beside
"""


def test_extra_model_paths_of_comfyui(tmp_path: Path) -> None:
    root = install(tmp_path / "ComfyUI", "ComfyUI")
    (root / "extra_model_paths.yaml").write_text(EXTRA % (tmp_path, tmp_path))
    models, loras = extra_model_paths(root / "extra_model_paths.yaml")
    web, disk = tmp_path / "stable-diffusion-webui", tmp_path / "big disk"
    assert models == [disk / "bases", web / "models/Stable-diffusion", root / "beside"]
    assert loras == [disk / "own loras", web / "models/Lora", web / "models/LyCORIS"]
    for folder in (disk / "own loras", disk / "bases"):
        folder.mkdir(parents=True)
    tool = named(find_tools(machine=Machine((tmp_path,))))["ComfyUI"]
    assert tool.loras == disk / "own loras"
    assert tool.models == (root / "models/checkpoints", disk / "bases")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00\xff: [",
        "- a\n- b\n",
        "a: {b: c}\n",
        ":\n :\n  |\n",
        "a:\n\tb: |\n\tc",
        "a: !!bool maybe\n",
        "a: !!int ''\n",
        "a: !!timestamp x\n",
    ],
)
def test_odd_settings_files_say_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    assert extra_model_paths(tmp_path / "x.yaml") == ([], [])


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("webui-user.sh", "export COMMANDLINE_ARGS=\"--xformers --lora-dir '{0}/a b' --ckpt-dir={0}/c\"",
         ("a b", "c")),
        ("webui-user.bat", 'set COMMANDLINE_ARGS=--lora-dir "{0}/a b" --ckpt-dir {0}/c --medvram',
         ("a b", "c")),
        ("webui-user.bat", "@REM set COMMANDLINE_ARGS=--lora-dir {0}/never", ("", "")),
        ("webui-user.sh", '#export COMMANDLINE_ARGS="--lora-dir {0}/never"', ("", "")),
        ("webui-user.sh", 'export COMMANDLINE_ARGS="--forge-ref-a1111-home /x --ckpt-dirs {0}/c"', ("", "c")),
    ],
)  # fmt: skip
def test_folders_on_the_command_line_of_a_web_ui(
    tmp_path: Path, file: str, line: str, expected: tuple[str, str]
) -> None:
    root = install(tmp_path / "stable-diffusion-webui", "AUTOMATIC1111")
    (root / file).write_text(line.format(tmp_path))
    given = command_options(root)
    wanted = [[tmp_path / name] if name else [] for name in expected]
    assert [given.get("lora-dir", []), given.get("ckpt-dir", [])] == wanted
    for name in expected:
        (tmp_path / name).mkdir(exist_ok=True)
    tool = find_tools(machine=Machine((tmp_path,)))[0]
    assert tool.loras == (wanted[0] or [root / "models/Lora"])[0]
    assert tool.models[0] == (wanted[1] or [root / "models/Stable-diffusion"])[0]


def test_invoke_and_sdnext_name_their_folders(tmp_path: Path) -> None:
    invoke, sdnext = install(tmp_path / "invokeai", "InvokeAI"), install(tmp_path / "sdnext", "SD.Next")
    for name in ("elsewhere", "loras here", "bases"):
        (tmp_path / name).mkdir()
    (invoke / "invokeai.yaml").write_text(
        f"schema_version: 4.0.2\nmodels_dir: {tmp_path}/elsewhere # big disk\n"
    )
    (sdnext / "config.json").write_text(
        json.dumps({"lora_dir": str(tmp_path / "loras here"), "ckpt_dir": str(tmp_path / "bases")})
    )
    found = named(find_tools(machine=Machine((tmp_path,))))
    assert found["InvokeAI"].models == (tmp_path / "elsewhere",)
    assert found["SD.Next"].loras == tmp_path / "loras here"
    assert found["SD.Next"].models[0] == tmp_path / "bases"


def test_bases_are_large_files_and_diffusers_folders_newest_first(tmp_path: Path) -> None:
    models = install(tmp_path / "ComfyUI", "ComfyUI") / "models" / "checkpoints"
    old = large(models / "sub" / "old.safetensors", age=500)
    new = large(models / "new é.ckpt", age=10)
    large(models / "lora.safetensors", size=50_000_000)
    large(models / "vae" / "vae.safetensors", size=300_000_000)
    large(models / "notes.txt")
    folder = models / "diffusers one"
    large(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text("{}")
    os.utime(folder, (time.time() - 100,) * 2)
    (models / "loop").symlink_to(models, target_is_directory=True)
    (models / "broken").symlink_to(tmp_path / "nowhere")
    tool = find_tools(machine=Machine((tmp_path,)))[0]
    assert list_base_files(tool) == [new, folder, old]
    assert list_base_files(tool, most=1) == [new]


def test_a_search_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(60):
        (tmp_path / f"other {index}").mkdir()
    install(tmp_path / "zz ComfyUI", "ComfyUI")
    assert find_tools(machine=Machine((tmp_path,)), seconds=-1) == []
    monkeypatch.setattr(other_tools._Search.__init__, "__defaults__", (5,))
    assert len(other_tools._Search(60).children(tmp_path)) == 5


def test_this_computer_is_searched_in_time() -> None:
    began = time.process_time()
    machine = detect_machine()
    find_tools(machine=machine)
    assert time.process_time() - began < 6
    assert Path.home() in machine.places
