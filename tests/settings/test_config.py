"""Settings: what is legal, what is refused and in which words, and that writing and reading gives the
same."""

import os
import time
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from lora_core.errors import LONGEST_SENTENCE, ConfigError
from lora_core.settings.config import (
    FIELDS,
    RunConfig,
    arguments_of_lines,
    checked_value,
    flattened,
    help_of,
    label_of,
    load_toml,
    parse_sample,
    parsed_assignment,
    pattern_lines,
    patterns_of_lines,
    read_prompts,
    sample_fields,
    to_toml,
)
from lora_core.settings.schema import SampleSection


def refusal(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig().changed({name.replace("__", "."): value for name, value in changes.items()})
    return str(caught.value)


def test_a_misspelt_setting_is_answered_with_the_right_one() -> None:
    assert refusal(adapter__rnak=8) == "adapter.rnak is not a setting; did you mean adapter.rank?"


def test_a_setting_like_no_other_is_answered_with_the_sections() -> None:
    assert "The sections are model, adapter, dataset" in refusal(xyzzy=1)


def test_a_value_of_an_unknown_setting_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rnak is not a setting; did you mean adapter\.rank\?"):
        checked_value("adapter.rnak", 8)


def test_all_problems_are_told_at_once() -> None:
    told = refusal(adapter__rank=0, optimizer__nmae="adamw", train__steps="many", loss__type="square")
    for part in ("adapter.rank = 0", "optimizer.name?", "train.steps = 'many'", "loss.type = 'square'"):
        assert part in told


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("adapter.rank", 0, "it must be between 1 and 1,024"),
        ("adapter.rank", 1025, "it must be between 1 and 1,024"),
        ("adapter.rank", 8.5, "should be an integer"),
        ("adapter.rank", True, "should be an integer"),
        ("adapter.rank", "8", "should be an integer"),
        ("adapter.alpha", 0, "must be above 0"),
        ("adapter.alpha", float("inf"), "is not a number that can be used"),
        ("adapter.dropout", 1.0, "it must be between 0 and 0.99"),
        ("train.steps", float("inf"), "is not a number that can be used"),
        ("train.steps", float("nan"), "is not a number that can be used"),
        ("optimizer.lr", float("nan"), "is not a number that can be used"),
        ("dataset.flip", 1, "should be true or false"),
        ("model.base", 15, "should be a text"),
        ("sample.prompts", "a tree", "should be a list of texts"),
        ("sample.prompts", ["a tree", 3], "should be a list of texts"),
        ("optimizer.name", "adamx", "choose one of adamw"),
        ("train.max_token_length", 100, "choose one of 75, 150, 225"),
        ("train.max_token_length", 0, "choose one of 75, 150, 225"),
        ("adapter.block_ranks", 4, "should be a table of patterns"),
        ("adapter.block_ranks", "{mid_block = 4}", "should be a table of patterns"),
        ("adapter.block_ranks", {"mid_block": 1025}, "'mid_block' = 1025 is out of range"),
        ("adapter.block_ranks", {"mid_block": -1}, "'mid_block' = -1 is out of range"),
        ("adapter.block_ranks", {"mid_block": 2.5}, "'mid_block' = 2.5 should be an integer"),
        ("adapter.block_ranks", {"mid_block": True}, "should be an integer"),
        ("adapter.block_ranks", {"unet": {"mid_block": 4}}, "begins with 'unet'; put it into quotes"),
        ("adapter.block_ranks", {"(mid": 4}, "'(mid', which cannot be used"),
        ("adapter.block_ranks", {"(?!a)b": 4}, "without look-around"),
        (
            "optimizer.block_lr",
            {f"a{n}": 0.0 for n in range(101)},
            "has 101 patterns; at most 100 can be used",
        ),
        ("adapter.block_alphas", {"mid_block": 0}, "'mid_block' = 0 is out of range; it must be above 0"),
        ("optimizer.block_lr", {"mid_block": float("nan")}, "is not a number that can be used"),
        ("optimizer.block_lr", {"*": 1e-4}, "'*', which cannot be used"),
        ("adapter", {"rank": 8}, "is not a setting"),
        ("loss.min_snr", "off", "should be a number or auto"),
        ("loss.min_snr", -1, "it must be between 0 and 100"),
        ("loss.min_snr", True, "should be a number"),
        ("loss.huber_delta", 0, "it must be between 0.001 and 10"),
        ("adapter.kind", "boft", "'boft' is not known; choose one of lora, dora, loha, lokr, oft"),
        ("adapter.kind", 3, "should be a text"),
        ("dataset.repeats", 10, "10 cannot be used: it changes nothing that is learned"),
        ("dataset.repeats", 0, "train.steps"),
        ("dataset.repeats", True, "10_name"),
    ],
)
def test_what_is_refused(name: str, value: object, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig().changed({name: value})
    assert part in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("adapter.rank", 8.0, 8),
        ("optimizer.lr", 1, 1.0),
        ("optimizer.name", "AdamW", "adamw"),
        ("sample.sampler", " DPM++ 2M Karras ", "dpmpp_2m_karras"),
        ("sample.prompts", [], []),
        ("train.max_token_length", 150.0, 150),
        ("adapter.block_ranks", {}, {}),
        ("adapter.block_ranks", {"mid_block": 4.0, r"attn1\.to_q$": 0}, {"mid_block": 4, r"attn1\.to_q$": 0}),
        ("optimizer.block_lr", {"mid_block": 0}, {"mid_block": 0.0}),
        ("seed", 2**32 - 1, 2**32 - 1),
        ("loss.min_snr", 5, 5.0),
        ("loss.min_snr", " Auto ", "auto"),
    ],
)
def test_what_is_taken(name: str, value: object, kept: object) -> None:
    got = RunConfig().changed({name: value}).get(name)
    assert got == kept
    assert type(got) is type(kept)


