"""Pictures as data: what a row or a column of a grid changes."""

import pytest

from lora_core.errors import ConfigError
from lora_core.generate.grid import Axis, grid_requests, grid_settings, make_axis, parse_axis, vary
from lora_core.generate.request import GenerationRequest, WeightedLora

ONE = GenerationRequest(prompt="owl", seed=3, loras=(WeightedLora("a.safetensors", 0.8),))
TWO = GenerationRequest(loras=(WeightedLora("a.safetensors", 0.8), WeightedLora("b.safetensors", 0.5, 0.2)))


@pytest.mark.parametrize(
    ("text", "kind", "values"),
    [
        ("strength=0,0.5, 1", "strength", (0.0, 0.5, 1.0)),
        ("seed=1,2", "seed", (1, 2)),
        ('prompt="an owl, sitting",a dog', "prompt", ("an owl, sitting", "a dog")),
        ('prompt="he said ""hello"""', "prompt", ('he said "hello"',)),
        ("rank=1,16", "rank", (1, 16)),
        ("checkpoint=/x/a=b.safetensors", "checkpoint", ("/x/a=b.safetensors",)),
    ],
)
def test_an_axis_is_read(text: str, kind: str, values: tuple[object, ...]) -> None:
    assert parse_axis(text) == Axis(kind, values)
    assert parse_axis(parse_axis(text).text()).values == (values if kind != "checkpoint" else ("a=b",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour=1", "'colour'"),
        ("strength", "needs values"),
        ("strength=", "strength=0,0.5,1"),
        ("strength=much", "'much' of a grid is not a number"),
        ("strength=nan", "out of range"),
        ("strength=1e9", "out of range"),
        ("rank=0", "it must be between 1"),
        ("rank=1.5", "not a number"),
        ("seed=-1", "it must be between 0"),
    ],
)
def test_a_wrong_axis_is_a_sentence(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"\.$") as found:
        parse_axis(text)
    assert words in str(found.value)


def test_the_strength_of_one_adapter_is_its_own_and_of_several_a_factor() -> None:
    assert vary(ONE, "strength", 0.5).loras == (WeightedLora("a.safetensors", 0.5),)
    assert vary(TWO, "strength", 0.5).loras == (
        WeightedLora("a.safetensors", 0.4),
        WeightedLora("b.safetensors", 0.25, 0.1),
    )
    apart = GenerationRequest(loras=(WeightedLora("a", 0.8, 0.4),))
    assert vary(apart, "strength", 0.8) is apart
    # Half as strong on the text encoders stays half as strong.
    assert vary(apart, "strength", 1.0).loras[0].text_strength == pytest.approx(0.5)


def test_what_does_not_act_is_no_part_of_a_picture() -> None:
    assert vary(ONE, "strength", 0.0).acting() == ONE.alone() == vary(ONE, "strength", 0.0).acting().acting()
    assert GenerationRequest(loras=(WeightedLora("a", 0.0, 0.5),)).acting().loras
    assert GenerationRequest(loras=(WeightedLora("a", 0.5, 0.5),)).acting() == GenerationRequest(
        loras=(WeightedLora("a", 0.5),)
    )


def test_cells_change_one_thing_each() -> None:
    cells = grid_requests(ONE, parse_axis("seed=1,2"), parse_axis("strength=0,1"))
    found = [[(cell.seed, cell.loras[0].strength) for cell in row] for row in cells]
    assert found == [[(1, 0.0), (1, 1.0)], [(2, 0.0), (2, 1.0)]]
    assert {cell.prompt for row in cells for cell in row} == {"owl"}
    # Whichever way round, the strength is that of the checkpoint in the cell.
    by_file = grid_requests(ONE, parse_axis("strength=0.5"), parse_axis("checkpoint=c,d"))[0]
    assert [cell.loras for cell in by_file] == [(WeightedLora("c", 0.5),), (WeightedLora("d", 0.5),)]
    assert grid_requests(GenerationRequest(), None, parse_axis("checkpoint=c"))[0][0].loras == (
        WeightedLora("c"),
    )
    ranks = grid_requests(TWO, None, parse_axis("rank=4"))[0][0]
    assert [lora.rank for lora in ranks.loras] == [4, 4]


def test_what_makes_no_grid_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="both vary the seed"):
        grid_requests(ONE, parse_axis("seed=1"), parse_axis("seed=2"))
    with pytest.raises(ConfigError, match="needs a LoRA"):
        grid_requests(GenerationRequest(), None, parse_axis("rank=4"))
    many = make_axis("seed", list(range(30)))
    with pytest.raises(ConfigError, match="900 images"):
        grid_requests(ONE, many, make_axis("prompt", [str(n) for n in range(30)]))


def test_labels_and_settings_name_files_without_their_folders() -> None:
    files = parse_axis(
        "checkpoint=/home/me/x.safetensors,/home/me/runs/owl/checkpoints/step-000100/adapter.safetensors"
    )
    assert files.labels() == ["x", "owl step-000100"]
    assert WeightedLora("/a/b/adapter.safetensors").name == "adapter"
    said = grid_settings(files, parse_axis("strength=0,0.5"))
    assert said == {"Script": "Grid", "Rows": "checkpoint=x,owl step-000100", "Columns": "strength=0,0.5"}
    assert parse_axis("strength=0,0.5").labels() == ["strength 0", "strength 0.5"]
    assert parse_axis("seed=7").labels() == ["seed 7"]


def test_a_request_is_read_from_json() -> None:
    rows = ["a.safetensors", {"file": "b.safetensors", "strength": "0.5", "text_strength": None}]
    found = GenerationRequest.from_json({"do": "generate", "seed": "3", "cfg_rescale": "0,7", "loras": rows})
    assert (found.seed, found.cfg_rescale) == (3, 0.7)
    assert found.loras == (WeightedLora("a.safetensors"), WeightedLora("b.safetensors", 0.5))
    for wrong, words in (
        ({"loras": "a.safetensors"}, "loras = 'a.safetensors'"),
        ({"loras": [{"file": "a", "strength": "nan"}]}, "finite"),
        ({"cfg_rescale": None}, "should be a number or auto"),
        ({"steps": 0}, "steps = 0 is out of range"),
        ({"seed": 1.5}, "seed = '1.5'"),
    ):
        with pytest.raises(ConfigError, match=r"\.$") as error:
            GenerationRequest.from_json(wrong)
        assert words in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_gets_both_limits(seed):
    """2^63 - 1 is the largest that a generator of torch takes."""
    with pytest.raises(ConfigError, match=r"between 0 and 9,223,372,036,854,775,807\."):
        GenerationRequest(prompt="x", seed=seed).check()
    GenerationRequest(prompt="x", seed=2**63 - 1).check()
