"""The choice of a base: those to choose from, what the chosen one is, and its download."""

import functools
from pathlib import Path
from typing import Any

import gradio as gr

from app.bindings import TYPING, Bindings, html_block
from app.formatting import format_bytes, pluralize
from app.state import AppState, Snapshot
from app.templates import note_html, render
from app.top_bar import Act
from app.train.form import (
    FORM,
    carry_over,
    chosen_preset,
    current_values,
    family_differences,
    keep_changed_values,
    preset_config,
    to_widget_value,
    widget,
)
from lora_core.model_files.detect import EMBEDDED, lookup_base
from lora_core.model_files.hub import Download
from lora_core.projects.project import DEMO
from lora_core.system.other_tools import Machine, find_tools, list_base_files


def base_choices(app_state: AppState) -> list[tuple[str, str]]:
    """Bases on offer as (label, value): the embedded one, those used before, then other tools'."""
    titles: dict[str, tuple[str, str]] = {}
    for tool, files in app_state.tools.shelves():
        for file in files:
            top = next((folder for folder in tool.models if file.is_relative_to(folder)), file.parent)
            words = file.relative_to(top).as_posix() if file != top else file.name
            titles.setdefault(_key(str(file)), (f"{tool.name}: {words}", str(file)))
    seen = {_key(name): name for name in app_state.places.read("bases") if _there(name)}
    before = [(titles[key][0] if key in titles else Path(name).name, name) for key, name in seen.items()]
    return [
        ("Embedded base (tiny)", EMBEDDED),
        *before,
        *(choice for key, choice in titles.items() if key not in seen),
    ]


