"""The worker's verbs that look into adapter files and make better ones, over a real process."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.formats.io import load_adapter
from lora_core.lora.weights import LayerWeights
from lora_core.model_files.header import read_header
from lora_core.system.files import DEMO_BASE, DEMO_TRAIN
from lora_core.tools.delta import BaseWeights
from lora_core.tools.svd import file_spectrum
from tests.report.test_report import made_run
from tests.tools.planted import (
    LAYERS,
    TINY,
    TO_K,
    TO_Q,
    dense,
    layer_of,
    orthonormal,
    random_layer,
    saved,
    shape_of,
)
from tests.worker.test_protocol import Worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    try:
        assert worker.answer()["event"] == "ready"
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout, worker.process.stderr):
            assert pipe is not None
            pipe.close()


def hidden(rank: int, in_rank: int, seed: int, key: Any = TO_K) -> LayerWeights:
    """A layer of a known rank in factors of a higher one, rotated."""
    draw = torch.Generator().manual_seed(seed)
    out, inner = shape_of(key)[0], torch.Size(shape_of(key)[1:]).numel()
    mix = torch.randn(in_rank, rank, generator=draw, dtype=torch.float64)
    up = orthonormal(out, rank, draw) @ torch.linalg.pinv(mix)
    return layer_of(up, mix @ orthonormal(inner, rank, draw).T, key, float(in_rank))


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """All layers of rank 3, in factors of rank 16."""
    layers = {key: hidden(3, 16, seed, key) for seed, key in enumerate(LAYERS)}
    return saved(layers, tmp_path / "größe 木.safetensors")


def done(worker: Worker, **request: Any) -> dict[str, Any]:
    """The last answer to a request, which succeeds; what comes before it is progress with its words."""
    answers = worker.answers({"id": "a", **request})
    assert answers[-1]["event"] == "done", answers[-1]
    assert all(one["event"] == "progress" and one["phase"] for one in answers[:-1])
    return answers[-1]


def test_a_planted_rank_is_found_in_every_layer(worker: Worker, planted: Path) -> None:
    answer = done(worker, do="spectrum", file=str(planted))
    assert {row["numeric_rank"] for row in answer["spectrum"]["layers"]} == {3}
    assert {row["rank"] for row in answer["spectrum"]["layers"]} == {16}
    assert len(answer["spectrum"]["layers"]) == len(LAYERS)
    assert answer["report"]["family"] == "tiny"


def test_a_file_is_like_itself_and_another_is_not(worker: Worker, planted: Path, tmp_path: Path) -> None:
    same = done(worker, do="compare", files=[str(planted), str(planted)])["compare"]
    assert same["similarity"] == 1.0
    other = saved({k: hidden(3, 16, 90 + n, k) for n, k in enumerate(LAYERS)}, tmp_path / "b.safetensors")
    found = done(worker, do="compare", files=[str(planted), {"file": str(other)}])["compare"]
    assert found["similarity"] < 4 * found["baseline"]
    assert worker.error({"id": "x", "do": "compare", "files": [str(planted)]}).startswith("Two files")


def test_shrinking_to_the_planted_rank_loses_nothing(worker: Worker, planted: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    made = done(worker, do="shrink", file=str(planted), out=str(out), rank=3)
    assert made["file"] == str(out)
    assert made["bytes"] == out.stat().st_size < planted.stat().st_size / 3
    assert "Nothing is lost but rounding." in made["sentences"]
    before, after = load_adapter(planted, TINY).layers, load_adapter(out, TINY).layers
    for key in before:
        assert torch.allclose(dense(after[key]), dense(before[key]), atol=1e-5)
    assert "already exists" in worker.error(
        {"id": "x", "do": "shrink", "file": str(planted), "out": str(out), "rank": 3}
    )
    cut = tmp_path / "cut.safetensors"
    ranks = [{"part": part, "module": module, "rank": 2} for part, module in LAYERS]
    done(worker, do="shrink", file=str(planted), out=str(cut), ranks=ranks)
    assert {row["numeric_rank"] for row in file_spectrum(cut)["layers"]} == {2}
    again = {"id": "x", "do": "shrink", "file": str(planted), "out": str(cut), "ranks": ranks}
    assert "already exists" in worker.error(again)


def test_a_strength_is_baked_in(worker: Worker, planted: Path, tmp_path: Path) -> None:
    out = tmp_path / "baked.safetensors"
    done(worker, do="bake", file=str(planted), out=str(out), strengths=[0.5])
    before, after = load_adapter(planted, TINY).layers[TO_K], load_adapter(out, TINY).layers[TO_K]
    assert torch.allclose(dense(after), dense(before, 0.5), atol=1e-7)


def test_merging_adds_and_takes_away(worker: Worker, planted: Path, tmp_path: Path) -> None:
    other = saved({TO_K: random_layer(TO_K, 2, 2.0, 5)}, tmp_path / "b.safetensors")
    both, back = tmp_path / "both.safetensors", tmp_path / "back.safetensors"
    done(worker, do="merge", files=[str(planted), {"file": str(other), "strength": 0.7}], out=str(both))
    a, b = load_adapter(planted, TINY).layers[TO_K], load_adapter(other, TINY).layers[TO_K]
    wanted = dense(a) + dense(b, 0.7)
    assert torch.allclose(dense(load_adapter(both, TINY).layers[TO_K]), wanted, atol=1e-5)
    files = [str(both), {"file": str(other), "strength": -0.7}]
    done(worker, do="merge", files=files, out=str(back))
    assert torch.allclose(dense(load_adapter(back, TINY).layers[TO_K]), dense(a), atol=1e-5)


def test_blocks_are_weighed_and_a_copy_of_the_base_is_written(
    worker: Worker, planted: Path, tmp_path: Path
) -> None:
    """What the command line's `merge --blocks` and `--into-base` do."""
    layers, out = load_adapter(planted, TINY).layers, tmp_path / "out.safetensors"
    weighed = next(key for key in layers if key != TO_K)
    blocks = f"{weighed[1].replace('.', '[.]')}=0.5"
    done(worker, do="merge", files=[str(planted)], out=str(out), blocks=blocks)
    after = load_adapter(out, TINY).layers
    assert torch.allclose(dense(after[weighed]), dense(layers[weighed], 0.5), atol=1e-5)
    folder = tmp_path / "base"
    made = done(worker, do="into-base", files=[str(planted)], base="demo", out=str(folder), blocks=blocks)
    assert made["bytes"] > 1e6
    bare, changed = BaseWeights("demo"), BaseWeights(str(folder))
    for key, strength in ((weighed, 0.5), (TO_K, 1.0)):
        wanted = dense(layers[key], strength)
        got = (changed.weight(key) - bare.weight(key)).reshape(wanted.shape)
        # The embedded base is stored in half precision.
        assert float((got - wanted).norm() / wanted.norm()) < 0.05