@pytest.mark.parametrize(("name", "value"), [("dataset.repeats", 1)])
def test_a_retired_setting_is_taken_where_it_means_what_is_done(name: str, value: object) -> None:
    assert RunConfig().changed({name: value}) == RunConfig()
    assert name not in flattened(tomllib.loads(to_toml(RunConfig())))
    assert RunConfig().changed({"adapter.kind": " LoRA "}) == RunConfig(), "the one value that it had once"


def test_an_older_file_is_read_without_what_is_no_more() -> None:
    values = {"adapter": {"kind": "lora", "rank": 4}, "dataset": {"repeats": 10}, "loss": {"min_snr": 5.0}}
    config = RunConfig.from_dict(values)
    assert config == RunConfig().changed({"adapter.rank": 4, "loss.min_snr": 5.0})
    assert config.loss.gamma("v_prediction") == 5.0, "an older run keeps the number that it was made with"


def test_a_refused_change_changes_nothing() -> None:
    config = RunConfig()
    with pytest.raises(ConfigError):
        config.changed({"adapter.rank": 8, "adapter.alpha": -1})
    assert config == RunConfig()


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        RunConfig().seed = 1  # type: ignore[misc]


def test_lists_and_tables_are_not_shared_between_configs() -> None:
    RunConfig().sample.prompts.append("a tree")
    RunConfig().adapter.block_ranks["mid_block"] = 4
    assert RunConfig().sample.prompts == []
    assert RunConfig().adapter.block_ranks == {}


def test_toml_round_trip_is_complete() -> None:
    config = RunConfig().changed(
        {
            "name": 'ä "quoted" name',
            "adapter.alpha": 0.1,
            "sample.prompts": ["a tree\nby night", "\u2028"],
            "adapter.block_ranks": {r"unet\.mid_block": 4, "b": 2, "a": 0, "'\"": 1},
            "optimizer.block_lr": {"mid_block": 1e-4},
        }
    )
    text = to_toml(config)
    assert RunConfig.from_dict(tomllib.loads(text)) == config
    assert set(flattened(tomllib.loads(text))) == set(FIELDS)
    # Of several patterns the last counts, so their order is part of the setting.
    assert list(RunConfig.from_dict(tomllib.loads(text)).adapter.block_ranks) == [
        r"unet\.mid_block",
        "b",
        "a",
        "'\"",
    ]


