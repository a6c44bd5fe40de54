"""The Dataset tab: import images, browse them, write captions.

The HTML below is fixed; `assets/dataset.js`, `dataset_tools.js` and `dataset_learned.js` draw into it. Gradio
holds only the trigger word, which the Train tab needs.
"""

import gradio as gr

from app.bindings import TYPING, Bindings, edit_events, html_block
from app.dataset.gallery import FindingsView, version_marker
from app.train.form import Plan

FIRST_SEEN = 48
"""Pictures of which the thumbnails are made while an import still shows its bar."""


def build_dataset(bindings: Bindings) -> None:
    """Lay out the tab and wire it."""
    found, project = FindingsView(), bindings.app_state.project
    app_state = bindings.app_state

    def imported() -> None:
        found.html(project, Plan(project))
        app_state.thumbs.prepare([record.path for record in project.dataset().records[:FIRST_SEEN]])

    app_state.importer.after = imported
    with gr.Row(elem_classes="page page-dataset"):
        with gr.Column(elem_classes="main"):
            html_block(DROP)
            with gr.Row(elem_classes="toolbar"):
                html_block(TOOLBAR, elem_classes="grow")
                _trigger(bindings)
                html_block(TRIGGER, elem_classes="beside")
            html_block(WORDS)
            html_block(GRID, elem_id="dataset-grid")
            bindings.follow(
                html_block(elem_classes="after"), lambda snap: found.html(snap.app_state.project, snap.plan)
            )
            html_block(TOOLS, elem_classes="after")
            html_block(LEARNED, elem_classes="after")
            bindings.follow(html_block(), lambda snap: version_marker(snap.app_state.project, snap.plan))
        html_block(DETAIL, elem_classes="side")


def _trigger(bindings: Bindings) -> None:
    project = bindings.app_state.project
    trigger = gr.Textbox(
        label="Trigger word",
        elem_id="trigger",
        elem_classes="inline",
        placeholder="none",
        lines=1,
        max_lines=1,
        scale=0,
        min_width=230,
        interactive=False,
    )
    # Text typed before the draft is loaded would be overwritten by it.
    bindings.fill_on_load(
        trigger, lambda: gr.update(value=project.draft().get("trigger", ""), interactive=True)
    )
    save = gr.on(
        edit_events(trigger), lambda text: project.update_draft(trigger=text.strip()), trigger, None, **TYPING
    )
    bindings.refresh_after(save)
    bindings.trigger = trigger


KINDS = "PNG, JPEG, WebP, HEIC, AVIF, with captions beside them. All stays on this computer."

DROP = f"""<div id="dataset-drop"><div class="grow"><h2>Drop pictures, a folder or a .zip anywhere</h2>
<p class="small">{KINDS}</p></div>
<label class="own button">Choose pictures<input type="file" multiple class="away" id="dataset-upload"></label>
<button type="button" class="own" data-press="folder-input">Choose a folder</button>
<div class="row drop-path">
<label id="dataset-path" class="entry grow"><span class="away">Folder path</span><input type="text"
 placeholder="or the path of a folder or .zip" spellcheck="false" autocomplete="off"></label>
<label class="tick" title="Linked pictures take no room; captions are copied, and the originals stay as they
are"><input type="checkbox" id="dataset-link"> Link, do not copy</label>
<button type="button" class="own" id="dataset-import">Import</button></div></div>
<input type="file" id="folder-input" webkitdirectory hidden aria-hidden="true" tabindex="-1">
<div id="import-note" role="status"></div>"""

TOOLBAR = """<div class="row dataset-filters" id="dataset-filters" hidden>
<div class="seg" role="group" aria-label="Which pictures are shown">
<button type="button" data-filter="all" aria-pressed="true">All <b>0</b></button>
<button type="button" data-filter="bare" aria-pressed="false">No caption <b>0</b></button>
<button type="button" data-filter="small" aria-pressed="false">Small <b>0</b></button>
<button type="button" data-filter="twins" aria-pressed="false">Twins <b>0</b></button>
<button type="button" data-filter="doubt" aria-pressed="false">In doubt <b>0</b></button>
<button type="button" data-filter="held" aria-pressed="false">Held out <b>0</b></button>
<button type="button" data-filter="out" aria-pressed="false">Left out <b>0</b></button></div>
<label class="entry"><span class="away">Show only pictures with this in name or caption</span><input
type="search" id="dataset-search" placeholder="Filter" spellcheck="false"></label></div>"""

GRID = """<div class="grid" role="listbox" aria-multiselectable="true" aria-label="Pictures"
aria-describedby="grid-keys"></div>
<div class="empty" id="grid-empty" hidden></div>
<p class="small" id="grid-keys" hidden><kbd>Arrow keys</kbd> move, <kbd>Enter</kbd> writes the caption,
<kbd>Space</kbd> chooses several, <kbd>Delete</kbd> leaves out.</p>"""

