"""The run that the form stands for at this moment: the draft on disk, read as settings."""

from typing import Any

from app.train.form import FORM, config_of, form_values, preset_config
from lora_core.dataset.project import DEMO, Project
from lora_core.spec.bases import EMBEDDED, Base, chosen_base
from lora_core.spec.config import RunConfig, retired


class Plan:
    """Settings of the run to come, what is not legal in them, and what of an older draft is not used."""

    def __init__(self, project: Project) -> None:
        """Read the project's draft."""
        draft = project.draft()
        self.goal, self.level = choice(draft)
        kept = draft.get("values") or {}
        values = {name: v for name, v in kept.items() if name in FORM}
        # Until the form is changed: then the draft is written anew, without them.
        self.notes = retired(kept.items())
        self.base = base_of(values)
        self.preset = preset_config(self.goal, self.level, self.base.family)
        config, self.problems = config_of(values, self.preset)
        path = DEMO if project.uses_demo else str(project.pictures)
        self.trigger = str(draft.get("trigger") or "")
        self.config: RunConfig = config.changed({"dataset.path": path, "dataset.trigger": self.trigger})


def choice(draft: dict[str, Any]) -> tuple[str, str]:
    """The goal and the preset of a draft; the demo's pictures bring their own preset."""
    level = draft.get("level") or (DEMO if draft.get("dataset") == DEMO else "balanced")
    return str(draft.get("goal") or "style"), str(level)


def base_of(values: dict[str, Any]) -> Base:
    """The base that the form's values name."""
    name = values.get("model.base") or EMBEDDED
    by_hand = (str(values.get(key) or "auto") for key in ("model.prediction", "model.zero_terminal_snr"))
    return chosen_base(str(name), *by_hand)


def widget_values(project: Project) -> list[Any]:
    """What the form's widgets show: the draft as it was typed, the preset where nothing was."""
    draft = project.draft()
    typed = draft.get("values") or {}
    standard = form_values(preset_config(*choice(draft), base_of(typed).family))
    return [typed.get(name, value) for name, value in zip(FORM, standard, strict=True)]


def standing_values(project: Project) -> dict[str, Any]:
    """`widget_values` by the settings' names."""
    return dict(zip(FORM, widget_values(project), strict=True))


def keep_typed(project: Any, seen: list[Any] | None, values: list[Any]) -> None:
    """Put into the draft what was typed on a page, and nothing of what only stood there.

    Args:
        project: whose draft.
        seen: what the page was filled with, in the order of `FORM`; None where that is not known.
        values: what its fields hold now.
    """
    given = dict(zip(FORM, values, strict=True))
    if seen is not None and len(seen) == len(values):
        before = dict(zip(FORM, seen, strict=True))
        given = standing_values(project) | {
            name: value for name, value in given.items() if value != before[name]
        }
    project.keep(values=given)
