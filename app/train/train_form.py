"""Layout and wiring of the Train tab's form: the choice of a base with its download, five basic settings, and
all others behind one row, in groups, with a search and buttons that reset."""

import functools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from app.state import AppState, Bindings, Snapshot
from app.templates import (
    TYPING,
    _,
    card,
    edit_events,
    help_of,
    html_block,
    label_of,
    note_html,
    pluralize,
    render,
    text_field,
)
from app.train.form import (
    FORM,
    GROUPS,
    Plan,
    changed_names,
    chosen_preset,
    current_values,
    family_differences,
    form_values,
    group_fields,
    keep_changed_values,
    preset_config,
    summary,
    to_widget_value,
    widget,
)
from lora_core.model_files.detect import EMBEDDED, BaseFacts, lookup_base
from lora_core.model_files.starting_settings import GOALS, LEVELS
from lora_core.projects.project import DEMO, Project
from lora_core.settings.schema import LossSection
from lora_core.system.files import clean_value, expand_home
from lora_core.system.other_tools import Machine, find_tools, list_base_files

RESOLUTIONS = (128, 256, 512, 768, 1024)
FOLDED = [group for group in GROUPS if group not in ("Base model", "Slider")]
INFO = (
    "Type to search. Or the path of a .safetensors file, of a diffusers folder, or of a folder full of"
    " models; or a hub id like owner/name, which can be downloaded."
)
HIDDEN_INFO = "tip"
USUAL_LEVEL = "balanced"
TIMESTEP_BARS = 25


