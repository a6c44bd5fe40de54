"""Every row of every table names code that exists and is found by key and by title; no table, setting or
option has one value only."""

import inspect
import re
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from app import install
from lora_core.api import VERBS
from lora_core.cli.parser import parameters
from lora_core.errors import ConfigError
from lora_core.settings import choices
from lora_core.settings.choices import Choice, Table, chosen
from lora_core.settings.config import FIELDS, choices_of, limits_of

ROOT = Path(__file__).resolve().parents[2]
TABLES: dict[str, Table] = {
    name: value for name, value in vars(choices).items() if name.isupper() and isinstance(value, dict)
}
ROWS = [(name, key) for name, table in TABLES.items() for key in table]


@pytest.mark.parametrize(("table", "key"), ROWS)
def test_the_row_is_real(table: str, key: str) -> None:
    row = TABLES[table][key]
    assert row.title
    assert row.help.endswith(".")
    if row.load:
        found = row.resolve()
        if inspect.isclass(found):  # a misspelt keyword would come to light only when the row is used
            known = inspect.signature(found).parameters
            assert set(row.defaults) <= set(known)


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
        chosen(choices.LOSSES, "cubic", "loss.type")


def test_a_missing_optional_package_comes_with_the_command_that_installs_it() -> None:
    row = Choice("Nothing", "For tests.", "no_such_package_at_all:Thing", package="the-package")
    with pytest.raises(ConfigError, match=r"needs the package the-package.*-m pip install the-package`"):
        row.resolve()


def test_optional_packages_are_those_that_the_launcher_installs() -> None:
    """Also: no sentence leads to a package on the index that is not the one meant."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = [need for extra in install.EXTRAS for need in extras[extra]]
    packages = {row.package for table in TABLES.values() for row in table.values() if row.package}
    assert {re.split(r"[<>=;\[ ]", need)[0] for need in installed} == packages | {"tensorboard"}


def test_a_missing_module_of_our_own_is_a_defect() -> None:
    with pytest.raises(ModuleNotFoundError):
        Choice("Nothing", "For tests.", "lora_core.no_such_module:thing").resolve()
