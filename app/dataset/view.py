"""The Dataset tab: import images, browse them, write captions.

The templates are fixed but for `status.html` and `summary.html`; `assets/dataset.js`, `dataset_tools.js` and
`dataset_learned.js` draw into them, `mask.js` over the large image. Gradio holds only the trigger
word, which the Train tab needs.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import jinja2
from fastapi import FastAPI, Request
from fastapi.responses import Response

from app.dataset.findings import ANNOTATORS, BY_ITSELF, DatasetInsights, plan_training
from app.dataset.gallery import DatasetSummary, gallery_data, gallery_version, page_versions
from app.dataset.uploads import Importer
from app.routes import Answer, BadRequest, Sent, add_actions, add_reads, image_url, too_many
from app.state import AppState, Bindings, Snapshot
from app.templates import TYPING, _, edit_events, html_block, note_html, render, text_field
from app.train.form import Plan
from lora_core.data.audit import concept_rows
from lora_core.data.captions import count_tags
from lora_core.data.concepts import edit_concept, parse_concepts, propose_concepts, read_concept_file
from lora_core.errors import DatasetError
from lora_core.projects import caption_edits as bulk
from lora_core.projects.project import Project, leave_out, list_left_out, move_images, take_back
from lora_core.system.files import DEMO_TRAIN

MOST_NAMES = 100_000
INTENDED = ("named", "wording")
"""Kinds of what will be learned that are as they should be."""
FIRST_SEEN = 48
"""Images of which the thumbnails are made while an import still shows its bar."""
FILTERS = (
    ("all", "All"), ("bare", "Uncaptioned"), ("small", "Too small"), ("twins", "Duplicates"),
    ("doubt", "In doubt"), ("held", "Validation"), ("out", "Excluded"),
)  # fmt: skip


def build_dataset(bindings: Bindings) -> None:
    """Lay out the tab and wire it."""
    app_state, summary = bindings.app_state, DatasetSummary()
    project = app_state.project

    def imported() -> None:
        summary.read(project, Plan(project))
        app_state.thumbs.prepare([record.path for record in project.dataset().records[:FIRST_SEEN]])

    def status(snapshot: Snapshot) -> str:
        shown = summary.read(project, snapshot.plan) | page_versions(project, snapshot.plan)
        return render("dataset/status.html", **shown)

    app_state.importer.after = imported
    with gr.Row(elem_classes="page page-dataset"):
        with gr.Column(elem_classes="main"):
            html_block(lambda: render("dataset/import.html"))
            _welcome(bindings)
            bindings.follow(html_block(elem_id="dataset-notes"), status)
            with gr.Row(elem_classes="toolbar"):
                html_block(lambda: render("dataset/toolbar.html", filters=FILTERS), elem_classes="grow")
                _trigger(bindings)
                html_block(lambda: render("dataset/trigger.html"), elem_classes="beside")
            html_block(lambda: render("dataset/words.html"))
            html_block(lambda: render("dataset/tools.html", hows=bulk.HOWS, mask_hows=bulk.MASK_HOWS))
            html_block(lambda: render("dataset/grid.html"), elem_id="dataset-grid")
        html_block(lambda: render("dataset/detail.html"), elem_classes="side")
    bindings.follow(
        html_block(elem_classes="foot"),
        lambda snap: render("dataset/summary.html", **summary.read(project, snap.plan)),
    )


def _welcome(bindings: Bindings) -> None:
    """The demo, offered on the first visit."""
    drawings = sorted(f"train/{file.name}" for file in DEMO_TRAIN.glob("*.png"))
    with gr.Row(elem_id="welcome", visible=False) as row:
        values = {"drawings": drawings[::3], "count": len(drawings)}
        html_block(lambda: render("dataset/welcome.html", **values), elem_classes="grow")
        bindings.use_demo = gr.Button("Try the demo", elem_id="use-demo", min_width=0, scale=0)
    bindings.follow(row, lambda snap: gr.update(visible=snap.app_state.is_new()))


def _trigger(bindings: Bindings) -> None:
    project = bindings.app_state.project
    options: dict[str, Any] = {"elem_classes": "inline", "scale": 0, "min_width": 230}
    trigger = text_field("Trigger word", "trigger", "none", interactive=False, **options)
    # Text typed before the draft is loaded would be overwritten by it.
    bindings.fill_on_load(
        trigger, lambda: gr.update(value=project.draft().get("trigger", ""), interactive=True)
    )
    gr.on(
        edit_events(trigger), lambda text: project.update_draft(trigger=text.strip()), trigger, None, **TYPING
    )
    bindings.trigger = trigger


def add_dataset_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`; images are data, so that saving a caption costs a few hundred bytes."""
    project, importer = app_state.project, app_state.importer
    checker, insights = app_state.checker, app_state.insights
    app_state.live.feeds |= {
        "import": importer.state, "check": checker.progress, "insights": insights.progress,
    }  # fmt: skip

    def check(sent: dict[str, Any]) -> dict[str, Any]:
        if sent.get("do") == "cancel":
            checker.cancel()
        elif not sent.get("by_itself") or len(project.dataset().records) <= BY_ITSELF:
            checker.start()
        return checked(app_state)

    def measure(sent: dict[str, Any]) -> dict[str, Any]:
        what = str(sent.get("what", ""))
        if sent.get("do") == "cancel":
            insights.cancel(what)
        else:
            insights.begin(what, sent, _names(sent) if "pictures" in sent else None)
        return measured(app_state)

    def count_all_tags() -> dict[str, Any]:
        found = count_tags(record.caption for record in project.dataset().records)
        html = render("dataset/tags.html", tags=list(found.items()))
        return {"tags": list(found.items()), "undo": bulk.last_change(project), "html": html}

    app_state.list_images = _listing(app_state)
    add_reads(
        app,
        {
            "dataset": app_state.list_images,
            "tags": count_all_tags,
            "concepts": lambda: _concepts(project),
            "check": lambda: checked(app_state),
            "insights": lambda: measured(app_state),
        },
    )
    add_actions(
        app,
        {
            **_image_actions(project),
            "import": functools.partial(_import, importer),
            "upload": lambda sent: {"batch": importer.begin()},
            "bulk": functools.partial(_edit_captions, project, insights),
            "bulk/undo": lambda sent: _undo_edit(project),
            "move": lambda sent: {"back": move_images(project, _folders(sent))},
            "concepts": lambda sent: project.change_concepts(_concepts_change(project, sent)),
            "check": check,
            "insights": measure,
        },
    )

    _add_uploads(app, importer)


