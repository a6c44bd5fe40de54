"""Bases, captioners and mask models on the Hugging Face hub: size of the download, and the download into the
local cache; and the upload of an adapter.

Weights are streamed here, into `blobs/<sha256>.incomplete` of the cache: huggingface_hub throws a partial
file away, so a download of gigabytes that was cut off would begin again. huggingface_hub fetches the small
files and links all of them. The file by which the cache is recognised (`unet/config.json`) comes last. No
torch is imported.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_token,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.errors import HTTPError as NetworkError
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, hf_raise_for_status

from lora_core.errors import ConfigError, ModelFileError
from lora_core.model_files.detect import UNET_CONFIG, is_hub_id, is_remote, weight_names
from lora_core.model_files.families import FAMILIES
from lora_core.system.files import MARGIN, expand_home, file_bytes, free_bytes, gigabytes, tokens_folder

WEIGHTS = (*dict.fromkeys(part for family in FAMILIES.values() for part in family.parts), "vae")
CONFIGS = (*WEIGHTS, "scheduler", "tokenizer", "tokenizer_2")
"""Folders of a repository that are fetched; a safety checker, for instance, is not."""
TAGGER = ("model.onnx", "selected_tags.csv")
"""The files of a tagger."""
LAST = (UNET_CONFIG, TAGGER[1], "config.json")
"""By the first of these that it needs, a download in the cache is recognised as complete."""
ANSWER_SECONDS = 15.0
CHUNK = 2**20
TRIES = 5
"""Retries of an interrupted transfer without a byte in between."""
NOTE_SECONDS = 5.0

Progress = Callable[[int, int], None]
"""Called with (bytes present, bytes of all files)."""


class DownloadCancelled(ModelFileError):
    """The download was cancelled; the partial download is kept."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: path, bytes, name among the cache's blobs, and whether that is its SHA-256."""

    path: str
    size: int
    blob: str
    hashed: bool


@dataclass(frozen=True)
class Download:
    """The download of a base or of a captioner.

    Attributes:
        repo: the hub id.
        commit: the revision that the files are of.
        files: those that are needed.
    """

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def folder(self) -> Path:
        """The repository in the cache."""
        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"

    @property
    def last(self) -> str:
        """The file that comes last."""
        return next(name for name in LAST if any(file.path == name for file in self.files))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def here(self) -> int:
        """Bytes already in the cache, including partial files."""
        return sum(self._have(file) for file in self.files)

    @property
    def free(self) -> int:
        """Free bytes on the drive of the cache."""
        return free_bytes(self.folder)

    @property
    def fits(self) -> bool:
        """Whether the missing bytes fit on that drive."""
        return self.size - self.here + MARGIN <= self.free

    def blob(self, file: RemoteFile) -> Path:
        """A file in the cache."""
        return self.folder / "blobs" / file.blob

    def is_here(self, file: RemoteFile) -> bool:
        """Whether a file is complete in the cache."""
        return (self.folder / "snapshots" / self.commit / file.path).exists() or self.blob(file).exists()

    def _have(self, file: RemoteFile) -> int:
        return file.size if self.is_here(file) else min(file_bytes(_partial(self.blob(file))), file.size)


def find_download(repo: str, needed: Callable[[str, list[str]], list[str]] | None = None) -> Download:
    """Ask the hub for the needed files of a repository and their sizes.

    Args:
        repo: the hub id.
        needed: chooses of all paths; those of a base by default.

    Raises:
        ModelFileError: the hub does not answer or refuses, or the repository holds nothing of the kind.
    """
    with _in_a_sentence(repo):
        info = HfApi().model_info(repo, files_metadata=True, timeout=ANSWER_SECONDS)
    found = {file.rfilename: file for file in info.siblings or []}
    files = []
    for path in (needed or needed_files)(repo, list(found)):
        lfs = found[path].lfs
        sha = lfs.sha256 if lfs else ""
        blob = sha or str(found[path].blob_id)
        # Names from the hub become paths here.
        if re.fullmatch(r"[0-9a-f]{8,64}", blob) is None or not info.sha:
            raise ModelFileError(f"The hub's list of the files of {repo!r} cannot be read.")
        files.append(RemoteFile(path, int(found[path].size or 0), blob, bool(sha)))
    return Download(repo, str(info.sha), tuple(files))