def _key(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _there(name: str) -> bool:
    """Whether an earlier base can be offered: hub ids always, paths if they exist."""
    return Path(name).expanduser().exists() or not Path(name).is_absolute()


INFO = (
    "Type to search. Or the path of a .safetensors file, of a diffusers folder, or of a folder full of"
    " models; or a hub id like owner/name, which can be downloaded."
)
HIDDEN_INFO = "tip"
USUAL_LEVEL = "balanced"


def build_picker(bindings: Bindings) -> tuple[dict[str, Any], Any]:
    """Lay out the dropdown, its notes, and the settings beside it.

    Returns:
        The widgets by setting, and the place for what choosing a folder said.
    """
    made: dict[str, Any] = {}
    made["model.base"] = gr.Dropdown(
        base_choices(bindings.app_state),
        label="Base model",
        allow_custom_value=True,
        filterable=True,
        elem_id="base-model",
        info=INFO,
        elem_classes=HIDDEN_INFO,
    )
    bindings.follow(made["model.base"], lambda snap: gr.update(choices=base_choices(snap.app_state)))
    bindings.follow(html_block(), base_note)
    bindings.follow(html_block(), download_note)
    bindings.app_state.downloads.finished = functools.partial(adopt_downloaded_base, bindings.app_state)
    added = html_block(elem_id="base-added")
    with gr.Column(elem_classes="group", elem_id="base-details") as details:
        bindings.follow(html_block(elem_classes="group-note"), _details_note)
        with gr.Accordion("Prediction and VAE", open=False) as fold:
            made["model.prediction"] = widget("model.prediction", elem_id="model-prediction")
            made["model.zero_terminal_snr"] = widget("model.zero_terminal_snr", elem_id="model-zero-snr")
            made["model.vae"] = widget("model.vae", elem_id="model-vae", placeholder="the base's own")
    bindings.follow(details, lambda snap: gr.update(visible=not snap.plan.base.embedded))
    bindings.follow(fold, lambda snap: gr.update(open=_asks(snap)))
    return made, added


def _details_note(snapshot: Snapshot) -> str:
    """Summary of the folded settings."""
    facts, vae = snapshot.plan.base.facts, snapshot.plan.config.model.vae
    if facts is None or facts.family is None:
        return ""
    predicts = "velocity" if facts.prediction == "v_prediction" else "noise"
    guess = ", a guess" if facts.guessed else ""
    snr = ", zero terminal SNR" if facts.zero_terminal_snr else ""
    text = f"{predicts}{guess}{snr}{', own VAE' if vae else ''}"
    return render("train/form.html", part="group", text=text, reset="")


def _asks(snapshot: Snapshot) -> bool:
    """Whether the user should check these settings: detection was uncertain, or they were set before."""
    model = snapshot.plan.config.model
    by_hand = model.prediction != "auto" or model.zero_terminal_snr != "auto" or bool(model.vae)
    return snapshot.plan.base.guessed or by_hand


def wire_picker(bindings: Bindings, widgets: dict[str, Any], level: Any, note: Any, seen: Any) -> None:
    """Fill the form with a base's starting values when it is chosen.

    Args:
        bindings: of the page.
        widgets: the form's, by setting.
        level: the dropdown of presets.
        note: the place for what choosing a folder said.
        seen: what the page was filled with.
    """
    fields, project = list(widgets.values()), bindings.app_state.project

    def chosen(before: list[Any] | None, *values: Any) -> list[Any]:
        """Fills in only what the choice changes: the event fires also where the field is merely left, and
        what is typed elsewhere meanwhile must stay."""
        given = dict(zip(FORM, values, strict=True))
        if before is not None and before[FORM.index("model.base")] == given["model.base"]:
            return [gr.skip()] * len(outputs)
        old_level = chosen_preset(project.draft())[1]
        said, new_level, changed = choose_base(bindings.app_state, given)
        fresh = {name: value for name, value in changed.items() if value != given[name]}
        keep_changed_values(project, before, list(values))
        project.update_draft(values=current_values(project) | fresh, level=new_level)
        shown_note = note_html(said) if said else ""
        shown_level = gr.skip() if new_level == old_level else new_level
        page = list((given | fresh).values())
        return [shown_note, shown_level, page, *(fresh.get(name, gr.skip()) for name in FORM)]

    inputs, outputs = [seen, *fields], [note, level, seen, *fields]
    bindings.refresh_after(widgets["model.base"].input(chosen, inputs, outputs, **TYPING))


def choose_base(app_state: AppState, values: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """What choosing a base makes of the form.

    A folder full of models is no base: it is remembered, and its models are offered from then on.

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
    if new.problem and (added := _added_folder(app_state, Path(name).expanduser())):
        return added, level, {**values, "model.base": before.name or EMBEDDED}
    if new.facts is None:
        # Needed once its files arrive, to know whose starting values the form holds.
        app_state.project.update_draft(fitted={"base": name, "to": before.name})
        return "", level, values
    # The demo's preset is for the embedded base alone: its rate and precision would be no good start
    # elsewhere.
    new_level = USUAL_LEVEL if level == DEMO and not new.embedded else level
    if not new.embedded:
        app_state.places.keep("bases", name)
    changed = carry_over(
        values, preset_config(goal, level, before.family), preset_config(goal, new_level, new.family)
    )
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
    return f"{pluralize(sum(found.values()), 'model')} found in {folder}: open the list above to choose one."


def base_note(snapshot: Snapshot) -> str:
    """What the chosen base is, and the values it sets in the form."""
    plan = snapshot.plan
    tone = "problem" if plan.base.problem and not plan.base.remote else "small"
    sentences = [plan.base.sentence]
    own = family_differences(plan.goal, plan.level, plan.base.family)
    if own:
        sentences.append(f"For it the preset starts with {', '.join(own)}.")
    trained_at = plan.config.train.resolution
    if plan.base.facts and trained_at and trained_at != plan.base.resolution:
        sentences.append(f"You train it at {trained_at} px.")
    arrived = snapshot.app_state.downloads.arrived
    return render("train/base.html", part="note", tone=tone, text=" ".join(sentences), arrived=arrived)


def download_note(snapshot: Snapshot) -> str:
    """Size and progress of a hub base's download, with its buttons."""
    base = snapshot.plan.base
    if not base.remote:
        return ""
    offer = snapshot.app_state.downloads.offer(base.name)
    found, share, act, text = offer.found, None, None, ""
    if offer.state == "asking":
        text = "Asking the hub how large it is."
    elif found is None:
        act = Act("Try again", {"do": "download-ask"})
    elif offer.state == "downloading":
        share = 100 * offer.here // max(found.size, 1)
        text = f"{format_bytes(offer.here)} of {format_bytes(found.size)}, {share}%"
        act = Act("Cancel", {"do": "download-cancel"})
    else:
        text, act = _describe_offer(found)
    return render("train/base.html", part="download", offer=offer, share=share, text=text, act=act)


def _describe_offer(found: Download) -> tuple[str, Act | None]:
    """What is to be downloaded, and the act that begins it where there is room."""
    here, free = found.here, format_bytes(found.free)
    text = f"{format_bytes(found.size - here)} to download from the hub; {free} are free."
    if here:
        text = f"{format_bytes(here)} of {format_bytes(found.size)} are here already. {text}"
    if not found.fits:
        return f"{text} Make room first, or set HF_HOME to a folder on another drive.", None
    return text, Act("Download the rest" if here else "Download", {"do": "download"})
