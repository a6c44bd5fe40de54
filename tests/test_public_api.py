"""The names that others may rely on, and the example that shows them."""

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_core import api
from lora_core.model_files.families import FAMILIES
from lora_core.verbs import VERBS, plain_request

ROOT = Path(__file__).resolve().parents[1]
PARTS = """
    AdapterWeights Axis GenerationRequest LayerWeights LoadedLora LoraError Measure Merger RunConfig
    RunFolder WeightedLora adapter_weights generate_image inject inspect_file left_out load_base
    load_adapter merge_into_base put_tokens run_config save_adapter settings_from_lora shrink_intrinsic
    validation_report write_adapter
"""


def test_a_name_is_added_or_taken_away_on_purpose() -> None:
    functions = [words.replace(" ", "_").replace("-", "_") for words in VERBS]
    assert sorted(api.__all__) == sorted([*PARTS.split(), *functions])


@pytest.mark.parametrize("words", VERBS)
def test_every_verb_is_a_function_with_plain_arguments(words: str) -> None:
    function = getattr(api, words.replace(" ", "_").replace("-", "_"))
    assert inspect.isfunction(function)
    assert function is VERBS[words]
    assert "return" in inspect.get_annotations(function)


def test_no_function_of_the_api_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [Path(str(api.__file__)), *(ROOT / "lora_core" / "verbs").glob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    calls = [node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {node.id for node in calls if isinstance(node, ast.Name)}
    assert not names & {"print", "say", "write", "say_json"}


def test_importing_the_api_imports_no_torch() -> None:
    code = "import sys, lora_core.api, lora_core.verbs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", api.__all__)
def test_every_name_explains_itself(name: str) -> None:
    thing = getattr(api, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        missing = [p for p in inspect.signature(thing).parameters if p not in inspect.get_annotations(thing)]
        assert missing == []


def test_the_example_of_the_docstring_runs(tmp_path: Path) -> None:
    key = ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
    layer = api.LayerWeights(torch.ones(2, 128), torch.ones(96, 2), 2.0)
    file, out = tmp_path / "a.safetensors", tmp_path / "a.png"
    api.write_adapter(api.AdapterWeights({key: layer}), file, "kohya", "fp16", FAMILIES["tiny"], {})
    assert api.settings_from_lora(str(file)).values["adapter.rank"] == 2
    names = {**vars(api), "torch": torch, "file": str(file), "out": str(out)}
    names |= {name: getattr(api, name) for name in api.__all__} | {"merged": tmp_path / "merged.safetensors"}
    example = doctest.DocTestParser().get_doctest(api.__doc__ or "", names, "api", None, 0)
    assert len(example.examples) == 8
    failed, _ = doctest.DocTestRunner(verbose=False).run(example)
    assert failed == 0
    with Image.open(out) as image:
        assert image.size == (128, 128)


def test_a_layer_for_another_base_is_a_problem_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(api.LoraError, match="does not exist"):
        api.load_adapter(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    "name",
    ["LoraAt", "Picture", "Shot", "Strengthened", "generated_from_prompt", "read_adapter", "validation",
     "write_adapter"],
)  # fmt: skip
def test_a_former_name_can_be_imported(name: str) -> None:
    assert callable(getattr(api, name))


def test_files_are_texts_or_paths_and_one_may_stand_for_a_list(tmp_path: Path) -> None:
    file, base = tmp_path / "a.safetensors", ROOT / "assets" / "base"
    one = api.WeightedLora(str(file))
    for loras in (str(file), file, one, [str(file)], (file,)):
        assert plain_request(api.GenerationRequest(loras=loras)).loras == (one,)
        with pytest.raises(api.LoraError, match=r"a\.safetensors does not exist"):
            api.merge(loras, tmp_path / "b.safetensors")
    for loras in ((str(file), 0.5), 3):
        with pytest.raises(api.LoraError, match="is not a LoRA; give a file or WeightedLora"):
            api.generate(api.GenerationRequest(loras=loras))
    request = plain_request(api.GenerationRequest(base=base, image=file))
    assert (request.base, request.image) == (str(base), str(file))
    assert api.run_config("demo", "a", {"model.base": base}).model.base == str(base)
    assert api.load_base(base, "cpu", torch.float32).family is FAMILIES["tiny"]
    assert api.concepts_list(ROOT / "assets" / "demo" / "train", base, workspace=tmp_path)
    (tmp_path / "set").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "set" / "dog.png")
    assert api.RunFolder(str(tmp_path)).events_file == tmp_path / "events.jsonl"
    with pytest.raises(api.LoraError, match=r"no image named 'cat\.png'"):
        api.leave_out(tmp_path / "set", "cat.png", tmp_path)
    with pytest.raises(api.LoraError, match="cannot vary 'size'"):
        api.grid(api.GenerationRequest(loras=file), tmp_path / "a.png", api.Axis("size", ("1",)))