def needed_files(repo: str, paths: Sequence[str]) -> list[str]:
    """The files of a repository that a base needs: configs, and one variant of each component's
    weights.

    Raises:
        ModelFileError: it is not a diffusers repository of a Stable Diffusion model, or lacks weights.
    """
    if UNET_CONFIG not in paths:
        raise ModelFileError(
            f"The hub's {repo!r} is not a diffusers folder with a UNet (it has no {UNET_CONFIG}), so it"
            " cannot be used by its id; download its .safetensors file and give the path."
        )
    inside = {part: [p.split("/")[1] for p in paths if _part(p) == part] for part in CONFIGS}
    needed = ["model_index.json"] if "model_index.json" in paths else []
    for part, names in inside.items():
        needed += [f"{part}/{name}" for name in names if name.endswith((".json", ".txt"))]
        weights = _weights(part, names) if part in WEIGHTS else []
        if part in WEIGHTS and names and not weights:
            raise ModelFileError(
                f"The hub's {repo!r} has no .safetensors weights of its {part}; choose another repository or"
                " give a file."
            )
        needed += [f"{part}/{name}" for name in weights]
    return needed


def annotator_files(repo: str, paths: Sequence[str], called: str = "captioner") -> list[str]:
    """The files of a repository that a captioner or mask model needs: of a tagger, else of a model of
    transformers.

    Raises:
        ModelFileError: it is neither.
    """
    if all(name in paths for name in TAGGER):
        return list(TAGGER)
    top = [path for path in paths if "/" not in path]
    # A text encoder's weights have the names that those of other models of transformers have.
    weights = _weights("text_encoder", top) or [name for name in top if name == "pytorch_model.bin"]
    if "config.json" not in top or not weights:
        raise ModelFileError(
            f"The hub's {repo!r} is not a {called}: it has neither config.json with weights, as models of"
            f" transformers have, nor {' and '.join(TAGGER)}; choose another."
        )
    return [name for name in top if name.endswith((".json", ".txt", ".model", ".jinja"))] + weights


def annotator_folder(name: str, called: str, fetch: bool, progress: "Progress | None" = None) -> Path:
    """The folder of a captioner or a mask model: one on this computer, or that of a hub id in the local
    cache, which is downloaded there only if `fetch` says so. An ONNX file with a name of its own stays.

    Args:
        name: of the folder, the file or the hub id.
        called: its kind, for messages.
        fetch: whether it may be downloaded.
        progress: of the download.

    Raises:
        ModelFileError: there is none, or it cannot be downloaded.
    """
    name = name.strip()
    folder = expand_home(name)
    if folder.name in TAGGER:
        folder = folder.parent
    if folder.is_dir() or (folder.suffix == ".onnx" and folder.is_file()):
        return folder
    if not is_hub_id(name):
        raise ModelFileError(
            f"There is no folder {name!r}; give the folder of a {called}, or its id on the hub."
        )
    for last in LAST[1:]:
        found = try_to_load_from_cache(name, last)
        if isinstance(found, str) and _is_whole(Path(found).parent):
            return Path(found).parent
    if not fetch:
        raise ModelFileError(
            f"The {called} {name!r} is not a folder and has not been downloaded from the hub; allow the"
            " download (Download from the hub, or --download), or give a folder."
        )
    wanted = find_download(name, functools.partial(annotator_files, called=called))
    download(wanted, progress or _lines_on_stderr(wanted))
    return annotator_folder(name, called, fetch=False)