def _listing(app_state: AppState) -> Callable[[], bytes]:
    """`gallery_data` as JSON, kept until it changes: of 20,000 images it is 6 MB."""
    project, known = app_state.project, None

    def read() -> bytes:
        nonlocal known
        with app_state.listing:
            plan, dataset = Plan(project), project.dataset()
            inputs = (gallery_version(project, plan), list_left_out(project))
            # The same object: a file's time, which is in its URL, is not compared.
            if known is None or known[0] is not dataset or known[1] != inputs:
                known = (dataset, inputs, bytes(Answer(gallery_data(project, plan)).body))
            return known[2]

    return read


def _image_actions(project: Project) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    def hold_out(sent: dict[str, Any]) -> dict[str, Any]:
        project.hold_out(_names(sent), bool(sent.get("on")))
        return {"revision": project.revision}

    def mask(sent: dict[str, Any]) -> dict[str, Any]:
        name = str(sent.get("picture", ""))
        written = project.write_mask(name, sent.get("png"), str(sent.get("put_back", "")))
        left = getattr(project.images().get(name), "mask", None) is not None
        return {**written, "left": left, "revision": project.revision}

    return {
        "leave-out": lambda sent: {"left_out": leave_out(project, _names(sent))},
        "take-back": lambda sent: {"taken_back": take_back(project, _names(sent))},
        "hold-out": hold_out,
        "crop": lambda sent: {"before": project.crop(str(sent.get("picture", "")), sent.get("box"))},
        "mask": mask,
    }


def _concepts(project: Project) -> dict[str, Any]:
    """The table of concepts, as HTML."""
    plan, dataset = Plan(project), project.dataset()
    rows = concept_rows(dataset, plan_training(plan, dataset))
    values = {
        "rows": rows, "listed": any(row["number"] for row in rows), "loose": len(dataset.loose),
        "fixed": project.uses_demo, "trigger": plan.trigger,
        "problems": [one.sentence for one in dataset.problems if one.kind == "concepts"],
    }  # fmt: skip
    return {"html": render("dataset/concepts.html", **values)}


def _concepts_change(project: Project, sent: dict[str, Any]) -> Callable[[Path], str]:
    """The text that a page asks for: made of the folders, edited, or as it was before."""
    do, number, value = sent.get("do"), sent.get("number"), sent.get("value")

    def change(folder: Path) -> str:
        if do == "make":
            return propose_concepts(project.dataset(), folder)
        if do != "restore":
            named = {
                one.number: one.name for one in parse_concepts(read_concept_file(folder), folder).concepts
            }
            if "was" in sent and (type(number) is not int or named.get(number) != sent["was"]):
                raise DatasetError(_("dataset.toml was changed since; nothing was changed."))
            return edit_concept(folder, number if type(number) is int else 0, str(sent.get("key")), value)
        if read_concept_file(folder) != sent.get("now"):
            raise DatasetError(_("dataset.toml was changed since; nothing was taken back."))
        return str(sent.get("text", ""))

    return change


def _findings(app_state: AppState, part: str, **values: Any) -> str:
    project = app_state.project
    url = functools.partial(image_url, "dataset", project.dataset_folder)
    shown = {"images": project.images(), "url": url, "fixed": project.uses_demo, **values}
    return render("dataset/findings.html", part=part, **shown)


