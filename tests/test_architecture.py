"""The rules that keep the house in order, imports pointing left above all; read from the source, nothing
runs."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.warm import program

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "errors", "system", "settings", "model_files", "data", "runs", "projects", "backends", "models", "lora",
    "formats", "generate", "evaluate", "tools", "train", "report", "verbs", "worker", "api",
    "cli",
    "__main__",
]  # fmt: skip
WITHOUT_TORCH = [
    "lora_core.errors", *(f"lora_core.{name}" for name in ORDER[1:7]), "lora_core.generate.request",
    "lora_core.generate.grid",     "lora_core.report.plots",
]  # fmt: skip
TENSORS = {"torch", "transformers", "diffusers", "accelerate", "peft"}
FOLDERS = [ROOT / name for name in ("lora_core", "app", "assets")]
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in [ROOT / "launch.py", *(path for folder in FOLDERS for path in folder.rglob("*.py"))]
}


def below(*tops: str) -> list[str]:
    return [name for name in TREES if name.startswith(tops)]


def imports(name: str) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in the file."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def place(dotted: str) -> int:
    """The position of a module of lora_core in the order."""
    return ORDER.index(dotted.split(".")[1])


def test_imports_are_absolute() -> None:
    assert [(name, i) for name in TREES for i in imports(name) if i.startswith(".")] == []


def test_imports_point_left() -> None:
    wrong = [
        (name, imported)
        for name in below("lora_core/")
        for imported in imports(name)
        if name != "lora_core/__init__.py"
        and imported.startswith("lora_core.")
        and place(imported) > place(name.removesuffix(".py").replace("/", "."))
    ]
    assert wrong == []


def test_the_library_does_not_know_the_window() -> None:
    assert [(n, i) for n in below("lora_core/") for i in imports(n) if i.split(".")[0] == "app"] == []


def test_the_window_knows_folders_and_settings_alone() -> None:
    engine = [(n, i) for n in below("app/") for i in imports(n) if i.split(".")[0] == "lora_core"]
    assert [(n, i) for n, i in engine if not f"{i}.".startswith(tuple(f"{m}." for m in WITHOUT_TORCH))] == []


def test_the_light_side_imports_no_tensors() -> None:
    light = below("app/", *(module.replace(".", "/") for module in WITHOUT_TORCH))
    assert [(n, i) for n in light for i in imports(n) if i.split(".")[0] in TENSORS] == []


def test_the_window_starts_without_torch() -> None:
    code = "import sys, app.main; sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    command = [program("window"), "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_window_tells_no_hub_of_this_computer() -> None:
    """Gradio imports the hub's client, which reads this variable once."""
    setting = "HF_HUB_DISABLE_TELEMETRY"
    code = f"import app.gradio_modules, huggingface_hub.constants as c; assert c.{setting}"
    bare = {name: value for name, value in os.environ.items() if name != setting}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_setting_up_needs_the_standard_library_alone() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import launch, app.install"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_families_are_named_in_their_table_alone() -> None:
    """Docstrings and comments may name them; code may not, for it would branch on a family's name."""
    found = []
    for name in set(below("app/", "lora_core/")) - {"lora_core/model_files/families.py"}:
        docstrings = {id(node.value) for node in ast.walk(TREES[name]) if isinstance(node, ast.Expr)}
        for node in ast.walk(TREES[name]):
            word = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None)
            if isinstance(word, str) and id(node) not in docstrings and re.search(r"sd15|sd2\b|sdxl", word):
                found.append((name, word))
    assert found == []


def test_functions_are_short() -> None:
    long = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{name}: {node.name} has {lines} lines"] if lines > 60 else []
    assert long == []


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [n for n in TREES if Path(n).stem in ("util", "utils", "common", "helpers", "misc")] == []


def names_read(tree: ast.AST) -> Iterator[str]:
    """Every name that a file reads; of text, words outside of docstrings, as rows name code by text."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()) | ast.Attribute(attr=name, ctx=ast.Load()):
                yield name
            case ast.MatchClass():
                yield from node.kwd_attrs
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                yield from re.findall(r"\w+", text)


def names_defined(tree: ast.AST) -> Iterator[str]:
    """Functions, methods, classes, constants and fields."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                yield name


def test_nothing_is_without_a_caller() -> None:
    """Tests do not count as callers. Routes are called by the scripts of the page, what is shown by its
    templates, verbs and the worker's `do_...` by their names, and `lora_core.api` by others."""
    read = {name for tree in TREES.values() for name in names_read(tree)}
    for script in [
        *(ROOT / "assets").rglob("*.js"),
        *(ROOT / "assets").glob("*.toml"),
        *(ROOT / "lora_core").rglob("*.j2"),
        *(ROOT / "app").rglob("*.html"),
    ]:
        read |= set(re.findall(r"\w+", script.read_text(encoding="utf-8")))
    unused = [
        (file, name)
        for file in below("launch.py", "app/", "lora_core/")
        if file != "lora_core/api.py"
        for name in names_defined(TREES[file])
        if name not in read and not name.startswith(("__", "do_")) and not called_by_route(TREES[file], name)
    ]
    assert unused == []


def called_by_route(tree: ast.AST, name: str) -> bool:
    """Whether a function is handed over by a decorator, as routes and verbs are."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return any(
        function.name == name
        and any(
            isinstance(one, ast.Call) or getattr(one, "id", "") == "verb" for one in function.decorator_list
        )
        for function in functions
    )


def test_private_names_of_torch_are_used_in_backends_alone() -> None:
    """Any minor version may change them: `backends` checks them at start and falls back."""
    found = [
        (name, ast.unparse(node))
        for name in below("lora_core/", "app/")
        if not name.startswith("lora_core/backends/")
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        and ast.unparse(node).split(".")[0] in TENSORS
    ]  # fmt: skip
    assert found == []


def test_the_window_s_markup_is_in_templates_alone() -> None:
    markup = re.compile(r"</?[a-z][a-z0-9]*[\s>/]")
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sorted((ROOT / "app").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and markup.search(node.value)
    ]
    assert found == []