def _is_whole(snapshot: Path) -> bool:
    """Whether all of a captioner is there: other programs fetch config.json first, or alone."""
    # A link whose blob is gone does not exist.
    names = [one.name for one in snapshot.iterdir() if one.exists()]
    if TAGGER[1] in names:
        return TAGGER[0] in names
    try:
        shards = re.findall(r"-of-(\d+)", " ".join(annotator_files(snapshot.name, names)))
    except ModelFileError:
        return False
    return not shards or len(shards) >= int(shards[-1])


def _part(path: str) -> str:
    part, _, name = path.partition("/")
    return part if name and "/" not in name else ""


def _weights(part: str, names: Sequence[str]) -> list[str]:
    for name, tables in weight_names(part):
        if name in names:
            return [name]
        if any(table in names for table in tables):
            stem, *variant = name.removesuffix(".safetensors").split(".")
            marks = rf"(\.{variant[0]})" if variant else "()"
            shard = re.compile(rf"{stem}(?:{marks}-\d+-of-\d+|-\d+-of-\d+{marks})\.safetensors")
            return [other for other in names if shard.fullmatch(other)]
    return []


def fetch_base(name: str | Path) -> None:
    """Download a base that is named by a hub id into the local cache, with lines on stderr; other names are
    ignored.

    Raises:
        ModelFileError: it cannot be downloaded.
    """
    if is_remote(name):
        found = find_download(str(name).strip())
        download(found, _lines_on_stderr(found))


def download(found: Download, progress: Progress, cancelled: Callable[[], bool] = lambda: False) -> None:
    """Download the missing files of a base or a captioner; a partial file is continued.

    Args:
        progress: called with (bytes done, bytes in all).
        cancelled: asked between chunks.

    Raises:
        DownloadCancelled: `cancelled` returned True.
        ModelFileError: the disk is full, the hub refuses or disconnects, or a file arrived damaged.
    """
    if not found.fits:
        raise ModelFileError(
            f"The model {found.repo!r} cannot be downloaded: {gigabytes(found.size - found.here)} are missing"
            f" and {gigabytes(found.free)} are free in {found.folder.parent}; make room, or set HF_HOME to"
            " another drive."
        )
    # Bars and warnings of its own would come between the lines that `progress` writes.
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with _in_a_sentence(found.repo):
        for file in found.files:
            if file.hashed and not found.is_here(file):
                _fetch(found, file, progress, cancelled)
        progress(found.here, found.size)
        # By default the cache is asked which files to link through the branch's name, so no commit is given.
        names = [file.path for file in found.files if file.path != found.last]
        snapshot_download(found.repo, allow_patterns=names)
        if cancelled():
            raise _cancelled(found)
        snapshot_download(found.repo, allow_patterns=[found.last])
    progress(found.size, found.size)
    if found.last == UNET_CONFIG and is_remote(found.repo):
        raise ModelFileError(f"The hub's {found.repo!r} lacks files that a base needs; choose another.")


def _fetch(found: Download, file: RemoteFile, progress: Progress, cancelled: Callable[[], bool]) -> None:
    blob = found.blob(file)
    # The lock of huggingface_hub, which other programs take for the same file.
    lock = found.folder.parent / ".locks" / found.folder.name / f"{file.blob}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            _stream(found, file, _partial(blob), progress, cancelled)
            os.replace(_partial(blob), blob)
    except Timeout as error:
        raise ModelFileError(
            f"The model {found.repo!r} is being downloaded by another program; wait until that is done."
        ) from error