def test_a_table_of_a_toml_file_stays_whole() -> None:
    text = (
        "[adapter]\nrank = 8\n[adapter.block_ranks]\n'unet\\.mid_block' = 4\nmid = 2\n[optim]\nblock_lr = {up"
        " = 1e-4}"
    )
    assert flattened(tomllib.loads(text)) == {
        "adapter.rank": 8,
        "adapter.block_ranks": {r"unet\.mid_block": 4, "mid": 2},
        "optimizer.block_lr": {"up": 1e-4},
    }


def test_a_table_as_lines() -> None:
    table = {r"unet\.mid_block": 4, "a=b": 0.00005}
    assert patterns_of_lines("x", pattern_lines(table)) == table
    assert patterns_of_lines("x", ' "mid_block" = 0,5 \n\n') == {"mid_block": 0.5}
    for line in ("mid_block", "mid_block = many", "mid_block ="):
        with pytest.raises(ConfigError, match=r"x has the line 'mid_block.*pattern = number"):
            patterns_of_lines("x", line)


def test_arguments_as_lines() -> None:
    table = {"betas": [0.9, 0.99], "weight_decay": 0.1, "amsgrad": True, "mode": "x"}
    assert arguments_of_lines("x", pattern_lines(table)) == table
    with pytest.raises(ConfigError, match=r"x has the line 'betas 0\.9'.*argument = value"):
        arguments_of_lines("x", "betas 0.9")
    for value in (5, {"a b": 1}, {"a": [[1]]}, {"a": float("nan")}, {"a": {"b": 1}}, {"a": "\udc80"}):
        with pytest.raises(ConfigError, match=r"optimizer\.args "):
            RunConfig().changed({"optimizer.args": value})


def test_another_optimizer_brings_its_usual_rate() -> None:
    """Unless a rate is given with it; a rate ten times the usual one stays ten times the usual one."""

    def rates(config: RunConfig) -> tuple[float, float]:
        return config.optimizer.lr, config.optimizer.text_encoder_lr

    usual = RunConfig()
    assert rates(usual.changed({"optimizer.name": "lion"})) == (3e-5, 1.5e-5)
    assert rates(usual.changed({"optimizer.name": "Prodigy"})) == (1.0, 1.0)
    assert rates(usual.changed({"optimizer.name": "adamw"})) == rates(usual)
    hot = usual.changed({"optimizer.lr": 1e-3, "optimizer.text_encoder_lr": 0.0})
    assert rates(hot.changed({"optimizer.name": "came"})) == (3e-4, 0.0)
    assert rates(hot.changed({"optimizer.name": "prodigy"})) == (1.0, 0.0)
    # The demo's 3e-3 is the most that is usual with AdamW, and so is 6e-4 with Lion.
    demo = usual.changed({"optimizer.lr": 3e-3}).changed({"optimizer.name": "lion"})
    assert demo.optimizer.lr == 6e-4
    assert rates(hot.changed({"optimizer.name": "lion", "optimizer.lr": 5e-5})) == (5e-5, 0.0)
    assert rates(usual.changed({"optimizer.name": "torch.optim:Adamax"})) == rates(usual)
    free = usual.changed({"optimizer.name": "adamw_schedule_free"})
    assert (free.optimizer.lr, free.optimizer.schedule) == (2.5e-4, "constant")
    # A complete file, as a run folder has it, is taken as it is.
    odd = usual.changed({"optimizer.name": "lion", "optimizer.lr": 1e-4})
    assert RunConfig.from_dict(odd.to_dict()) == odd


@pytest.mark.parametrize(("rank", "rslora", "scale"), [(16, False, 0.5), (16, True, 2.0), (4, True, 4.0)])
def test_the_scale_of_the_update(rank: int, rslora: bool, scale: float) -> None:
    config = RunConfig().changed({"adapter.rank": rank, "adapter.alpha": 8, "adapter.rslora": rslora})
    assert config.adapter.scale == scale


