"""The "Look inside any LoRA" card of the Export tab. Its lists are filled by inside.js, which asks the
window."""

from app.export.inside import TOOLS, Tool
from app.words import safe
from lora_core.spec.choices import FORMATS

EMPTY = (
    '<div class="empty"><h3>Nothing looked at yet</h3><p class="small">Choose a LoRA, of a run or from'
    " anywhere, and a tool. Spectrum is a good first look: it says how many of the file's directions do"
    " something.</p></div>"
)


def inside_card() -> str:
    """The whole card."""
    return (
        '<section id="inside" class="card" aria-labelledby="inside-title"><div><h2 id="inside-title">Look'
        ' inside any LoRA</h2><p class="small">What low rank did in it, and better files made of it. Nothing'
        " in a file is run, and none is changed: what is made is a new file.</p></div><div"
        f' class="inside-cols"><div class="inside-side">{_files()}<div class="tools-list" role="group"'
        f' aria-label="Tools">{"".join(_tool(key, tool) for key, tool in TOOLS.items())}</div></div><div'
        f' class="inside-main">{_form()}<div id="inside-answer"'
        f' aria-live="polite">{EMPTY}</div></div></div></section>'
    )


def _files() -> str:
    return (
        '<div><h3>LoRA files</h3><div id="inside-files"></div><button type="button" class="own quiet"'
        ' id="inside-add">Add another file</button></div>'
    )


def _tool(key: str, tool: Tool) -> str:
    low, high = tool.files
    return (
        f'<button type="button" class="own tool" data-tool="{key}" data-low="{low}" data-high="{high}"'
        f' data-needs="{" ".join(tool.needs)}" data-go="{tool.go}"'
        f' aria-pressed="false"><b>{safe(tool.title)}</b><span'
        f' class="small">{safe(tool.line)}</span></button>'
    )


def _form() -> str:
    """The fields of all tools; inside.js shows those that the chosen one needs."""
    formats = "".join(f'<option value="{key}">{safe(row.title)}</option>' for key, row in FORMATS.items())
    return """<form id="inside-form" class="inside-form" autocomplete="off">
<label class="entry" data-field="tuned" hidden>Fine-tuned model<input id="inside-tuned" type="text"
 placeholder="path of a .safetensors file or a diffusers folder" spellcheck="false"></label>
<label class="entry" data-field="measure" hidden>Measure on<select id="inside-measure"></select></label>
<label class="entry" data-field="dataset" hidden>Folder of pictures<input id="inside-dataset" type="text"
 placeholder="pictures with captions that it was not trained on" spellcheck="false"></label>
<label class="entry" data-field="base" hidden>Base<select id="inside-base"></select></label>
<label class="entry" data-field="other-base" hidden>Path of the base<input id="inside-other-base" type="text"
 spellcheck="false"></label>
<label class="entry" data-field="by" hidden>Keep<select id="inside-by"><option value="rank">a rank</option>
<option value="energy">a share of the energy</option></select></label>
<label class="entry" data-field="rank" hidden>Rank<input id="inside-rank"
 type="text" inputmode="numeric" value="8"></label>
<label class="entry" data-field="energy" hidden>Percent of the energy<input id="inside-energy" type="text"
 inputmode="decimal" value="99"></label>
<label class="entry" data-field="blocks" hidden>Weights of blocks<input id="inside-blocks" type="text"
 spellcheck="false" placeholder="mid_block=0.5, up_blocks.1=[1, 0]"></label>
<label class="entry" data-field="format" hidden>Format<select id="inside-format">@FORMATS@</select></label>
<label class="tick" data-field="alphas" hidden><input id="inside-alphas" type="checkbox">Keep an alpha for
 each layer</label>
<label class="tick" data-field="apart" hidden><input id="inside-apart" type="checkbox">UNet and text encoders
 apart</label>
<div class="row"><button type="submit" class="own primary" id="inside-go">Look</button>
<button type="button" class="own" id="inside-cancel" hidden>Cancel</button>
<span class="small" id="inside-why"></span>
<span class="small num" id="inside-state" role="status" data-state="idle"></span></div>
<div class="track" id="inside-track" hidden><i style="width: 0"></i></div>
</form>""".replace("@FORMATS@", formats)
