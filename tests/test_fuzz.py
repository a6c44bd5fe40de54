"""Hostile files and requests, drawn by hypothesis: each gets a sentence, soon, and the page still opens.

The draws are the same each time. `LORA_EASEL_FUZZ=50 python -m pytest tests/test_fuzz.py` draws 50 times as
many, others each time.
"""

import contextlib
import json
import os
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from app import main
from app.dataset.gallery import count_caption_tokens
from app.preview.view import parse_infotext
from app.state import AppState
from app.train.form import Plan
from lora_core.data.dataset import scan
from lora_core.errors import LoraError
from lora_core.model_files.starting_settings import settings_from_lora
from lora_core.models.weight_files import open_weights
from lora_core.runs.events import from_line
from lora_core.settings.config import RunConfig, load_toml
from lora_core.system.files import clean_value
from lora_core.system.other_tools import recognise_tool

TIMES = int(os.environ.get("LORA_EASEL_FUZZ", "1"))
SLOWEST = 5.0
"""Seconds of this process for one file or request; a good one takes milliseconds."""
ORIGIN = "http://127.0.0.1:7860"


def budget(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def soon() -> Iterator[None]:
    begun = time.process_time()
    yield
    assert time.process_time() - begun < SLOWEST


texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["\ud800", "a\udfffb", "\0", "²", "٣", "9" * 5000, "-1", "1e999", "nan", "None", "../..", "~", "{}"]
    ),
    st.sampled_from([" ", "\n", "{", "{|", " |", "<lora:", '"', "(", "a.", "[", "a:", "\t,"]).flatmap(
        lambda piece: st.sampled_from([1, 400, 40_000]).map(lambda times: piece * times)
    ),
    st.sampled_from(["([a-z]+)+!", "(?=a)", "(.*)*x", "[", "a{99999}", "mid_block"]),
)
numbers = st.sampled_from([0, -1, 2**63, 10**30, 10**400, 0.5, float("nan"), float("inf"), 1e308, True, None])
values = st.recursive(
    texts | numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def as_json(value: Any) -> bytes:
    """JSON as others write it: with escaped surrogates, NaN, and numbers of any length."""
    return json.dumps(value).encode()


deep = st.sampled_from(
    [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"", b"null", b"{" + b'"a":1,' * 1000]
)
bodies = values.map(as_json) | deep

# ---- headers of safetensors files
# -----------------------------------------------------------------------------------------

KEYS = (
    "lora_easel.config",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_network_module",
    "ss_datasets",
    "ss_max_train_steps",
    "ss_steps",
    "ss_lr_warmup_steps",
    "ss_resolution",
    "ss_optimizer",
    "ss_text_encoder_lr",
    "ss_learning_rate",
    "ss_tag_frequency",
    "ss_batch_size_per_device",
    "modelspec.trigger_phrase",
    "ss_sd_model_name",
)
tomls = st.one_of(
    texts,
    st.tuples(
        st.sampled_from(["adapter.rank", "seed", "optimizer.lr", "dataset.trigger", "model.base"]), values
    ).map(lambda pair: f"{pair[0]} = {json.dumps(pair[1])}"),
    texts.map(lambda pattern: f"[adapter]\nrank = 4\n[adapter.block_ranks]\n{json.dumps(pattern)} = 4"),
    st.sampled_from(["a = " + "[" * 9000, ".".join("a" * 9000) + " = 1", "seed = 0x" + "f" * 9000]),
)
metadata = st.dictionaries(st.sampled_from(KEYS), st.one_of(texts, values.map(json.dumps), tomls), max_size=5)
DOWN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "F32", "X"]) | values,
        "shape": st.sampled_from([[4, 4], [0], [], [2**40, 0], [1] * 9, [10**30]]) | values,
        "data_offsets": st.sampled_from([[0, 32], [0, 64], [0, 0], [5, 1], [0, 10**30]]) | values,
    }
)
tables = st.dictionaries(
    st.sampled_from([DOWN, "a.weight", "x" * 5000]) | texts, entries | values, max_size=2
)
GOOD = {DOWN: {"dtype": "F16", "shape": [4, 4], "data_offsets": [0, 32]}}


def header_of(table: Any, texts: Any) -> bytes:
    return as_json({**table, "__metadata__": texts})


headers = st.one_of(
    metadata.map(lambda texts: header_of(GOOD, texts)),
    st.builds(header_of, tables, metadata | values),
    deep,
    bodies,
)


def file_of(header: bytes, data: bytes = bytes(32)) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@budget(150)
@given(headers)
def test_headers_of_lora_files(place: Path, header: bytes) -> None:
    file = place / "one.safetensors"
    file.write_bytes(file_of(header))
    with soon():
        try:
            found = settings_from_lora(file)
        except LoraError:
            return
        RunConfig().changed(found.values)
        assert clean_value(found.values) == found.values
        assert all(len(text) < 300 and text.encode() for text in found.left)


# ---- pickles
# -----------------------------------------------------------------------------------------


@budget(60)
@given(
    st.binary(max_size=60) | values.map(pickle.dumps),
    st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04"]),
)
def test_old_checkpoints(place: Path, data: bytes, start: bytes) -> None:
    file = place / "one.ckpt"
    file.write_bytes(start + data)
    with soon(), contextlib.suppress(LoraError):
        assert open_weights(file).shapes == {}


# ---- settings, lines and texts
# -----------------------------------------------------------------------------------------


@budget(100)
@given(tomls)
def test_settings(place: Path, text: str) -> None:
    file = place / "config.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with soon(), contextlib.suppress(LoraError):
        RunConfig.from_dict(load_toml(file))


