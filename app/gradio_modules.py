"""Gradio's frontend as one script and one style, so that a first load takes few requests.

Gradio serves some forty modules and as many styles one by one. Those that the page's components need are sent
together, and an import map tells the browser where each is (`assets/modules.js`); any other is loaded as
before. A build of Gradio that looks different is served as it is.
"""

import contextlib
import inspect
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, DictLoader

from lora_core.system.files import ASSETS


@contextlib.contextmanager
def without_stubs() -> Iterator[None]:
    """Gradio writes a stub (.pyi) beside each component that it defines, but for those without a source: a
    third of the window's start."""
    whole = inspect.getfile

    def getfile(object: Any) -> str:
        if type(object).__name__ == "ComponentMeta":
            raise OSError
        return whole(object)

    inspect.getfile = getfile
    try:
        yield
    finally:
        inspect.getfile = whole


# Before Gradio imports the hub's client, which reads it then: an upload would tell the hub of this computer.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
with without_stubs():
    import gradio
    from gradio.routes import templates

FOLDER = Path(gradio.__file__).parent / "templates" / "frontend"
ENTRY = re.compile(r"/assets/(index-[\w-]+\.(?:js|css))")
STATIC = re.compile(r'(?:\bfrom|\bimport)"\./([\w.-]+)"')
LAZY = re.compile(r"import\(`\./([\w.-]+)`\)((?:(?!import\().){0,60}?),__vite__mapDeps\(\[([\d,]*)\]\)")
RELATIVE = re.compile(r"""\b(from|import)\s*\(?\s*["'`]\./""")
FILES = re.compile(r"m\.f=(\[.*?\])")
# The compiler of templates in a component of HTML, up to the name that it is called by.
HANDLEBARS = re.compile(
    r"(?s)var \w+=\w+\(\(\w+=>\{\w+\.__esModule=!0,\w+\.extend=.*"
    r",(\w+)=\w+\(\w+\(\(.*?\}\)\)\(\)\)(?=.*\b\1\.default\.compile\()"
)
COMPONENT = re.compile(r"[{,](\w+):\{(?:(?!:\{).)*?component:\(\)=>\w+\(\(\)=>import\(`\./([\w.-]+)`\)")


def bundle_modules(components: Iterable[str]) -> dict[str, bytes]:
    """The files gradio.js and gradio.css of a page with these kinds of components; none if they cannot be
    made."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return _bundle(set(components))
    return {}


def _bundle(components: set[str]) -> dict[str, bytes]:
    entry, style = ENTRY.findall((FOLDER / "index.html").read_text("utf-8"))
    texts: dict[str, str] = {}
    styles, waiting = [style], [entry]
    while waiting:
        name = waiting.pop()
        if name in texts:
            continue
        text = texts[name] = (FOLDER / "assets" / name).read_text("utf-8")
        files = [json.loads(found) for found in FILES.findall(text)]
        shown = {module for kind, module in COMPONENT.findall(text) if kind in components}
        for module, _, needs in LAZY.findall(text):
            if name == entry or module in shown or module.startswith("Blocks-"):
                waiting.append(module)
                needed = (Path(files[0][int(at)]) for at in needs.split(","))
                styles += [file.name for file in needed if file.suffix == ".css"]
        waiting += STATIC.findall(text)
    css = "\n".join((FOLDER / "assets" / name).read_text("utf-8") for name in dict.fromkeys(styles)).encode()
    # The first module asks for this style by itself, unless the page has it.
    texts[entry] = texts[entry].replace(f"./assets/{style}", f"/easel/assets/gradio.css?v={zlib.crc32(css)}")
    # Piece by piece, as whatever is large and freed again leaves a hole in the window's memory.
    pieces = [
        f"{json.dumps(name)}:{json.dumps(_redirect(name, text, texts))}".encode()
        for name, text in texts.items()
    ]
    pieces[0] = (ASSETS / "modules.js").read_bytes() + f"({json.dumps(entry)}, {{".encode() + pieces[0]
    pieces[-1] += b"});"
    return {"gradio.css": css, "gradio.js": b",".join(pieces)}


def _redirect(name: str, text: str, bundled: Iterable[str]) -> str:
    """Have a module import others by names that the import map knows, as it has no address itself."""
    text = LAZY.sub(
        lambda found: f"import(`./{found[1]}`){found[2]},[]" if found[1] in bundled else found[0], text
    )
    text = re.sub(r'(\bfrom|\bimport)"\./', r'\1"gradio/', text).replace("import(`./", "import(`gradio/")
    # Our HTML has no {{braces}}: without their compiler a first load takes a twelfth less.
    text = HANDLEBARS.sub(r"var \1={default:{compile:text=>()=>text}}", text)
    text = text.replace("import.meta.url", f"location.origin+`/assets/{name}`")
    if RELATIVE.search(text):
        raise ValueError(f"{name} imports in another way")
    if name.startswith("statustracker"):
        # The loader of Gradio's start never stops its clock: by frames that costs a page 4% of a core.
        text = text.replace("window.requestAnimationFrame", "(tick=>setTimeout(tick,5000))")
    return text


def serve_page(template: str, functions: Mapping[str, Callable[[], str]]) -> None:
    """Have Gradio fill this template with its settings in place of its own; it may call `functions`."""
    assert templates.env.loader is not None
    templates.env.globals |= functions
    templates.env.loader = ChoiceLoader([DictLoader({"frontend/index.html": template}), templates.env.loader])
