"""What the command line makes of its words."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_core.api import VERBS
from lora_core.cli import main
from lora_core.cli.parser import parameters, parse, weighted_lora
from lora_core.cli.terminal import EventPrinter, _templates, printable, say, say_json
from lora_core.errors import AdapterFileError, ConfigError
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig


@pytest.mark.parametrize(
    ("file", "text", "meant"),
    [
        ("a.safetensors", "a.safetensors", (1.0, None)),
        ("a.safetensors", "a.safetensors:0.5", (0.5, None)),
        ("a.safetensors", "a.safetensors:-1", (-1.0, None)),
        ("a.safetensors", "a.safetensors:0", (0.0, None)),
        ("a.safetensors", "a.safetensors:0.5:0.25", (0.5, 0.25)),
        ("a.safetensors", "a.safetensors:1e-1:0", (0.1, 0.0)),
        # A file whose own name ends like a strength is that file.
        ("a.safetensors:0.5", "a.safetensors:0.5", (1.0, None)),
        ("a.safetensors:0.5", "a.safetensors:0.5:2", (2.0, None)),
        # A name with a colon in front, as of a drive.
        ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors", (1.0, None)),
        ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors:0.5", (0.5, None)),
        ("C:a b.safetensors", "C:a b.safetensors:0.5:1", (0.5, 1.0)),
        ("1:2", "1:2", (1.0, None)),
        ("1:2", "1:2:3", (3.0, None)),
    ],
)
def test_a_file_and_its_strengths(
    file: str, text: str, meant: tuple[float, float | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(file).write_bytes(b"")
    found = weighted_lora(text)
    assert (found.file, found.strength, found.text_strength) == (file, *meant)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("no.safetensors", "no.safetensors"),
        ("no.safetensors:0.5", "no.safetensors"),
        ("no.safetensors:0.5:1", "no.safetensors"),
        ("no.safetensors:strong", "no.safetensors:strong"),
        ("C:\\no.safetensors:0.5", "C:\\no.safetensors"),
        ("here.safetensors:1:2:3", "here.safetensors:1"),
    ],
)
def test_a_file_that_is_not_there_is_named_without_its_strength(
    text: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFileError) as error:
        weighted_lora(text)
    assert str(error.value) == f"The adapter {named} does not exist."


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "0.5:nan"])
def test_a_strength_must_be_finite(strength: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"")
    with pytest.raises(AdapterFileError, match="finite"):
        weighted_lora(f"{file}:{strength}")


def asked(*words: str) -> RunConfig:
    config = parse(["train", *words]).arguments()["training"].run_config(None)
    assert isinstance(config, RunConfig)
    return config


def test_later_words_win(tmp_path: Path) -> None:
    """Preset, then file, then --base and --set."""
    file = tmp_path / "config.toml"
    file.write_text(
        'name = "from file"\n[adapter]\nrank = 5\n[model]\nbase = "from-file"\n', encoding="utf-8"
    )
    preset = asked("x", "--preset", "style-high")
    assert preset.adapter.rank != 5
    config = asked("x", "--preset", "style-high", "--config", str(file))
    assert (config.adapter.rank, config.model.base, config.name) == (5, "from-file", "from file")
    assert config.adapter.alpha == preset.adapter.alpha
    words = ["x", "--config", str(file), "--base", "from-option", "--name", "mine", "--set", "adapter.rank=6"]
    config = asked(*words)
    assert (config.adapter.rank, config.model.base, config.name) == (6, "from-option", "mine")
    config = asked(*words, "--set", "adapter.rank=7", "--set", "model.base=from-set")
    assert (config.adapter.rank, config.model.base) == (7, "from-set")


def test_auto_keeps_the_presets_rates_to_begin_with(tmp_path: Path) -> None:
    preset = asked("demo")
    for words in (["--set", "optimizer.lr=auto"], ["--set", "optimizer.range_test=true"]):
        config = asked("demo", *words)
        assert config.optimizer.range_test
        assert config.optimizer.lr == preset.optimizer.lr != RunConfig().optimizer.lr
    assert not asked("demo", "--set", "optimizer.lr=auto", "--set", "optimizer.lr=2e-3").optimizer.range_test
    file = tmp_path / "config.toml"
    file.write_text('[optim]\nlr = "auto"\n', encoding="utf-8")
    assert asked("demo", "--config", str(file)).optimizer.range_test
    config = asked("demo", "--config", str(file), "--set", "optimizer.lr=2e-3")
    assert (config.optimizer.range_test, config.optimizer.lr) == (False, 2e-3)


def test_what_the_bases_family_needs_stands_between_preset_and_words(tmp_path: Path) -> None:
    """A single file of the largest family: its text encoders are off unless a word says otherwise."""
    names = {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [640, 2048],
        "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
    }
    base = tmp_path / "large.safetensors"
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name, shape in names.items()}, base)
    words = ["x", "--preset", "character-quick"]
    assert asked(*words).optimizer.text_encoder_lr == 5e-5
    for how in (["--base", str(base)], ["--set", f"model.base={base}"]):
        config = asked(*words, *how)
        assert (config.optimizer.text_encoder_lr, config.optimizer.lr) == (0.0, 1e-4)
        config = asked(*words, *how, "--set", "optimizer.text_encoder_lr=1e-5")
        assert (config.optimizer.text_encoder_lr, config.optimizer.text_encoder_2_lr) == (1e-5, 0.0)
    file = tmp_path / "config.toml"
    file.write_text(f"[model]\nbase = '{base}'\n[optim]\ntext_encoder_2_lr = 2e-5\n", encoding="utf-8")
    config = asked(*words, "--config", str(file))
    assert (config.optimizer.text_encoder_lr, config.optimizer.text_encoder_2_lr) == (0.0, 2e-5)


def test_a_base_of_the_hub_is_fetched_before_its_family_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []
    monkeypatch.setattr("lora_core.model_files.hub.fetch_base", asked_for.append)
    assert asked("x", "--base", "owner/name").optimizer.text_encoder_lr == 5e-5
    assert asked_for == ["owner/name"]


def test_files_are_kept_by_their_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be gone on with from another folder; what is not a file here is left as it is."""
    monkeypatch.chdir(tmp_path)
    for name in ("lora.safetensors", "default", "demo"):
        (tmp_path / name).write_bytes(b"")
    config = asked("x", "--set", "adapter.init=lora.safetensors", "--set", "model.vae=no.safetensors")
    assert (config.adapter.init, config.model.vae) == (str(tmp_path / "lora.safetensors"), "no.safetensors")
    assert (asked("x").adapter.init, asked("x").model.base) == ("default", "demo")