class TrainForm:
    """The widgets of the form, their groups and the search."""

    def __init__(self, bindings: Bindings, facts: Callable[[Snapshot], str]) -> None:
        """`facts` says below the basic settings what they come to."""
        self.bindings, self.project = bindings, bindings.app_state.project
        self.folds: dict[str, Any] = {}
        made: dict[str, Any] = {}
        self._build_picker(made)
        self._build_basic(made)
        bindings.follow(html_block(elem_id="start-facts"), facts)
        bindings.follow(html_block(elem_id="changed"), _changed)
        with gr.Column(elem_classes="more") as self.more:
            search = self._build_groups(made)
        self.widgets = {name: made[name] for name in FORM}
        # What this page was filled with: only what differs from it was typed here. Without it, a second page
        # would overwrite newer values of the first with its old ones. The page holds it, so that each event
        # brings it as it was when the fields were read: an answer on its way changes neither. On a full disk
        # it is None: the page's fields are all that is left of the draft if the window ends.
        self.seen = gr.HTML(None, html_template="", padding=False, apply_default_css=False)
        for name, field in self.widgets.items():
            bindings.fill_on_load(field, functools.partial(self._value, name))
        bindings.fill_on_load(self.goal, lambda: chosen_preset(self.project.draft())[0])
        bindings.fill_on_load(self.level, lambda: chosen_preset(self.project.draft())[1])
        bindings.fill_on_load(self.seen, lambda: self._seen(current_values(self.project)))
        self._wire(search)

    def _value(self, name: str) -> Any:
        return current_values(self.project)[name]

    def _build_picker(self, made: dict[str, Any]) -> None:
        follow, app_state = self.bindings.follow, self.bindings.app_state
        base = made["model.base"] = gr.Dropdown(
            base_choices(app_state),
            label="Base model",
            allow_custom_value=True,
            filterable=True,
            elem_id="base-model",
            info=INFO,
            elem_classes=HIDDEN_INFO,
        )
        follow(base, lambda snap: gr.update(choices=base_choices(snap.app_state)))
        follow(html_block(), base_note)
        follow(html_block(), download_note)
        app_state.downloads.finished = functools.partial(adopt_downloaded_base, app_state)
        self.added = html_block(elem_id="base-added")
        with gr.Column(elem_classes="group", elem_id="base-details") as details:
            follow(html_block(elem_classes="group-note"), card("train/form.html", part="base"))
            with gr.Accordion("Prediction and VAE", open=False) as fold:
                made["model.prediction"] = widget("model.prediction", elem_id="model-prediction")
                made["model.zero_terminal_snr"] = widget("model.zero_terminal_snr", elem_id="model-zero-snr")
                made["model.vae"] = widget("model.vae", elem_id="model-vae", placeholder="the base's own")
        follow(details, lambda snap: gr.update(visible=not snap.plan.base.embedded))
        follow(fold, lambda snap: gr.update(open=_asks(snap)))

    def _build_basic(self, made: dict[str, Any]) -> None:
        with gr.Row(elem_classes="pair"):
            self.goal = gr.Dropdown(
                [(title, key) for key, title in GOALS.items()], label="Goal", elem_id="goal"
            )
            levels = [*((title, key) for key, title in LEVELS.items()), ("Demo", "demo")]
            self.level = gr.Dropdown(levels, label="Preset", elem_id="preset")
        with gr.Row(elem_classes="pair"):
            made["train.steps"] = widget("train.steps", elem_id="steps", elem_classes=HIDDEN_INFO)
            made["train.resolution"] = gr.Dropdown(
                _resolutions(),
                label="Resolution",
                info=help_of("train.resolution"),
                allow_custom_value=True,
                elem_id="resolution",
                elem_classes=HIDDEN_INFO,
            )
        with gr.Column(elem_classes="group", elem_id="slider") as slider:
            self.bindings.follow(
                html_block(elem_classes="group-note"), card("train/form.html", part="slider")
            )
            for name in group_fields("Slider"):
                made[name] = widget(name, elem_id=_field_id(name), elem_classes=HIDDEN_INFO)
        self.bindings.follow(slider, lambda snap: gr.update(visible=snap.plan.is_slider))
        self.bindings.follow(
            made["train.resolution"], lambda snap: gr.update(choices=_resolutions(snap.plan.base))
        )

    def _build_groups(self, made: dict[str, Any]) -> Any:
        search = text_field("Find a setting", "find-setting", "Find a setting: rank, clip skip, warm-up ...")
        self.none = html_block(elem_id="find-none")
        timesteps = card(
            "train/form.html", part="timesteps", bars=lambda snap: timestep_bars(snap.plan.config.loss)
        )
        for group in FOLDED:
            with gr.Column(elem_classes="group", elem_id=f"group-{slug(group)}"):
                note = html_block(elem_classes="group-note")
                self.bindings.follow(note, functools.partial(_group_note, group))
                with gr.Accordion(group, open=False) as self.folds[group]:
                    for name in group_fields(group):
                        made[name] = widget(name, elem_id=_field_id(name), elem_classes=HIDDEN_INFO)
                        if name == "optimizer.name":
                            self.bindings.follow(html_block(elem_id="rates-note"), _rates_note)
                        if name == "loss.max_timestep":
                            self.bindings.follow(html_block(elem_id="timesteps"), timesteps)
        return search

    def _wire(self, search: Any) -> None:
        self.fields = [self.seen, *self.widgets.values()]
        inputs, base, optimizer = set(self.fields), self.widgets["model.base"], self.widgets["optimizer.name"]
        typed = [field for field in self.widgets.values() if field not in (base, optimizer)]
        # Unfolding a group rerenders its fields, so only events of the user count.
        events = [event for field in typed for event in edit_events(field)]
        gr.on(events, self.keep, inputs, self.seen, **TYPING)
        optimizer.input(self._choose_optimizer, inputs, self.fields, **TYPING)
        for chosen in (self.goal, self.level):
            chosen.input(self._choose_preset, [base, self.goal, self.level], self.fields, **TYPING)
        base.input(self._choose_base, inputs, [self.added, self.level, *self.fields], **TYPING)
        # Its input event swallows the first key; each change comes from the user, as nothing else fills it.
        search.change(search_settings, search, [self.none, *self.folds.values()], **TYPING)

    def _read(self, sent: dict[Any, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """What a page was filled with, None if unknown, and what its fields hold."""
        values = {name: clean_value(sent[field]) for name, field in self.widgets.items()}
        seen = sent[self.seen]
        known = isinstance(seen, list) and len(seen) == len(FORM)
        return dict(zip(FORM, seen, strict=True)) if known else None, values

    def _seen(self, values: dict[str, Any]) -> list[Any] | None:
        return list(values.values()) if self.project.write_draft() else None

    def _show(self, values: dict[str, Any], changed: dict[str, Any]) -> dict[Any, Any]:
        """Fill a page, which holds `values`, with what `changed`."""
        fields = {self.widgets[name]: value for name, value in changed.items()}
        return {self.seen: self._seen(values | changed), **fields}

    def keep(self, sent: dict[Any, Any]) -> list[Any] | None:
        """Put what was typed into the draft."""
        seen, values = self._read(sent)
        keep_changed_values(self.project, seen, values)
        return self._seen(values)

    def _choose_preset(self, base: str, goal: str, level: str) -> Any:
        """Fill the form; a dropdown's event also fires on blur, which must not undo edits."""
        if (goal, level) == chosen_preset(self.project.draft()):
            return gr.skip()
        family = lookup_base(str(base or EMBEDDED)).family
        values = form_values(preset_config(goal, level, family)) | {"model.base": base}
        self.project.update_draft(goal=goal, level=level, values=values, fitted=None)
        return self._show(values, values)

    def _choose_optimizer(self, sent: dict[Any, Any]) -> Any:
        """Give another optimizer its usual rates, unless the user typed some; like `_choose_base`."""
        seen, values = self._read(sent)
        if seen and seen["optimizer.name"] == values["optimizer.name"]:
            return gr.skip()
        with self.project.editing():
            before = Plan(self.project)
            keep_changed_values(self.project, seen, values)
            return self._show(values, choose_optimizer(self.project, before))

    def _choose_base(self, sent: dict[Any, Any]) -> Any:
        """Fill in only what the choice changes: the event fires also where the field is merely left, and
        edits elsewhere meanwhile must stay."""
        seen, values = self._read(sent)
        if seen and seen["model.base"] == values["model.base"]:
            return gr.skip()
        old_level = chosen_preset(self.project.draft())[1]
        note, level, changed = choose_base(self.bindings.app_state, values)
        fresh = {name: value for name, value in changed.items() if value != values[name]}
        with self.project.editing():
            keep_changed_values(self.project, seen, values)
            self.project.update_draft(values=current_values(self.project) | fresh, level=level)
        chosen = {} if level == old_level else {self.level: level}
        return {self.added: note_html(note) if note else "", **chosen, **self._show(values, fresh)}


def reset_settings(project: Project, group: str) -> None:
    """Reset the settings of a folded group to the preset, of all where `group` is none."""
    with project.editing():
        preset = form_values(Plan(project).preset)
        names = group_fields(group) if group in FOLDED else [name for name in FORM if name != "model.base"]
        project.update_draft(values=current_values(project) | {name: preset[name] for name in names})


def choose_optimizer(project: Project, before: Plan) -> dict[str, Any]:
    """What the draft's new optimizer makes of the form: its usual rates where those of the one `before` were
    left as they were; else they are offered."""
    plan = Plan(project)
    old, new, preset = before.config.optimizer, plan.config.optimizer, plan.preset.optimizer
    if old.name == new.name or "optimizer.name" in plan.invalid:
        return {}
    held = new.model_copy(update={"name": old.name})
    usual = held.usual_for(new.name, preset.usual_for(new.name)["lr"])
    if old.row.averages and new.schedule == "constant":
        usual = {"schedule": preset.schedule} | usual
    now = {key: getattr(new, key) for key in usual}
    swap: dict[str, Any] = {"optimizer": new.name, "from": _named(now), "to": _named(usual)}
    left = held.lr in (preset.lr, preset.usual_for(old.name)["lr"])
    fresh: dict[str, Any] = swap["to"] if left else {}
    project.update_draft(values=current_values(project) | fresh, rates=swap)
    return fresh


def _named(values: dict[str, Any]) -> dict[str, Any]:
    return {f"optimizer.{key}": value for key, value in values.items()}


def swap_rates(project: Project) -> None:
    """Take the usual rates of the chosen optimizer, or put those of before back."""
    with project.editing():
        plan = Plan(project)
        if plan.rates.get("optimizer") == plan.config.optimizer.name:
            rates = plan.rates["from" if plan.takes_usual_rates else "to"]
            project.update_draft(values=current_values(project) | rates)


_rates_note = card("train/form.html", part="rates")
"""How choosing an optimizer changed the rates, with an Undo button; or the usual rates."""


@functools.lru_cache(maxsize=64)
def timestep_bars(loss: LossSection) -> list[float]:
    """How often the timesteps of each of `TIMESTEP_BARS` even parts are drawn, as shares of the most."""
    count = 40 * TIMESTEP_BARS
    drawn = (loss.timestep_at((number + 0.5) / count) for number in range(count))
    found = Counter(min(TIMESTEP_BARS - 1, max(0, int(TIMESTEP_BARS * share))) for share in drawn)
    return [found[number] / max(found.values()) for number in range(TIMESTEP_BARS)]


def search_settings(words: str) -> list[Any]:
    """Unfold the groups with a match and hide the fields without one.

    Args:
        words: the search text; a setting matches by its name, its label, its help or its group.

    Returns:
        A style that hides fields, with a note where all are hidden, then an update for each group.
    """
    wanted, folds = str(words or "").lower().split(), []
    hidden: list[str] = []
    for group in FOLDED:
        names = group_fields(group)
        missed = [name for name in names if not all(word in _searched(group, name) for word in wanted)]
        folds.append(gr.update(open=bool(wanted) and len(missed) < len(names)))
        hidden += map(_field_id, missed)
    nothing = not any(fold["open"] for fold in folds) and bool(wanted)
    return [render("train/form.html", part="search", hidden=hidden, nothing=nothing, words=words), *folds]


def _searched(group: str, name: str) -> str:
    return f"{name} {name.replace('_', ' ')} {label_of(name)} {help_of(name)} {group} {_(group)}".lower()


def slug(group: str) -> str:
    """A group's name in ids."""
    return re.sub(r"\W+", "-", group.lower())


def _field_id(name: str) -> str:
    return name.replace(".", "-").replace("_", "-")


def _resolutions(base: BaseFacts | None = None) -> list[tuple[str, int]]:
    """The sizes to choose from; 0 is what the base was trained at."""
    own = base.resolution if base and base.family else 0
    words = _("{own} (the base)", own=own) if own else _("As the base")
    return [(words, 0), *((str(side), side) for side in RESOLUTIONS if side != own)]


def _group_note(group: str, snapshot: Snapshot) -> str:
    """The summary of a folded group, with a reset button if something was changed."""
    config, preset = snapshot.plan.config, snapshot.plan.preset
    changed = changed_names(config, preset, group_fields(group))
    text = summary(group, config, preset)
    return render(
        "train/form.html", part="group", group=group, text=text, slug=slug(group), changed=bool(changed)
    )


def _changed(snapshot: Snapshot) -> str:
    """How many settings differ from the preset, with a reset button."""
    names = [name for name in FORM if name != "model.base"]
    changed = changed_names(snapshot.plan.config, snapshot.plan.preset, names)
    return render("train/form.html", part="changed", names=[label_of(name) for name in changed])


def base_choices(app_state: AppState) -> list[tuple[str, str]]:
    """Bases on offer as (label, value): the embedded one, those used before, then other tools'."""
    titles: dict[str, tuple[str, str]] = {}
    for tool, files in app_state.tools.shelves():
        for file in files:
            top = next((folder for folder in tool.models if file.is_relative_to(folder)), file.parent)
            words = file.relative_to(top).as_posix() if file != top else file.name
            titles.setdefault(_key(str(file)), (f"{tool.name}: {words}", str(file)))
    # Hub ids are offered always, paths if they exist.
    kept = [n for n in app_state.places.read("bases") if expand_home(n).exists() or not Path(n).is_absolute()]
    seen = {_key(name): name for name in kept}
    before = [(titles[key][0] if key in titles else Path(name).name, name) for key, name in seen.items()]
    return [
        (_("Embedded base (tiny)"), EMBEDDED),
        *before,
        *(choice for key, choice in titles.items() if key not in seen),
    ]


def _key(name: str) -> str:
    path = expand_home(name)
    return str(path.resolve()) if path.exists() else name


def _asks(snapshot: Snapshot) -> bool:
    """Whether the user should check these settings: detection was uncertain, or they were set before."""
    model = snapshot.plan.config.model
    by_hand = model.prediction != "auto" or model.zero_terminal_snr != "auto" or bool(model.vae)
    return snapshot.plan.base.guessed or by_hand


def choose_base(app_state: AppState, values: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Apply a chosen base to the form. A folder of models is not a base: it is remembered, and its models are
    offered.

    Args:
        app_state: where it is remembered.
        values: the form with the new base in it, dotted name to what the widget holds.

    Returns:
        A sentence, or ""; the preset's level; and the form's new values.
    """
    draft = app_state.project.draft()
    goal, level = chosen_preset(draft)
    before = lookup_base(_fitted(draft))
    name = str(values["model.base"] or "").strip().strip('"') or EMBEDDED
    values = {**values, "model.base": name}
    new = lookup_base(name)
    if new.problem and (added := _added_folder(app_state, expand_home(name))):
        return added, level, {**values, "model.base": before.name or EMBEDDED}
    if new.facts is None:
        # Needed once its files arrive, to know whose starting values the form holds.
        app_state.project.update_draft(fitted={"base": name, "to": before.name})
        return "", level, values
    # The demo's preset is for the embedded base alone: its rate and precision would be a bad start elsewhere.
    new_level = USUAL_LEVEL if level == DEMO and not new.embedded else level
    if not new.embedded:
        app_state.places.keep("bases", name)
    old = form_values(preset_config(goal, level, before.family))
    usual = form_values(preset_config(goal, new_level, new.family))
    # Starting values that were left as they were take the new base's.
    changed = {key: usual[key] if value == old[key] else value for key, value in values.items()}
    changed["model.base"] = name
    if new.resolution != before.resolution:
        # A resolution chosen for another base does not apply to this one.
        changed["train.resolution"] = to_widget_value("train.resolution", 0)
    if name != before.name:
        # Overrides of one base's detection do not apply to the next.
        changed |= {"model.prediction": "auto", "model.zero_terminal_snr": "auto", "model.vae": ""}
    return "", new_level, changed


def _fitted(draft: dict[str, Any]) -> str:
    """The base whose starting values are in the form; not one whose files could not be read."""
    standing = str((draft.get("values") or {}).get("model.base") or EMBEDDED)
    fitted = draft.get("fitted") or {}
    return str(fitted["to"]) if fitted.get("base") == standing else standing


def adopt_downloaded_base(app_state: AppState, name: str) -> None:
    """Fill the form with a downloaded base's starting values if it is still chosen."""
    with app_state.project.editing():
        values = current_values(app_state.project)
        if values["model.base"] == name:
            _, level, changed = choose_base(app_state, values)
            app_state.project.update_draft(values=changed, level=level)


def _added_folder(app_state: AppState, folder: Path) -> str:
    """Remember a folder of models; "" if it holds none."""
    if not folder.is_dir():
        return ""
    found = {tool.name: len(list_base_files(tool)) for tool in find_tools([folder], Machine(()))}
    if not sum(found.values()):
        return ""
    app_state.places.keep("folders", str(folder.absolute()))
    app_state.tools.look(wait=True)
    models = pluralize(sum(found.values()), "model")
    return _("{models} found in {folder}: open the list above to choose one.", models=models, folder=folder)


base_note = card("train/base.html", part="note", own=lambda snap: family_differences(snap.plan))
"""What the chosen base is, and the values it sets in the form."""


def download_note(snapshot: Snapshot) -> str:
    """Size and progress of a hub base's download, with its buttons."""
    base = snapshot.plan.base
    offer = snapshot.app_state.downloads.offer(base.name) if base.remote else None
    return render("train/base.html", part="download", offer=offer) if offer else ""