def _stream(
    found: Download, file: RemoteFile, partial: Path, progress: Progress, cancelled: Callable[[], bool]
) -> None:
    """Download the rest of a file, with retries, and compare its hash."""
    if file_bytes(partial) > file.size:
        partial.unlink()
    others = found.here - file_bytes(partial)
    digest, tries = hashlib.sha256(), 0
    with open(partial, "ab+") as out:
        out.seek(0)
        while chunk := out.read(CHUNK):
            digest.update(chunk)
        while out.tell() < file.size:
            before = out.tell()
            try:
                for chunk in _chunks(found, file, before):
                    if cancelled():
                        raise _cancelled(found)
                    if out.tell() + len(chunk) > file.size:
                        break
                    out.write(chunk)
                    digest.update(chunk)
                    progress(others + out.tell(), found.size)
            except HfHubHTTPError:
                raise
            except NetworkError:
                tries = 0 if out.tell() > before else tries + 1
                if tries >= TRIES:
                    raise
                time.sleep(tries)
            else:
                if out.tell() == before:
                    break
    if digest.hexdigest() != file.blob:
        partial.unlink()
        raise ModelFileError(
            f"{file.path} of the model {found.repo!r} arrived damaged and was removed; download it again."
        )


def _chunks(found: Download, file: RemoteFile, start: int) -> Iterator[bytes]:
    url = hf_hub_url(found.repo, file.path, revision=found.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    client = get_session()
    with client.stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=ANSWER_SECONDS
    ) as response:
        hf_raise_for_status(response)
        skipped = 0 if response.status_code == 206 else start
        for chunk in response.iter_bytes():
            passed = min(skipped, len(chunk))
            skipped -= passed
            if len(chunk) > passed:
                yield chunk[passed:]


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _cancelled(found: Download) -> DownloadCancelled:
    return DownloadCancelled(f"The download of {found.repo!r} was cancelled; the partial download is kept.")


def files_to_upload(file: Path, card: str, license: str = "") -> dict[str, Path | bytes]:
    """The files of an upload, by name: itself, its preview image if there is one, its new tokens, and its
    model card as README.md.

    Args:
        license: the hub's name of one, for the card; "" states none.

    Raises:
        ConfigError: the license has no form of a name.
    """
    if license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", license):
        raise ConfigError(
            f"The licence {license!r} is not in the hub's list, such as openrail++ or apache-2.0; see"
            " https://huggingface.co/docs/hub/repositories-licenses."
        )
    if license:
        card = card.replace("---\n", f"---\nlicense: {license}\n", 1)
    image = file.with_name(f"{file.stem}.preview.png")
    beside = {image.name: image} if image.is_file() else {}
    tokens = tokens_folder(file)
    beside |= {f"{tokens.name}/{one.name}": one for one in sorted(tokens.glob("*.safetensors"))}
    return {file.name: file, "README.md": card.encode("utf-8", "replace"), **beside}


def upload(repo: str, files: Mapping[str, Path | bytes], public: bool = False) -> tuple[str, list[str]]:
    """Commit files to a repository for models, which is made, private, if there is none; returns its address
    and the names of the files that were written.

    An existing README.md is kept. The token is huggingface_hub's own, of HF_TOKEN or `hf auth login`: it is
    neither taken as an argument nor written anywhere.

    Args:
        repo: OWNER/NAME.
        files: by their names there.
        public: whether everybody may see it.

    Raises:
        ModelFileError: nobody is logged in, the repository is there and not as public as it is asked for, or
            the hub does not answer or refuses.
    """
    if not is_hub_id(repo):
        raise ModelFileError(f"{repo!r} is not a repository of the hub; give OWNER/NAME.")
    if not constants.HF_HUB_OFFLINE and get_token() is None:
        raise ModelFileError(
            "Nobody is logged in to the hub: run `hf auth login` in a terminal, or set HF_TOKEN, with a token"
            " that may write."
        )
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    api = HfApi()
    with _in_a_sentence(repo, "uploaded", otherwise=""):
        api.create_repo(repo, private=not public, exist_ok=True)
        if public == bool(api.model_info(repo, timeout=ANSWER_SECONDS).private):
            seen, wanted, otherwise = (
                ("it is private", "public", "leave out")
                if public
                else ("everybody can see it", "private", "give")
            )
            raise ModelFileError(
                f"{repo} already exists and {seen}; choose another, make it {wanted} at"
                f" {constants.ENDPOINT}/{repo}/settings, or {otherwise} --public."
            )
        kept = ["README.md"] if api.file_exists(repo, "README.md") else []
        new = {name: data for name, data in files.items() if name not in kept}
        try:
            _commit(api, repo, new)
        except (RuntimeError, ValueError) as error:
            if isinstance(error.__cause__, NetworkError):
                raise error.__cause__ from error
            raise ModelFileError(f"The hub did not take the files of {repo}: {error}") from error
    return f"{constants.ENDPOINT}/{repo}", [name for name in files if name not in kept]