def test_every_default_is_legal() -> None:
    assert RunConfig.from_dict(RunConfig().to_dict()) == RunConfig()


def test_every_setting_explains_itself() -> None:
    for name in FIELDS:
        assert label_of(name), name
        assert help_of(name).endswith("."), name


def test_get_refuses_what_is_no_setting() -> None:
    with pytest.raises(ConfigError, match=r"did you mean adapter\.rank"):
        RunConfig().get("adapter.ranks")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("adapter.rank=8", "adapter.rank", 8),
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("dataset.flip=true", "dataset.flip", True),
        ("dataset.trigger=sks dog", "dataset.trigger", "sks dog"),
        ('dataset.trigger="sks dog"', "dataset.trigger", "sks dog"),
        ("dataset.trigger=1999", "dataset.trigger", "1999"),
        ("dataset.trigger=true", "dataset.trigger", "true"),
        ("dataset.trigger=", "dataset.trigger", ""),
        ("model.base=C:\\models\\a=b", "model.base", "C:\\models\\a=b"),
        ('sample.prompts=["a tree", "a house"]', "sample.prompts", ["a tree", "a house"]),
        (" adapter.rank = 8", "adapter.rank", 8),
        ("adapter.rank=eight", "adapter.rank", "eight"),
        ('adapter.block_ranks={"mid_block"=4}', "adapter.block_ranks", {"mid_block": 4}),
        (r"optimizer.block_lr={'unet\.mid'=1e-4, b=0}", "optimizer.block_lr", {r"unet\.mid": 1e-4, "b": 0}),
        ("adapter.init=my lora.safetensors", "adapter.init", "my lora.safetensors"),
    ],
)
def test_assignments_of_the_command_line(text: str, name: str, value: object) -> None:
    assert parsed_assignment(text) == (name, value)


def test_an_assignment_needs_its_sign() -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        parsed_assignment("adapter.rank 8")


def test_a_file_of_windows_notepad_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 7\r\n")
    assert load_toml(path) == {"seed": 7}


