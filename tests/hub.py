"""A hub on this computer: the few routes that huggingface_hub asks, over the files of a folder."""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from lora_core.system.files import DEMO_BASE
from tests.app.bases import write_header
from tests.waiting import PATIENCE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 16 * 1024
SOON = 2.0
"""Seconds, well below those after which a client gives up."""


@dataclass
class Hub:
    """What the server has and does.

    Attributes:
        repos: folder by hub id.
        refusals: by hub id the status and error code of every answer.
        cut_after: bytes after which a file's transfer breaks off, once a file that is longer.
        gate: transfers of weights wait for it once a piece has gone out.
        asked: method, path and range of each request.
        public: repositories that everybody can see.
        xet: whether it takes files by Xet, beside LFS.
        tokens: who asks to write.
    """

    repos: dict[str, Path]
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut_after: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    address: str = ""
    cut: set[str] = field(default_factory=set)
    public: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)
    root: Path = Path()
    blobs: dict[str, bytes] = field(default_factory=dict)
    xet: bool = False

    def sent(self, name: str) -> list[str]:
        """The ranges that were asked for of files that end so."""
        return [range for method, path, range in self.asked if method == "GET" and path.endswith(name)]

    def keep_chunks(self, xorb: bytes) -> None:
        """Keep what a block of Xet holds, where nothing in it could be compressed."""
        # Of each chunk: version, size as stored (3 bytes), compression, size. Source: the format of xet-core.
        data, place = b"", 0
        while xorb[place : place + 1] == b"\0":
            size = int.from_bytes(xorb[place + 1 : place + 4], "little")
            assert xorb[place + 4] == 0
            data += xorb[place + 8 : place + 8 + size]
            place += 8 + size
        self.blobs[hashlib.sha256(data).hexdigest()] = data

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that is to use this hub and a cache of its own."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": ""}


