"""Every row of every table names code that exists, and is found by key and by title."""

import inspect
import re
import tomllib
from pathlib import Path

import pytest

from app import install
from lora_core.spec import choices
from lora_core.spec.choices import Choice, Table, chosen
from lora_core.spec.errors import ConfigError

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


def test_an_unknown_name_is_answered_with_all_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"loss\.kind = .cubic. is not known; choose one of mse, l1, huber"):
        chosen(choices.LOSSES, "cubic", "loss.kind")


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