EVENTS = ("Started", "StepDone", "Validated", "PreviewDone", "Failed", "Finished", "Event", "X")


@budget(100)
@given(
    st.sampled_from(EVENTS),
    st.dictionaries(st.sampled_from(["step", "loss", "time", "reason"]), values),
    bodies,
)
def test_lines_of_a_run(kind: str, fields: dict[str, Any], other: bytes) -> None:
    with soon():
        for line in (as_json({"event": kind, **fields}).decode(), other.decode("utf-8", "replace")):
            event = from_line(line)
            assert event is None or isinstance(event.step, int)


@budget(60)
@given(texts | st.lists(texts, max_size=4).map("".join))
def test_captions_and_texts_in_pictures(place: Path, text: str) -> None:
    with soon():
        parse_infotext(text)
        count_caption_tokens(text[:50_000], Plan(desk_of(place).project))
    folder = place / "pictures"
    folder.mkdir(exist_ok=True)
    for name in ("a.txt", "metadata.jsonl", "metadata.csv"):
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with soon():
        scan(folder)


@budget(40)
@given(texts)
def test_settings_of_other_tools(place: Path, text: str) -> None:
    root = place / "ComfyUI"
    for name in ("comfy", "models"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "main.py").touch()
    (root / "extra_model_paths.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with soon():
        recognise_tool(root)


# ---- requests
# -----------------------------------------------------------------------------------------

_desks: dict[Path, AppState] = {}


def desk_of(place: Path) -> AppState:
    if place not in _desks:
        workspace = place / "easel"
        workspace.mkdir()
        _desks[place] = AppState(workspace, worker_command=["no-such-program"])
    return _desks[place]


@pytest.fixture(scope="module")
def client(place: Path) -> TestClient:
    app = main.build_app(desk_of(place), [])
    return TestClient(app, base_url=ORIGIN, raise_server_exceptions=False)


def load_event(client: TestClient) -> int:
    listed = client.get("/config").json()["dependencies"]
    return int(next(one["id"] for one in listed if any(target[1] == "load" for target in one["targets"])))


def assert_page_opens(client: TestClient) -> None:
    sent = {"fn_index": load_event(client), "data": [], "session_hash": "fuzz"}
    answer = client.post("/gradio_api/run/predict", json=sent)
    assert answer.status_code == 200, answer.text[:300]
    assert "run-bar" in client.get("/easel/live?hidden=1").text


FIELDS = (
    "do",
    "run",
    "file",
    "path",
    "text",
    "picture",
    "pictures",
    "find",
    "put",
    "project",
    "title",
    "rows",
    "tool",
    "files",
    "regex",
    "what",
    "moved",
    "name",
    "strength",
)
DO = (
    "new",
    "open",
    "rename",
    "delete",
    "clean",
    "replace",
    "trigger",
    "see",
    "show",
    "resume",
    "up",
    "remove",
    "measure",
)
DROPPED = {"/easel/quit", "/easel/show-file"}
requests = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=4).map(as_json),
    st.tuples(st.sampled_from(DO), st.dictionaries(st.sampled_from(FIELDS), values, max_size=3)).map(
        lambda pair: as_json({**pair[1], "do": pair[0]})
    ),
    bodies,
)


def post_routes(client: TestClient) -> list[str]:
    routes = client.app.app.routes  # type: ignore[attr-defined]
    found = [
        r.path
        for r in routes
        if "POST" in (getattr(r, "methods", None) or ()) and r.path.startswith("/easel")
    ]
    return sorted(path.replace("{batch}", "none") for path in found if path not in DROPPED)


def test_requests_with_bodies_that_no_page_sends(client: TestClient) -> None:
    routes = post_routes(client)
    assert len(routes) > 15

    @budget(200)
    @given(st.sampled_from(routes), requests)
    def sent(route: str, body: bytes) -> None:
        with soon():
            answer = client.post(route, content=body)
        assert answer.status_code < 500, (route, body[:200], answer.text[:200])
        assert "Traceback" not in answer.text
        assert answer.status_code == 204 or answer.text

    sent()
    assert_page_opens(client)


@budget(25)
@given(headers, st.sampled_from(["32", "²", "9" * 5000, "", "-1"]))
def test_headers_that_are_dropped_on_the_page(client: TestClient, header: bytes, size: str) -> None:
    data = file_of(header, b"")
    sent = str(len(data) + 32) if size == "32" else size
    with soon():
        answer = client.post("/easel/like", params={"size": sent, "name": "x"}, content=data)
    assert answer.status_code < 500, answer.text[:200]


def test_the_page_opens_after_all_of_that(client: TestClient) -> None:
    assert_page_opens(client)


drafts = st.one_of(
    st.dictionaries(
        st.sampled_from(
            [
                "values",
                "trigger",
                "goal",
                "level",
                "dataset",
                "linked",
                "preview",
                "preview_loras",
                "preview_strip",
                "preview_strip_at",
            ]
        ),
        values
        | st.dictionaries(
            st.sampled_from(
                [
                    "train.steps",
                    "optimizer.lr",
                    "model.base",
                    "adapter.block_ranks",
                    "seed",
                    "rows",
                    "rev",
                    "steps",
                    "cfg",
                    "prompt",
                    "values",
                    "on",
                ]
            ),
            values,
        ),
        max_size=4,
    ).map(as_json),
    bodies,
)


@budget(15)
@given(drafts)
def test_drafts_that_cannot_be_shown(place: Path, client: TestClient, draft: bytes) -> None:
    project = desk_of(place).project
    (project.path / "draft.json").write_bytes(draft)
    project.open(project.path)
    assert_page_opens(client)
    assert_page_opens(client)