DETAIL = """<aside class="panel detail" id="picture-detail" data-none="1" aria-label="The chosen picture">
<div class="frame" id="picture-big"><img alt="" hidden><div class="crop" hidden></div></div>
<p class="small num" id="picture-facts">Choose a picture to see it large and to write its caption.</p>
<label id="caption">Caption<textarea rows="4" disabled aria-describedby="caption-tokens"
 placeholder="What is in the picture, in words or tags"></textarea></label>
<div class="row apart"><span class="small num" id="caption-tokens"
 title="Counted with the base's own tokenizer, the trigger word in front included"></span>
<span class="row"><button type="button" class="own quiet" id="caption-undo" hidden
 title="Ctrl+Z, also after it was saved">Undo</button><span class="chip" id="caption-state" data-state="saved"
 role="status"></span></span></div>
<p class="small" id="caption-cut" hidden></p>
<div class="twos"><button type="button" class="own" data-step="-1" disabled>Previous</button>
<button type="button" class="own" data-step="1" disabled>Next</button>
<button type="button" class="own" id="hold-out" disabled
 title="Pictures that are held out are not trained on; the run is measured on them">Hold out</button>
<button type="button" class="own" id="leave-out" disabled>Leave out</button></div></aside>"""

TRIGGER = """<button type="button" class="own" id="trigger-propose" hidden
 title="Measures which short words the base hardly reacts to"
 data-tip="Measures which short words the base hardly reacts to">Propose</button>
<button type="button" class="own" id="trigger-to-all"
 title="Writes the trigger word in front of each caption that lacks it; training puts it there in any case"
 hidden>Add to all</button>"""

WORDS = """<div class="panel tight" id="trigger-words" hidden><div class="row apart">
<h3>Words for a trigger</h3><button type="button" class="own quiet" id="trigger-close">Close</button></div>
<div class="row"><span class="small" id="trigger-state" role="status"></span>
<button type="button" class="own quiet" data-insight-cancel="triggers" hidden>Cancel</button></div>
<div id="trigger-found" hidden></div></div>"""

LEARNED = """<details class="panel tight" id="learned" hidden><summary>What will be learned</summary>
<div class="learned">
<section><div class="row"><span class="small" id="learned-state" role="status"></span>
<button type="button" class="own" id="learned-start" hidden>Look at the pictures</button></div>
<div class="list" id="learned-found"></div></section>
<section aria-labelledby="captions-title"><h3 id="captions-title">Captions, as the base reads them</h3>
<div class="row"><button type="button" class="own" id="captions-start"
 data-tip="Measures each picture with its own caption and with those of others">Let the base check the
captions</button>
<span class="small" id="captions-state" role="status"></span>
<button type="button" class="own quiet" data-insight-cancel="captions" hidden>Cancel</button></div>
<div class="list" id="captions-found" hidden></div></section>
<section aria-labelledby="pictures-title"><h3 id="pictures-title">After a run</h3>
<div class="row"><button type="button" class="own" id="pictures-start"
 data-tip="Measures base and LoRA on each picture">Measure each picture</button>
<span class="small" id="pictures-state" role="status"></span>
<button type="button" class="own quiet" data-insight-cancel="pictures" hidden>Cancel</button></div>
<div class="seg" id="pictures-order" role="group" aria-label="Order of the pictures" hidden>
<button type="button" data-learned-order="least" aria-pressed="true">Least learned first</button>
<button type="button" data-learned-order="most" aria-pressed="false">Most learned first</button></div>
<div class="list" id="pictures-found" hidden></div></section>
</div></details>"""

TOOLS = """<div class="tools-row" id="dataset-tools" hidden>
<details class="panel tight" id="bulk"><summary>Bulk edit of captions</summary>
<div class="bulk">
<form class="row" id="bulk-form" autocomplete="off">
<label class="entry"><span>Change</span><select id="bulk-do">
<option value="replace">Find and replace</option><option value="prepend">Put in front</option>
<option value="append">Put at the end</option></select></label>
<label class="entry grow" data-for="replace"><span>Find</span><input type="text"
 id="bulk-find" spellcheck="false"></label>
<label class="entry grow"><span id="bulk-put-title">Replace with</span><input type="text" id="bulk-put"
 spellcheck="false"></label>
<label class="tick" data-for="replace"><input type="checkbox" id="bulk-regex"> Pattern</label>
<label class="tick" data-for="replace"><input type="checkbox" id="bulk-case"> Any case</label></form>
<div id="bulk-preview" role="status"></div>
<div class="row"><button type="button" class="own primary" id="bulk-apply" disabled
 title="Nothing would change yet">Change captions</button>
<button type="button" class="own" id="bulk-undo" hidden>Undo</button><span class="small" id="bulk-said"
 role="status"></span></div>
<div id="bulk-tags"></div></div></details>
<details class="panel tight" id="check"><summary>Check the pictures</summary>
<div id="check-body"><div class="row" id="check-line"><button type="button" class="own"
 id="check-start">Check now</button>
<span class="small" id="check-state" role="status">Finds damaged, tiny, blurred and near-twin pictures, and
bad captions.</span></div><div id="check-found"></div></div></details></div>"""
