"""Every row of every table names code that exists, and is found by key and by title."""

import inspect

import pytest

from lora_core.spec import choices
from lora_core.spec.choices import Choice, Table, chosen
from lora_core.spec.errors import ConfigError

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


def test_a_missing_optional_package_is_named_with_its_extra() -> None:
    row = Choice("Nothing", "For tests.", "no_such_package_at_all:Thing", extra="optimizers")
    with pytest.raises(ConfigError, match=r"no_such_package_at_all.*lora-easel\[optimizers\]"):
        row.resolve()


def test_a_missing_module_of_our_own_is_a_defect() -> None:
    with pytest.raises(ModuleNotFoundError):
        Choice("Nothing", "For tests.", "lora_core.no_such_module:thing").resolve()