@pytest.mark.parametrize("content", [b"seed = ", b"seed = '\xff'", b"seed = 1\nseed = 2"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_toml(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml cannot be read"):
        load_toml(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    "toml",
    [
        "a." * 100_000 + "b = 1", "'é'." * 30 + "b = 1",
        "a = " + "[" * 5000 + "]" * 5000, "a = " + "[" * 50 + "]" * 50,
        "[" + ".".join("x" * 30) + "]\nb = 1", "seed = " + "9" * 5000, "seed = 0x" + "f" * 5000,
        f"seed = {2**64}", "[optim]\nlr = 1" + "0" * 400, "a = [1, [2, 0x" + "f" * 99 + "]]",
    ],
)  # fmt: skip
def test_hostile_toml_is_one_sentence(toml: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(toml)
    with pytest.raises(ConfigError, match=r"levels deep|too large") as caught:
        load_toml(file)
    assert len(str(caught.value)) < 300 + len(str(file))
    key, _, value = toml.rpartition("\n")[2].partition(" = ")
    with pytest.raises(ConfigError) as refused:
        RunConfig().changed(dict([parsed_assignment(f"{key}={value}")]))
    assert len(str(refused.value)) < 300


def test_dots_in_texts_and_comments_are_no_levels(tmp_path: Path) -> None:
    letters = ". ".join("abcdefghijklmnopqrstuvwxyz")
    file = tmp_path / "a.toml"
    file.write_text(
        f'# {letters} = 1\n[sample]\nprompts = ["[{letters}]", \'{letters} = 1\', """\n{letters}]""""]\n'
    )
    assert load_toml(file) == {"sample": {"prompts": [f"[{letters}]", f"{letters} = 1", f'{letters}]"']}}


@pytest.mark.parametrize("toml", ['a = "' + '\\"' * 100_000, "a." * 100_000, 'a = """' + '\\"' * 100_000])
def test_unclosed_toml_takes_no_time(toml: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(toml)
    begun = time.process_time()
    with pytest.raises(ConfigError, match=r"not valid TOML|levels deep"):
        load_toml(tmp_path / "a.toml")
    assert time.process_time() - begun < 2.0


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "large.toml").write_bytes(b"#" * 1_000_001)
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (Path("/dev/zero"), "regular file"), (tmp_path, "regular file"),
        (tmp_path / "pipe", "regular file"), (tmp_path / "large.toml", "larger than 1 MB"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            load_toml(path)


@pytest.mark.parametrize("text", ["=5", " = 5", "=", "a"])
def test_an_assignment_needs_a_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"should read section\.key=value"):
        parsed_assignment(text)


@pytest.mark.parametrize("name", ["dataset.trigger", "dataset.path", "model.base"])
def test_bytes_that_are_no_text_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        RunConfig().changed({name: "a\udcff"})


def test_thousands_of_unknown_settings_are_not_all_listed() -> None:
    with pytest.raises(ConfigError, match=r"And 19,990 more are not settings\.$") as refused:
        RunConfig.from_dict({"train": {f"unknown{number}": 1 for number in range(20_000)}})
    assert len(str(refused.value)) < 3000
    assert "train.unknown0 is not a setting" in str(refused.value)


def test_messages_clip_what_is_too_long() -> None:
    assert str(ConfigError(f"The base {'a' * 100_000}z is not there.")) == (
        f"The base {'a' * 200}…{'a' * 49}z is not there."
    )
    assert len(str(ConfigError("a b " * 100_000))) == LONGEST_SENTENCE


SAMPLED = SampleSection(negative_prompt="blurry", seed=3, steps=9, cfg=4.0, sampler="euler")


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("a cat", {"prompt": "a cat"}),
        ("a cat -- and a dog, e-mail", {"prompt": "a cat -- and a dog, e-mail"}),
        # As in kohya's documents.
        (
            "1girl, upper body --n low quality, bad anatomy --w 768 --h 1024 --d 1 --l 7.5 --s 28",
            {"prompt": "1girl, upper body", "negative": "low quality, bad anatomy",
             "width": 768, "height": 1024, "seed": 1, "cfg": 7.5, "steps": 28},
        ),
        ("a cat --N  a  b  --ss euler_a", {"prompt": "a cat", "negative": "a  b", "sampler": "euler_a"}),
        ("a cat --n", {"prompt": "a cat", "negative": ""}),
    ],
)  # fmt: skip
def test_a_sample_prompt_has_options_of_its_own(line: str, changes: dict[str, object]) -> None:
    usual = {
        "negative": "blurry", "width": 0, "height": 0, "seed": 3, "steps": 9, "cfg": 4.0,
        "cfg_rescale": "auto", "sampler": "euler",
    }  # fmt: skip
    assert parse_sample(SAMPLED, line) == sample_fields(SAMPLED, line) == usual | changes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--s many", "--s in the sample prompt 'a cat --s many' = 'many' should be an integer"),
        ("--s 201", "200"),
        ("--s 2.5", "integer"),
        ("--d -1", "0"),
        ("--l 0.5", "--l in the sample prompt"),
        ("--w 5000", "= 5000 is out of range; it must be between 0 and 4,096"),
        ("--h", "--h in the sample prompt"),
        ("--ss dpm", "dpmpp_2m"),
        ("--ar 16:9", "--ar in the sample prompt 'a cat --ar 16:9' is not known; there are --n, --w"),
    ],
)
def test_a_wrong_option_of_a_sample_prompt_is_a_sentence(options: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"\.$") as error:
        parse_sample(SAMPLED, f"a cat {options}")
    assert words in str(error.value)
    # A run of an earlier version, where all of it was text, goes on.
    assert sample_fields(SAMPLED, f"a cat {options}")["prompt"] == f"a cat {options}"


def test_a_file_of_kohyas_prompts_is_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# samples\n\na cat --s 5\n  a dog  \n", encoding="utf-8-sig")
    assert read_prompts(file) == ["a cat --s 5", "a dog"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_prompts(file)
    with pytest.raises(ConfigError, match="gone"):
        read_prompts(tmp_path / "gone.txt")