def test_a_table_is_one_word() -> None:
    config = asked("x", "--set", 'adapter.block_ranks={"mid_block" = 4, "attn2" = 0}')
    assert config.adapter.block_ranks == {"mid_block": 4, "attn2": 0}


def test_the_demo_has_a_preset_of_its_own() -> None:
    plain = asked("demo")
    # A run's name is the second in which it was asked for.
    assert plain == asked("demo", "--preset", "demo").changed({"name": plain.name})
    assert asked("demo").train.batch_size != asked("elsewhere").train.batch_size
    assert asked("demo", "--preset", "quick").optimizer == asked("elsewhere", "--preset", "quick").optimizer


def test_a_dataset_is_kept_by_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert asked("pictures").dataset.path == str(tmp_path / "pictures")
    assert asked("demo").dataset.path == "demo"


@pytest.mark.parametrize(
    ("dataset", "ending"),
    [("demo", "demo"), ("my cats.zip", "my-cats"), ("./größe", "größe"), ("/", "dataset")],
)
def test_a_run_without_a_name_gets_date_and_dataset(dataset: str, ending: str) -> None:
    name = asked(dataset).name
    assert name[:2] == "20"
    assert name[17:] == f"-{ending}"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("adapter.rank=4", 4),
        ("adapter.alpha=2", 2.0),
        ("optimizer.lr=1e-3", 1e-3),
        ("dataset.flip=true", True),
        ("dataset.trigger=red fox", "red fox"),
        ('dataset.trigger="red = fox"', "red = fox"),
        ("dataset.trigger=2024", "2024"),
        ("dataset.trigger=", ""),
        ('sample.prompts=["a", "b"]', ["a", "b"]),
        ("optimizer.name=AdamW", "adamw"),
        (" adapter.rank = 4", 4),
    ],
)
def test_a_setting_is_read_without_quotes(word: str, value: object) -> None:
    assert asked("x", "--set", word).get(word.partition("=")[0].strip()) == value


@pytest.mark.parametrize(
    "word", ["adapter.rank=4.5", "dataset.flip=1", "sample.prompts=a", "train.steps=true"]
)
def test_a_setting_of_the_wrong_type_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="should be"):
        asked("x", "--set", word)


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    promised = "train resume stop pause save preview runs generate inspect convert validate serve"
    assert set(promised.split()) <= set(VERBS)
    for verb in VERBS:
        with pytest.raises(SystemExit) as ended:
            main([*verb.split(), "--help"])
        assert ended.value.code == 0
        assert f"Usage: lora-easel {verb}" in capsys.readouterr().out
        assert not [one.name for one in parameters(verb) if not one.help]


