"""The registry of verbs of the command line, the worker and `lora_core.api`.

A verb is a function with typed parameters and a docstring. `queue_add` is the command `queue add`; the first
line of its docstring is the command's help, and `Args:` is the help of its options. `lora_core.cli` makes a
parser from the signature, `lora_core.worker` calls it with the keys of a request, `lora_core.api` lists it.

The command line takes a parameter without a default as an argument and any other as an option. Where it is
spelled otherwise, `Annotated` says so: `"--to FOLDER"` is an option with its placeholder, `"FILE"` an
argument with its placeholder, a table or a tuple the values to choose from.

`workspace` is where runs, projects and caches live and where names are looked for; `run` is a run's folder or
its name there; `note` is called with (done, total). Functions import what needs torch when they are called,
so that `runs` and `stop` answer at once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.model_files.header import what_is_there
from lora_core.settings.config import checked_value
from lora_core.settings.schema import AUTO, PRECISIONS
from lora_core.system.files import workspace as workspace_folder

if TYPE_CHECKING:
    from lora_core.data.images import SizeCache
    from lora_core.evaluate.validator import Evaluator
    from lora_core.models.load import BaseModel

Function = TypeVar("Function", bound=Callable[..., Any])
File = str | Path
Lora = WeightedLora | str | Path
Place = File | None
"""A workspace; None for LORA_EASEL_HOME, else the platform's user data folder."""
Found = dict[str, Any]
"""A document, as `--json` prints it."""
Progress = Callable[[int, int], None]
"""Called with (done, total)."""
CHECKPOINT = object()
"""Marks a parameter that also accepts a run's checkpoint on the command line: RUN or RUN@STEP."""
AdapterFile = Annotated[File, CHECKPOINT]
FILE_PRECISIONS = tuple(name for name in PRECISIONS if name != AUTO)
"""Dtypes of adapter files."""

GROUPS = {
    "queue": "Train runs one after the other.",
    "concepts": "Parts of a dataset with rules of their own.",
    "captions": "Change the captions of a folder or project.",
    "masks": "Mask the images of a folder or project.",
    "projects": "Projects: images, captions, settings and runs.",
    "caches": "Encoded images and captions, unpacked zips.",
    "trash": "Deleted runs and projects.",
}
"""First words of commands of two words, with their help."""

VERBS: dict[str, Callable[..., Any]] = {}
"""Functions by the words of their command."""


def verb(function: Function) -> Function:
    """Register a function under the words of its command."""
    first, _, second = function.__name__.partition("_")
    words = f"{first} {second}" if first in GROUPS else function.__name__
    VERBS[words.replace("_", "-")] = function
    return function


@dataclass(frozen=True)
class Measure:
    """The images and the base to measure an adapter with.

    Attributes:
        dataset: a folder of held-out images with captions, a zip, a project's name, or `demo`.
        base: `demo`, a diffusers folder, a .safetensors file, or a hub id.
        vae: a VAE in place of the base's own: a folder or a file.
        prediction: prediction type of the base.
        triples: noise draws (timestep and noise) per image.
        seed: of the noise draws.
        workspace: where zips are unpacked.
        on_phase: called with the name of the measurement.
        zero_terminal_snr: whether the base's last timestep is pure noise.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
    """

    dataset: File
    base: str = "demo"
    vae: str = ""
    prediction: str = "auto"
    triples: int = 8
    seed: int = 0
    workspace: Place = None
    on_phase: Callable[[str], None] | None = None
    zero_terminal_snr: str = "auto"
    device: str = "auto"

    def load(self, precision: str = "fp32") -> "tuple[BaseModel, list[Any]]":
        """The base, and the images.

        Raises:
            LoraError: a value is out of range, or the base or an image cannot be read.
        """
        from lora_core.data.dataset import require_clean

        checked_value("validation.draws_per_image", self.triples, "--triples")
        found = load_images(self.dataset, self.workspace)
        require_clean(found)
        from lora_core.models.device import dtype_of
        from lora_core.models.load import load_base

        device = choose_device(self.device)
        base = load_base(
            self.base, device, dtype_of(precision, device), self.prediction, self.vae,
            zero_snr=self.zero_terminal_snr,
        )  # fmt: skip
        return base, found.records

    def evaluator(self) -> "tuple[Evaluator, BaseModel]":
        """What measures adapters on these images, and its base."""
        base, records = self.load()
        from lora_core.evaluate.validator import Evaluator

        return Evaluator(base, records, self.triples, self.seed, self.on_phase), base


def choose_device(name: str) -> Any:
    """Set the device of this process; `auto` keeps it.

    Raises:
        ConfigError: no such device.
    """
    from lora_core.models.device import best_device, use_device

    return best_device() if name == "auto" else use_device(checked_value("train.device", name, "--device"))


def load_images(dataset: File, workspace: Place, sizes: "SizeCache | None" = None) -> Any:
    """The dataset at a path, or a project's; zips are unpacked in the workspace. `sizes` are known from
    before."""
    from lora_core.data.dataset import open_dataset
    from lora_core.projects.workspace import find_dataset

    place = workspace_folder(workspace)
    return open_dataset(find_dataset(str(dataset), place), place / "cache" / "datasets", sizes)


def weighted_loras(loras: Any) -> list[WeightedLora]:
    """Adapters, each a `WeightedLora` or a file of strength 1; one may stand for a list of one.

    Raises:
        ConfigError: something else.
    """
    one = isinstance(loras, str | Path | WeightedLora) or not isinstance(loras, Iterable)
    found = [loras] if one else list(loras)
    for lora in found:
        if not isinstance(lora, str | Path | WeightedLora):
            raise ConfigError(f"{lora!r} is not a LoRA; give a file or WeightedLora(file, strength).")
    return [lora if isinstance(lora, WeightedLora) else WeightedLora(str(lora)) for lora in found]


def plain_request(shot: GenerationRequest) -> GenerationRequest:
    """The request with texts for paths, and its adapters as `weighted_loras`."""
    paths: dict[str, Any] = {name: str(getattr(shot, name)) for name in ("base", "vae", "image", "mask")}
    return replace(shot, **paths, loras=tuple(weighted_loras(shot.loras)))


def checked_loras(loras: Sequence[Lora] | Lora) -> list[WeightedLora]:
    """Adapters with their strengths, see `weighted_loras`.

    Raises:
        AdapterFileError: a file does not exist.
        ConfigError: a strength is out of range.
    """
    found = weighted_loras(loras)
    for lora in found:
        if not Path(lora.file).is_file():
            raise AdapterFileError(f"The adapter {lora.file} {what_is_there(lora.file)}.")
        for strength in (lora.strength, lora.on_text):
            if not abs(strength) <= 1e30:  # more overflows fp32
                raise ConfigError(
                    f"The strength {strength:g} of {lora.file} is out of range; it must be between -1e30 and"
                    " 1e30."
                )
    return found


def listed(names: Sequence[str] | str) -> list[str]:
    """The names of a list; a text is a list of one, not of its letters."""
    return list(map(str, [names] if isinstance(names, str | Path) else names))


def check_precision(precision: str) -> None:
    """Raise ConfigError for an unsupported dtype of adapter files."""
    if precision not in FILE_PRECISIONS:
        raise ConfigError(f"The precision {precision!r} is not one of {', '.join(FILE_PRECISIONS)}.")