def _commit(api: HfApi, repo: str, files: Mapping[str, Path | bytes]) -> None:
    """Commit files; as LFS where Xet fails, whose server has another name, which a network may not let by."""
    disabled = constants.HF_HUB_DISABLE_XET
    try:
        while True:
            added = [CommitOperationAdd(name, data) for name, data in files.items()]
            try:
                api.create_commit(repo, added, commit_message=f"Upload {next(iter(files))}")
                return
            except (RuntimeError, OSError) as error:
                if constants.HF_HUB_DISABLE_XET or isinstance(error, NetworkError):
                    raise
                constants.HF_HUB_DISABLE_XET = True
    finally:
        constants.HF_HUB_DISABLE_XET = disabled


@contextlib.contextmanager
def _in_a_sentence(
    repo: str, done: str = "downloaded", otherwise: str = ", or give a folder or a file"
) -> Iterator[None]:
    try:
        yield
    except ModelFileError:
        raise
    except (NetworkError, HFValidationError, OSError) as error:
        raise ModelFileError(
            f"The model {repo!r} cannot be {done}: {_reason(repo, error, otherwise)}"
        ) from error


def _reason(repo: str, error: BaseException, otherwise: str) -> str:
    # The client wraps the error that it gives up on.
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    hub = constants.ENDPOINT
    match error:
        case OfflineModeIsEnabled():
            return f"HF_HUB_OFFLINE is set; unset it{otherwise}."
        case GatedRepoError():
            return (
                f"its owner asks you to accept terms first; do so at {hub}/{repo}, then log in with `hf auth"
                " login` or set HF_TOKEN."
            )
        case RepositoryNotFoundError():
            return (
                f"{hub} has no such model, or it is private; check the name, and for a private one log in"
                " with `hf auth login` or set HF_TOKEN."
            )
        case HFValidationError():
            return "this is not a valid hub id; check the name."
        case HfHubHTTPError():
            status = error.response.status_code
            login = "log in with `hf auth login` or set HF_TOKEN"
            advice = login if status in (401, 403) else "try again later"
            return f"{hub} answered with error {status}; {advice}."
        case OSError() if error.errno == errno.ENOSPC:
            return f"the drive of {constants.HF_HUB_CACHE} is full; free some space and download again."
        case OSError() if error.errno is not None:
            return f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}."
        case _:
            return (
                f"{hub} cannot be reached ({type(error).__name__}); check the connection and try"
                f" again{otherwise}."
            )


def _lines_on_stderr(found: Download) -> Progress:
    """One line that is overwritten on a terminal, a new one every few seconds elsewhere."""
    terminal, last = sys.stderr.isatty(), 0.0

    def note(here: int, size: int) -> None:
        nonlocal last
        now, ended = time.monotonic(), here >= size
        if not ended and now - last < (0.2 if terminal else NOTE_SECONDS):
            return
        last = now
        share = here * 100 // max(size, 1)
        text = f"Downloading {found.repo}: {gigabytes(here)} of {gigabytes(size)}, {share}%"
        # stderr may be closed.
        with contextlib.suppress(OSError):
            sys.stderr.write(f"\r\x1b[2K{text}" + "\n" * ended if terminal else f"{text}\n")
            sys.stderr.flush()

    note(found.here, found.size)
    return note