@pytest.mark.parametrize("word", [".", "../mine", "mine", "{}"])
def test_a_run_is_found_from_wherever_one_stands(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name and its workspace follow from the folder, not from the word that it was called by."""
    run = RunFolder.create(tmp_path / "runs" / "mine", RunConfig())
    monkeypatch.chdir(run.path.parent if word == "mine" else run.path)
    assert main(["pause", word.format(run.path)]) == 1
    assert "mine is not running" in capsys.readouterr().err


def test_no_runs_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--workspace", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr().out.strip() == "[]"
    assert main(["runs", "--workspace", str(tmp_path)]) == 0
    assert "train demo" in capsys.readouterr().out


RUN_VERBS = [
    ["resume"], ["stop"], ["pause"], ["save"], ["preview"], ["pictures"], ["report"],
    ["queue", "add"], ["queue", "remove"],
]  # fmt: skip


@pytest.mark.parametrize("verb", RUN_VERBS, ids=" ".join)
def test_a_run_that_does_not_exist(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "other"):
        RunFolder.create(tmp_path / "runs" / name, RunConfig())
    assert main([*verb, "frist", "--workspace", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path / 'runs'} no run of that name; did you mean first?" in said


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\x9bb", "a\u202eb", "a\x07"])
def test_no_name_reaches_the_terminal_as_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pause", name]) == 1
    say(name)
    with pytest.raises(SystemExit):
        main(["pause", "a", name])
    shown = capsys.readouterr()
    assert not set("\x1b\x9b\u202e\x07") & set(shown.out + shown.err)
    assert printable(name) in shown.out
    say_json({"name": name})
    said = capsys.readouterr().out
    assert not set("\x1b\x9b\u202e\x07") & set(said)
    assert json.loads(said) == {"name": name}


def test_a_line_break_in_a_name_forges_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = "Nothing is wrong with them."
    (tmp_path / "set").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "set" / "a.png")
    try:
        (tmp_path / "set" / f"a\n{forged}.npz").write_text("x")
    except OSError:
        pytest.skip("this file system takes no line breaks in names")
    assert main(["audit", str(tmp_path / "set"), "--workspace", str(tmp_path)]) == 0
    assert main(["audit", f"a\n{forged}"]) == 1
    say(f"a\u2028{forged}")
    warned = EventPrinter(sys.stdout)
    warned.show(events.Warned(time=0.0, message=f"a\n{forged}"))
    shown = capsys.readouterr()
    lines = (shown.out + shown.err).splitlines()
    assert not [line for line in lines if line.startswith(forged)]
    assert len([line for line in lines if f"\\n{forged}" in line]) == 3
    say_json(["a", "b"])
    assert capsys.readouterr().out == '[\n "a",\n "b"\n]\n'


@pytest.mark.parametrize("steps", ["0", "-1", "1000001", "1" + "0" * 40])
def test_steps_of_resume_go_as_far_as_the_setting(
    steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(tmp_path / "runs" / "first", RunConfig())
    assert main(["resume", str(run.path), "--steps", steps]) == 1
    assert "it must be between 1 and 1,000,000" in capsys.readouterr().err
    assert not run.requests_file.exists()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["genrate"], "Did you mean 'generate'?"),
        (["queue", "lst"], "Did you mean 'list'?"),
        (["runs", "--jsn"], "Did you mean --json?"),
        (["generate", "--prompt", "a", "--sampeler", "ddim"], "Did you mean --sampler"),
    ],
)
def test_a_misspelt_word_is_answered_with_a_near_one(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "grid", "validate"])
def test_a_device_that_is_not_there_is_a_sentence(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"validate": ["--dataset", "demo"]}.get(verb, ["--prompt", "a", "--out", str(tmp_path / "a.png")])
    words += ["--columns", "seed=1,2"] if verb == "grid" else []
    assert main([verb, *words, "--device", "cuda:77", "--workspace", str(tmp_path)]) == 1
    assert "cuda:77 does not exist" in capsys.readouterr().err
    assert main([verb, *words, "--device", "abacus", "--workspace", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("--device = 'abacus'")


def test_the_words_of_a_result_are_those_of_a_verb() -> None:
    assert set(_templates()) - {"left out"} <= set(VERBS)
