"""The names that others may rely on, and the example that shows them."""

import doctest
import inspect
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_core import api
from lora_core.spec.families import FAMILIES

PROMISED = """
    AdapterWeights LayerWeights LoraError Merger Picture RunConfig RunFolder Strengthened adapter_weights
    generated_from_prompt inject inspect_file load_base read_adapter train validation write_adapter
"""


def test_a_name_is_added_or_taken_away_on_purpose() -> None:
    assert api.__all__ == sorted(PROMISED.split())


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
    names = {**vars(api), "torch": torch, "file": file, "out": out}
    example = doctest.DocTestParser().get_doctest(api.__doc__ or "", names, "api", None, 0)
    assert len(example.examples) == 5
    failed, _ = doctest.DocTestRunner(verbose=False).run(example)
    assert failed == 0
    with Image.open(out) as image:
        assert image.size == (128, 128)


def test_a_layer_for_another_base_is_a_problem_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(api.LoraError, match="does not exist"):
        api.read_adapter(tmp_path / "nothing.safetensors")
