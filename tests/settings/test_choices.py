"""Every row of every table names code that exists and is found by key and by title; no table, setting or
option has one value only."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch

from app import install
from app.train.form import widget
from lora_core.api import VERBS
from lora_core.cli.parser import parameters
from lora_core.errors import ConfigError
from lora_core.settings import schema
from lora_core.settings.config import FIELDS, RunConfig, choices_of, limits_of
from lora_core.settings.schema import Implementation, OptimizerChoice, Table, chosen

ROOT = Path(__file__).resolve().parents[2]
TABLES: dict[str, Table] = {
    name: value for name, value in vars(schema).items() if name.isupper() and isinstance(value, dict)
}
ROWS = [(name, key) for name, table in TABLES.items() for key in table]


@pytest.mark.parametrize(("table", "key"), ROWS)
def test_the_row_is_real(table: str, key: str, request: pytest.FixtureRequest) -> None:
    row = TABLES[table][key]
    assert row.title
    assert row.help.endswith(".")
    if isinstance(row, Implementation):
        if row.package == "bitsandbytes":
            request.getfixturevalue("bitsandbytes")
        if row.package:
            pytest.importorskip(row.load.partition(":")[0])
        found = row.resolve()
        if inspect.isclass(found):  # a misspelt keyword would come to light only when the row is used
            known = inspect.signature(found).parameters
            assert set(row.defaults) <= set(known)
            # What is read from the source without importing it.
            read = schema.constructor_defaults(row.load)
            assert read is None or set(read) == {n for n, one in known.items() if one.kind != one.VAR_KEYWORD}
        if isinstance(row, OptimizerChoice):
            assert row.rates[0] <= row.lr <= row.rates[1]


def test_a_class_that_hands_its_arguments_on_takes_those_of_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
class Base:
    def __init__(self, params, lr=1e-3, *, momentum=0.5, **more): ...
class Own(Base):
    def __init__(self, *args, **kwargs): ...
class Unknown(somewhere.Else):
    def __init__(self, *args, **kwargs): ...
"""
    (tmp_path / "handing_on.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Base", "Own"):
        found = schema.constructor_defaults(f"handing_on:{name}")
        assert found == {"params": ..., "lr": 1e-3, "momentum": 0.5}
    assert schema.constructor_defaults("handing_on:Unknown") is None


@pytest.mark.parametrize("table", TABLES)
def test_titles_and_keys_lead_to_one_row(table: str) -> None:
    for key, row in TABLES[table].items():
        for name in (key, key.upper(), row.title, f" {row.title.lower()} "):
            assert chosen(TABLES[table], name, "x") is row


@pytest.mark.parametrize("table", TABLES)
def test_a_table_leaves_a_choice(table: str) -> None:
    assert len(TABLES[table]) > 1, "with one row there is nothing to choose, so it should be no table"


def test_every_setting_leaves_a_choice() -> None:
    for name, info in FIELDS.items():
        table, limits = choices_of(name), limits_of(name)
        assert table is None or any(table is known for known in TABLES.values()), name
        assert limits is None or limits[0] < limits[1], name
        assert get_origin(info.annotation) is not Literal or len(get_args(info.annotation)) > 1, name


def test_every_option_of_the_command_line_leaves_a_choice() -> None:
    for verb in VERBS:
        for one in parameters(verb):
            assert not one.choices or len(one.choices) > 1, f"{verb} {one.name}"


def test_an_unknown_name_is_answered_with_all_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"loss\.type = .cubic. is not known; choose one of mse, l1, huber"):
        chosen(schema.LOSSES, "cubic", "loss.type")


def test_a_missing_optional_package_comes_with_the_command_that_installs_it() -> None:
    row = Implementation("Nothing", "For tests.", "no_such_package_at_all:Thing", package="the-package")
    with pytest.raises(ConfigError, match=r"needs the package the-package.*-m pip install the-package`"):
        row.resolve()


def test_optional_packages_are_those_that_the_launcher_installs() -> None:
    """Also: no sentence leads to a package on the index that is not the one meant."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = [need for extra in (*install.EXTRAS, *install.CARD_EXTRAS) for need in extras[extra]]
    packages = {
        row.package
        for table in TABLES.values()
        for row in table.values()
        if isinstance(row, Implementation) and row.package
    }
    assert {re.split(r"[<>=;\[ ]", need)[0] for need in installed} == packages | {"tensorboard"}


def test_a_missing_module_of_our_own_is_a_defect() -> None:
    with pytest.raises(ModuleNotFoundError):
        Implementation("Nothing", "For tests.", "lora_core.no_such_module:thing").resolve()


class Toy(torch.optim.SGD):
    """An optimizer that a package brings."""


def test_a_row_is_all_that_an_optimizer_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    row = OptimizerChoice("Toy", "For tests.", f"{__name__}:Toy", {"momentum": 0.5}, state=1.0)
    monkeypatch.setitem(schema.OPTIMIZERS, "toy", row)
    config = RunConfig().changed({"optimizer.name": "Toy"})
    assert config.optimizer.name == "toy"
    assert ("Toy", "toy") in widget("optimizer.name").choices
    made = row.resolve()(torch.nn.Linear(4, 4).parameters(), lr=config.optimizer.lr, **row.defaults)
    assert isinstance(made, Toy)
    assert made.defaults["momentum"] == 0.5


def test_a_declaration_is_all_that_a_setting_needs(tmp_path: Path) -> None:
    """Window, TOML, command line, checks and help of a setting follow from its field."""
    source = Path(schema.__file__).read_text(encoding="utf-8")
    field = '    toy: int = Field(1, title="Toy", ge=0, le=3)\n    """For tests."""\n'
    (tmp_path / "schema.py").write_text(source.rstrip() + "\n" + field, encoding="utf-8")
    script = f"""
import importlib.util, sys, tomllib
spec = importlib.util.spec_from_file_location("lora_core.settings.schema", {str(tmp_path / "schema.py")!r})
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
from app.train.form import group_fields, widget
from lora_core.errors import ConfigError
from lora_core.settings.config import RunConfig, help_of, parsed_assignment, to_toml
config = RunConfig().changed(dict([parsed_assignment("save.toy=2")]))
assert RunConfig.from_dict(tomllib.loads(to_toml(config))).save.toy == 2
assert "save.toy" in group_fields("Samples and saving")
assert (widget("save.toy").label, help_of("save.toy")) == ("Toy", "For tests.")
try:
    config.changed({{"save.toy": 4}})
except ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "save.toy = 4 is out of range; it must be between 0 and 3.\n"