def checked(app_state: AppState) -> dict[str, Any]:
    """The state of the check and the `parts` of the page that show it; once it is done also the number of
    `things` to look at and the images that are `twins`."""
    state, images = app_state.checker.state(), app_state.project.images()

    def is_there(row: dict[str, Any]) -> bool:
        # Images removed since are no longer a problem.
        if row["kind"] == "twins":
            return row["picture"] in images and row["twin"] in images
        return state["fresh"] or not row["picture"] or row["picture"] in images

    found = list(filter(is_there, state.get("problems", ())))
    show = functools.partial(_findings, app_state, now=state, found=found)
    parts = {part: show(part) for part in ("check-line", "learned-line")}
    if state["state"] != "done":
        return state | {"parts": parts}
    phrases = [row | {"kind": "phrase"} for row in found if row["kind"] == "common phrase"]
    learned = [*state["learned"], *phrases]
    notes = 0 if app_state.project.uses_demo else sum(row["kind"] not in INTENDED for row in learned)
    return state | {
        "things": len(found),
        "twins": [name for row in found if row["kind"] == "twins" for name in (row["picture"], row["twin"])],
        "parts": parts
        | {
            "issues": show("issues", learned=learned),
            "check-found": show("check"),
            "check-title": _("Issues ({count})", count=len(found)) if found else _("Check the images"),
            "learned-found": show("learned", found=learned, shares=state["shares"]),
            "learned-title": _("What will be learned") + (f" ({notes})" if notes else ""),
        },
    }


def measured(app_state: AppState) -> dict[str, Any]:
    """What the base and the last run say of the images: each with a `line` and what was `found` as HTML; of
    images also sorted by gain, `most`."""
    states, html = app_state.insights.state(), {}
    for what, now in states.items():
        html[what] = {"line": _findings(app_state, "line", what=what, now=now), "found": "", "most": ""}
        if what in ANNOTATORS:
            # The texts and masks of many images are for the preview of the edit alone.
            now |= {
                "asked": app_state.insights.asked(what),
                "found": len(now.get("found", {}).get("texts", ())),
            }
        elif "found" in now:
            # Results of an older version may lack newer fields.
            try:
                for order in ("found", "most") if what == "pictures" else ("found",):
                    html[what][order] = _findings(app_state, what, now=now, most=order == "most")
            except (jinja2.UndefinedError, TypeError):
                html[what]["found"] = note_html(_("This was found by another version; measure again."))
    return {**states, "html": html}


def _import(importer: Importer, sent: dict[str, Any]) -> dict[str, Any]:
    if sent.get("do") == "cancel":
        importer.cancel()
    else:
        importer.from_path(str(sent.get("path", "")), bool(sent.get("link")))
    return importer.state()


def _add_uploads(app: FastAPI, importer: Importer) -> None:
    @app.put("/easel/upload/{batch}")
    async def receive(batch: str, request: Request) -> Response:
        return Answer({"received": await importer.receive(batch, request.stream())})

    @app.post("/easel/upload/{batch}")
    def finish(batch: str, sent: Sent) -> Response:
        if sent.get("give_up"):
            importer.give_up(batch)
            return Answer({"given_up": True})
        importer.finish(batch)
        return Answer(importer.state())


def _edit_captions(project: Project, insights: DatasetInsights, sent: dict[str, Any]) -> dict[str, Any]:
    only = set(_names(sent)) if "pictures" in sent else None
    do, put = str(sent.get("do", "")), str(sent.get("put", ""))
    if do == "trigger":
        put = put.strip() or Plan(project).trigger
        if not put:
            raise DatasetError(_("No trigger word yet; type one first."))
    if do in ANNOTATORS:
        edit = insights.annotate(do, Plan(project).trigger)
    else:
        how = bool(sent.get("regex")), bool(sent.get("any_case"))
        edit = bulk.Edit(do, str(sent.get("find", "")), put, *how)
    if not sent.get("apply"):
        found = bulk.preview(project, edit, only)
        html = render("dataset/changes.html", do=do, only=only, **found)
        return {"changed": found["changed"], "parts": {"bulk-preview": html}}
    return {"changed": bulk.apply(project, edit, only), "undo": bulk.last_change(project)}


def _undo_edit(project: Project) -> dict[str, Any]:
    masks = bulk.undoes_masks(project)
    done, kept = bulk.undo(project)
    return {"undone": done, "kept": kept, "masks": masks, "undo": bulk.last_change(project)}


def _sent(sent: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(sent.get(key), kind):
        raise BadRequest(f"no {key}")
    if len(sent[key]) > MOST_NAMES:
        raise too_many()
    return sent[key]


def _names(sent: dict[str, Any]) -> list[str]:
    return [*map(str, _sent(sent, "pictures", list))]


def _folders(sent: dict[str, Any]) -> dict[str, str]:
    return {name: str(folder) for name, folder in _sent(sent, "folders", dict).items()}
