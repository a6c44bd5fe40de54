"""Implementations of the frozen layers, the only place for private operators of torch; and which parts of
diffusers and transformers are imported for a base."""

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PARTS = (
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip",
)
PACKAGES = (
    "diffusers.hooks", "diffusers.models.autoencoders", "diffusers.models.transformers",
    "diffusers.models.unets", "transformers.models",
)  # fmt: skip
"""What they are in. Each `__init__` imports all models that are there, or reads the source of each."""
_importing = threading.Lock()
_locks: Any = importlib.import_module("importlib._bootstrap")


def import_models(parts: Sequence[str] = PARTS) -> None:
    """Import `parts`; the `__init__` of `PACKAGES` is executed once something of it is asked for.

    Where that does not work, as it may not with other versions, nothing stays imported of these libraries: an
    import statement does it again, as usual. Torch first: a second import hides its error.
    """
    importlib.import_module("torch")
    with _importing:
        before, finder = set(sys.modules), _PackageFinder()
        sys.meta_path.insert(0, finder)
        try:
            for name in parts:
                importlib.import_module(name)
        except Exception:  # noqa: BLE001 - of whatever kind, the plain import says it again
            for name in set(sys.modules) - before:
                if name.partition(".")[0] in ("diffusers", "transformers", "peft"):
                    del sys.modules[name]
        finally:
            sys.meta_path.remove(finder)


class _PackageFinder:
    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path) if name in PACKAGES and target is None else None
        if found is not None and hasattr(found.loader, "exec_module"):
            found.loader = _PackageLoader(found.loader)
        return found


class _PackageLoader(Loader):
    """As `importlib.util.LazyLoader`, which executes a package for its `__path__` too, so for a submodule."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        module.__class__ = _Package


class _Package(ModuleType):
    """A package that is not executed yet, or has put another object in its place since."""

    def __getattr__(self, name: str) -> Any:
        # Other threads wait. What the package itself asks for while it is executed is still missing. So is
        # what a thread asks for that the executing one waits for, as with an import statement.
        lock = _locks._get_module_lock(self.__name__)
        try:
            lock.acquire()
        except _locks._DeadlockError:
            return ModuleType.__getattribute__(self, name)
        try:
            if type(self) is _Package and sys.modules.get(self.__name__) is self:
                self.__class__ = _ExecutedPackage
                executed = None
                try:
                    executed = importlib.reload(self)
                finally:
                    self.__class__ = ModuleType if executed is self else _Package  # type: ignore[assignment]
        finally:
            lock.release()
        found = sys.modules[self.__name__]
        return ModuleType.__getattribute__(self, name) if found is self else getattr(found, name)


class _ExecutedPackage(_Package):
    """One that is being executed."""