@contextlib.contextmanager
def hub_of(**repos: Path) -> Iterator[Hub]:
    """A running hub; repositories are called owner/NAME."""
    hub = Hub({f"owner/{name.replace('_', '-')}": path for name, path in repos.items()})
    hub.gate.set()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        server.server_close()
        thread.join(PATIENCE)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_PUT(self) -> None:
        self.hub.blobs[self.path.rpartition("/")[2]] = self._body()
        self._send(200, b"", {})

    def do_POST(self) -> None:
        hub, path, body = self.hub, unquote(urlsplit(self.path).path), self._body()
        hub.asked.append(("POST", path, ""))
        hub.tokens.add(self.headers.get("Authorization", ""))
        if path.startswith("/v1/"):
            self._send_json({})
            return
        sent = json.loads(body) if not path.endswith("/commit/main") and not path.startswith("/xet/") else {}
        repo = "/".join(re.sub(r"^/api/models|\.git", "", path).split("/")[1:3])
        if path == "/api/repos/create":
            repo = f"{sent['organization']}/{sent['name']}"
            if repo in hub.refusals:
                self._send(hub.refusals[repo][0], b"{}", {"X-Error-Code": hub.refusals[repo][1]})
                return
            there = repo in hub.repos
            if not there:
                hub.repos[repo] = hub.root / sent["name"]
                hub.repos[repo].mkdir()
                private = sent.get("private") or sent.get("visibility") == "private"
                hub.public |= set() if private else {repo}
            self._send_json({"url": f"{hub.address}/{repo}"}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            rows = [(one["path"], modes[one["path"].endswith(".safetensors")]) for one in sent["files"]]
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in rows]
            self._send_json({"files": files})
        elif path.startswith("/xet/"):
            if "/xorbs/" in path:
                hub.keep_chunks(body)
            known = re.match("/xet/v1/(xorbs|shards)", path)
            self._send_json({"was_inserted": True, "result": 1}, 200 if known else 404)
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}}}
                for one in sent["objects"]
            ]
            self._send_json({"transfer": "basic", "objects": objects})
        else:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] not in ("file", "lfsFile"):
                    continue
                data = hub.blobs[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
                file = hub.repos[repo] / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            self._send_json({"commitUrl": f"{hub.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send_json(self, document: object, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.xet and path.endswith("/xet-write-token/main"):
            token = {"casUrl": f"{self.hub.address}/xet", "exp": 2**33, "accessToken": "xet"}
            headers = {"X-Xet-Cas-Url": token["casUrl"], "X-Xet-Token-Expiration": str(2**33)}
            self._send(200, json.dumps(token).encode(), headers | {"X-Xet-Access-Token": "xet"})
            return
        found = re.fullmatch(
            r"(/api/models)?/(owner/[\w-]+)(?:/(resolve|tree|revision)/([\w-]+)/?(.*))?", path
        )
        repo = found[2] if found else ""
        if repo in self.hub.refusals:
            status, code = self.hub.refusals[repo]
            self._send(status, b"{}", {"X-Error-Code": code})
        elif found is None or repo not in self.hub.repos:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif found[1]:
            listed = self._tree(repo) if found[3] == "tree" else self._info(repo)
            self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        else:
            self._file(repo, found[5], body)

    def _files(self, repo: str) -> list[tuple[str, bytes]]:
        root = self.hub.repos[repo]
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return [(path.relative_to(root).as_posix(), path.read_bytes()) for path in files]

    def _info(self, repo: str) -> dict[str, object]:
        rows = [
            {"rfilename": name, "size": len(data), "blobId": _git_id(data), **_lfs(name, data, "sha256")}
            for name, data in self._files(repo)
        ]
        return {
            "id": repo,
            "sha": COMMIT,
            "siblings": rows,
            "tags": [],
            "private": repo not in self.hub.public,
        }

    def _tree(self, repo: str) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": _git_id(data), **_lfs(name, data, "oid")}
            for name, data in self._files(repo)
        ]

    def _file(self, repo: str, name: str, body: bool) -> None:
        path = self.hub.repos[repo] / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        data = path.read_bytes()
        sha = _lfs(name, data, "sha256")
        tag = hashlib.sha256(data).hexdigest() if sha else _git_id(data)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
        if sha:
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._begin(206 if asked else 200, len(data) - start, headers)
        if body:
            self._transfer(name, data, start)

    def _transfer(self, name: str, data: bytes, start: int) -> None:
        hub, place, size = self.hub, start, PIECE
        while place < len(data):
            if hub.cut_after and place - start >= hub.cut_after and name not in hub.cut:
                hub.cut.add(name)
                self.close_connection = True
                return
            with contextlib.suppress(OSError):
                self.wfile.write(data[place : place + size])
                self.wfile.flush()
            place += size
            # Whoever hears nothing for long gives up: a byte now and then while the gate is shut.
            goes_on = not name.endswith(".safetensors") or hub.gate.wait(SOON)
            size = PIECE if goes_on else 1

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self._begin(status, len(data), headers)
        if self.command != "HEAD":
            self.wfile.write(data)

    def _begin(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _lfs(name: str, data: bytes, key: str) -> dict[str, object]:
    if not name.endswith(".safetensors"):
        return {}
    sha = hashlib.sha256(data).hexdigest()
    return {"lfs": {key: sha, "size": len(data), "pointerSize": 134}}


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub, cache: Path) -> None:
    """Have this process ask `hub` and keep its files in `cache`."""
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    changed = {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        # What sends large files in its own way, to a server of its own.
        "HF_HUB_DISABLE_XET": not hub.xet,
    }
    for name, value in changed.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


def small_repo(path: Path, variant: str = "") -> Path:
    """A diffusers repository of SD 1.x in shape, whose files open and hold almost nothing.

    Args:
        path: the folder to make.
        variant: in the names of the weights, such as "fp16".
    """
    configs = {
        "unet": {"cross_attention_dim": 768, "block_out_channels": [8, 8], "sample_size": 8},
        "vae": {"block_out_channels": [8, 8]},
        "text_encoder": {},
    }
    for part, config in configs.items():
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_text(json.dumps(config))
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
        write_header(path / part / name, {f"{part}.weight": [200, 400]})
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    shutil.copytree(DEMO_BASE / "tokenizer", path / "tokenizer")
    return path