def test_a_dora_becomes_a_plain_lora_with_its_base(worker: Worker, planted: Path, tmp_path: Path) -> None:
    tensors = load_file(planted)
    ups = {key: tensor for key, tensor in tensors.items() if key.endswith(".lora_up.weight")}
    for key, up in ups.items():
        magnitude = torch.full((up.shape[0], *(1,) * (up.dim() - 1)), 0.25)
        tensors[key.replace("lora_up.weight", "dora_scale")] = magnitude
    dora, out = tmp_path / "dora.safetensors", tmp_path / "plain.safetensors"
    save_file(tensors, dora, read_header(planted).metadata)
    request = {"do": "merge", "files": [str(dora)], "rank": 4, "out": str(out)}
    refused = worker.answers({"id": "a", **request})[-1]
    assert "whose update depends on the weights of its base" in refused["message"]
    said = done(worker, **request, base="demo")["sentences"]
    assert any(sentence.startswith("dora.safetensors as a plain LoRA:") for sentence in said)
    assert {layer.rank for layer in load_adapter(out, TINY).layers.values()} == {4}


def test_another_format_and_back(worker: Worker, planted: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    said = done(worker, do="convert", file=str(planted), out=str(there), format="diffusers")["sentences"]
    assert said[0].startswith("Only diffusers reads this format")
    done(worker, do="convert", file=str(there), out=str(back), format="kohya", keep_alphas=True)
    before, after = load_adapter(planted, TINY).layers[TO_K], load_adapter(back, TINY).layers[TO_K]
    assert torch.allclose(dense(after), dense(before), atol=1e-6)


def test_amplification_and_stacking(worker: Worker, planted: Path, tmp_path: Path) -> None:
    found = done(worker, do="amplify", file=str(planted), base="demo")["amplify"]
    assert {row["rank"] for row in found["layers"]} == {3}
    other = saved({TO_Q: random_layer(TO_Q, 2, 2.0, 5)}, tmp_path / "b.safetensors")
    stack = done(worker, do="stack", files=[str(planted), {"file": str(other), "strength": 0.5}])["stack"]
    assert [row["strength"] for row in stack["files"]] == [1.0, 0.5]
    assert "validation" not in stack


def test_a_model_s_change_is_extracted(worker: Worker, tmp_path: Path) -> None:
    from lora_core.generate.request import WeightedLora
    from lora_core.tools.merge import merge_files_into_base

    lora = saved({TO_K: random_layer(TO_K, 2, 2.0, 7, 0.1)}, tmp_path / "a.safetensors")
    tuned = tmp_path / "tuned"
    merge_files_into_base([WeightedLora(str(lora))], "demo", tuned)
    out = tmp_path / "out.safetensors"
    made = done(worker, do="extract", tuned=str(tuned), base=str(DEMO_BASE), out=str(out), energy=0.9999)
    assert "1 layer of rank 2." in made["sentences"]
    found = load_adapter(out, TINY).layers[TO_K]
    wanted = dense(load_adapter(lora, TINY).layers[TO_K])
    assert float((dense(found) - wanted).norm() / wanted.norm()) < 0.02


@pytest.fixture(scope="module")
def two_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for name in ("cactus", "koala"):
        for suffix in (".png", ".txt"):
            shutil.copy(DEMO_TRAIN.parent / "held_out" / f"{name}{suffix}", folder)
    return folder


def test_measuring_on_a_folder(worker: Worker, tmp_path: Path, two_pictures: Path) -> None:
    """Noise that is louder than the base gains nothing, so that there is no gain whose rank could be told."""
    layers = {key: random_layer(key, 4, 4.0, seed, 20.0) for seed, key in enumerate(LAYERS)}
    file = saved(layers, tmp_path / "noise.safetensors")
    measure = {"dataset": str(two_pictures), "base": "demo"}
    found = done(worker, do="strength", file=str(file), measure=measure)
    assert found["pictures"] == 2
    (fit,) = found["strength"]["fits"]
    assert fit["curve"][0] == {"strength": 0.0, "gain": 0.0, "standard_error": 0.0}
    assert found["strength"]["strengths"] == [fit["strength"]]
    assert fit["gain"] == max(row["gain"] for row in fit["curve"])
    said = worker.error({"id": "x", "do": "intrinsic", "file": str(file), "measure": measure})
    assert "gains nothing on these images" in said


def test_a_measurement_ends_when_its_sender_wants_no_more(
    worker: Worker, planted: Path, two_pictures: Path
) -> None:
    measure = {"dataset": str(two_pictures), "base": "demo"}
    worker.send({"id": "long", "do": "strength", "file": str(planted), "measure": measure})
    assert worker.answer()["event"] == "progress"
    worker.send({"id": "", "do": "cancel", "target": "long"})
    answers = worker.rest("long")
    assert answers[-1]["message"] == "Cancelled."
    assert not any("measurement 3" in str(one.get("phase")) for one in answers)


def test_a_report_by_the_worker(worker: Worker, tmp_path: Path) -> None:
    run = made_run(tmp_path / "runs" / "mine")
    made = done(worker, do="report", run=str(run.path))
    assert made == {**made, "file": str(run.path / "report.html")}
    assert made["bytes"] == (run.path / "report.html").stat().st_size
    assert "is not a run" in worker.error({"id": "x", "do": "report", "run": str(tmp_path)})


@pytest.mark.parametrize("do", ["spectrum", "amplify", "strength", "intrinsic", "shrink", "bake"])
def test_a_file_that_is_none_is_a_sentence(
    worker: Worker, tmp_path: Path, two_pictures: Path, do: str
) -> None:
    broken = tmp_path / "a.safetensors"
    broken.write_bytes(b"<html>")
    more = {
        "base": "demo", "measure": {"dataset": str(two_pictures), "base": "demo"}, "rank": 2,
        "strengths": [0.5], "out": str(tmp_path / "out.safetensors"),
    }  # fmt: skip
    said = worker.error({"id": "x", "do": do, "file": str(broken), **more})
    assert "a.safetensors" in said
    assert "defect" not in said
    assert not (tmp_path / "out.safetensors").exists()
