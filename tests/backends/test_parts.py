"""Parts of diffusers and transformers are imported alone, and the rest of both is there as ever."""

import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_core import backends
from lora_core.backends import PARTS, import_models
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = """
import sys
from lora_core.backends import PACKAGES, PARTS, import_models

import_models((*PARTS, *sys.argv[1:]))
made = [sys.modules[name] for name in PACKAGES if name in sys.modules]
assert len(made) == (0 if sys.argv[1:] else len(PACKAGES))
assert len([name for name in sys.modules if name.startswith("diffusers.models.autoencoders.")]) < 5
import lora_core.models.load as load
from diffusers import AutoencoderKL, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets import UNet1DModel
import diffusers.hooks, peft, transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModel, CLIPModel, CLIPTextModel

assert load.UNet2DConditionModel is UNet2DConditionModel and load.AutoencoderKL is AutoencoderKL
assert load.CLIPTextModel is CLIPTextModel and transformers.models.clip.CLIPModel is CLIPModel
assert callable(diffusers.hooks.apply_group_offloading) and callable(peft.get_peft_model)
pipeline = StableDiffusionPipeline.from_pretrained("assets/base", safety_checker=None)
assert isinstance(pipeline.unet, load.UNet2DConditionModel)
assert isinstance(pipeline.text_encoder, load.CLIPTextModel)
pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
assert any(isinstance(module, BaseTunerLayer) for module in pipeline.unet.modules())
"""


@pytest.mark.parametrize("more", [(), ("diffusers.there_is_no_such_part",)], ids=["parts", "falls back"])
def test_all_of_diffusers_is_there_afterwards(more: tuple[str, ...]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", EVERYTHING, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_changes_where_the_libraries_are_imported_already() -> None:
    from diffusers.models.autoencoders import AutoencoderKL

    before = dict(sys.modules)
    import_models()
    assert {name: sys.modules[name] for name in before} == before
    assert sys.modules["diffusers.models.autoencoders"].AutoencoderKL is AutoencoderKL


def test_a_broken_torch_is_not_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time it would say that it is partially initialized, instead of what it lacks."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch"):
        import_models(())


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `toys` with packages, each with a `part`; `circle` and its `user` import each other."""
    waits = "import toys\ntoys.begun.set()\nassert toys.go.wait(60)\n"
    sources = {
        "": "",
        "plain": "from .part import VALUE\nCOUNTED = [*globals().get('COUNTED', []), 1]\n",
        "failing": "import toys\nif not hasattr(toys, 'ready'): raise RuntimeError('not yet')\nVALUE = 3\n",
        "slow": f"{waits}VALUE = 5\n",
        "circle": f"{waits}import toys.circle.user\nVALUE = 6\n",
        "other": "import sys, types\nsys.modules[__name__] = types.SimpleNamespace(VALUE=4)\n",
    }
    for name, source in sources.items():
        folder = tmp_path / "toys" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(source)
        (folder / "part.py").write_text("VALUE = 2\n")
    user = "import toys\ntoys.asked.set()\nVALUE = toys.circle.VALUE\n"
    (tmp_path / "toys" / "circle" / "user.py").write_text(user)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backends, "PACKAGES", tuple(f"toys.{name}" for name in sources if name))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "toys"]:
        del sys.modules[name]


def test_a_package_is_executed_once_it_is_asked(toys: None) -> None:
    import_models(("toys.plain.part", "toys.failing.part", "toys.other.part"))
    import toys as package

    plain, failing, other = package.plain, package.failing, package.other
    assert "VALUE" not in vars(plain)
    assert plain.part.VALUE == 2
    assert "VALUE" not in vars(plain)
    assert (plain.VALUE, plain.COUNTED) == (2, [1])
    with pytest.raises(AttributeError, match=r"module 'toys\.plain' has no attribute 'nothing'"):
        plain.nothing  # noqa: B018
    assert plain.COUNTED == [1]
    with pytest.raises(RuntimeError, match="not yet"):
        failing.VALUE  # noqa: B018
    package.ready = True
    assert failing.VALUE == 3
    assert sys.modules["toys.other"] is other
    assert other.VALUE == sys.modules["toys.other"].VALUE == 4
    assert sys.modules["toys.other"] is not other
    with pytest.raises(AttributeError):
        other.nothing  # noqa: B018


def _in_getattr(thread: threading.Thread) -> bool:
    """Whether the thread is in `__getattr__` or has ended."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != "__getattr__":
        frame = frame.f_back
    return frame is not None or not thread.is_alive()


def test_a_thread_waits_for_the_one_that_executes_a_package(toys: None) -> None:
    import_models(("toys.slow.part",))
    import toys as package

    package.begun, package.go, found = threading.Event(), threading.Event(), []
    threads = [threading.Thread(target=lambda: found.append(package.slow.VALUE)) for _ in range(2)]

    threads[0].start()
    assert package.begun.wait(60)
    threads[1].start()
    wait_for(lambda: _in_getattr(threads[1]))
    package.go.set()
    for thread in threads:
        thread.join(60)
    assert found == [5, 5]


def test_threads_that_wait_for_each_other_go_on_as_with_import_statements(toys: None) -> None:
    import_models(("toys.circle.part",))
    import toys as package

    package.begun, package.go, package.asked, found = *(threading.Event() for _ in range(3)), []
    tasks = (
        lambda: package.circle.VALUE,
        lambda: importlib.import_module("toys.circle.user").VALUE,
    )
    threads = [threading.Thread(target=lambda t=t: found.append(t()), daemon=True) for t in tasks]
    threads[0].start()
    assert package.begun.wait(60)
    threads[1].start()
    assert package.asked.wait(60)
    wait_for(lambda: _in_getattr(threads[1]))
    package.go.set()
    for thread in threads:
        thread.join(20)
    assert found == [6, 6]


def test_the_parts_are_what_a_base_is_made_of() -> None:
    """A part that another version has moved would make each start import twice."""
    import lora_core.models.load as load

    used = (load.UNet2DConditionModel, load.AutoencoderKL, load.CLIPTextModel)
    assert tuple(kind.__module__ for kind in used) == PARTS
