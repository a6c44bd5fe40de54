"""The Preview tab: a prompt, a strength, base and LoRA under one slider."""

import dataclasses
import functools
import random
from pathlib import Path
from typing import Any

import gradio as gr

from app.loras import found_loras, owner
from app.moment import Moment, moment_of
from app.parts import QUIET, TYPING, Parts, edited, piece
from app.plan import Plan
from app.stage import DEMO_PROMPT, stage, state_line, strip
from app.studio import MOST_RECENT, Scene
from lora_core.spec.choices import SAMPLERS

TITLE = "Preview"
LARGEST_SEED = 2**32 - 1


def build(parts: Parts) -> None:
    """Lay out the tab and wire it."""
    with gr.Row(elem_classes="page page-preview"):
        with gr.Column(elem_classes="side card"):
            fields, strength = _form(parts)
            draw = gr.Button("Generate", variant="primary", elem_id="generate", elem_classes="big")
            parts.live(piece(), state_line)
            piece(
                '<p class="small">Ctrl+Enter draws too. Same noise with and without the LoRA; the base stays'
                " loaded, so a new strength needs no reload.</p>"
            )
        with gr.Column(elem_classes="main"):
            with gr.Column(elem_classes="card"):
                piece("<h2>Base against LoRA</h2>")
                parts.live(piece(elem_id="stage"), stage)
            parts.live(piece(elem_id="strength-strip"), strip)
    _wire(parts, fields, strength, draw)


def _form(parts: Parts) -> tuple[dict[str, Any], Any]:
    made: dict[str, Any] = {}
    made["prompt"] = gr.Textbox(label="Prompt", elem_id="prompt", lines=3, max_lines=8)
    made["negative"] = gr.Textbox(label="Negative prompt", elem_id="negative", lines=1, max_lines=4)
    made["lora"] = gr.Dropdown(
        label="LoRA",
        elem_id="preview-lora",
        allow_custom_value=True,
        info="One of your runs, or the path of a .safetensors file.",
        elem_classes="tip",
    )
    strength = gr.Slider(0, 1.5, value=1.0, step=0.05, label="LoRA strength", elem_id="strength")
    with gr.Row(elem_classes="pair"):
        samplers = [(row.title, key) for key, row in SAMPLERS.items()]
        made["sampler"] = gr.Dropdown(samplers, label="Sampler", elem_id="sampler")
        made["steps"] = gr.Number(label="Sampler steps", precision=0, elem_id="sampler-steps")
    with gr.Row(elem_classes="pair"):
        made["cfg"] = gr.Number(label="Guidance", step=0.5, elem_id="cfg")
        with gr.Row(elem_classes="with-dice"):
            made["seed"] = gr.Number(label="Seed", precision=0, elem_id="seed")
            dice = gr.Button("New", elem_id="dice", min_width=0, scale=0)
    for name, field in made.items():
        if name != "lora":
            parts.fill(field, functools.partial(_kept_value, parts, name))
    parts.fill(strength, functools.partial(_kept_value, parts, "strength"))
    parts.live(made["lora"], lambda m: _lora_choices(parts, m))
    parts.action(dice.click(lambda: random.randrange(2**31), None, made["seed"], **QUIET))
    return made, strength


def _kept(parts: Parts) -> dict[str, Any]:
    """The tab's part of the draft, over what suits the shown run."""
    draft = parts.desk.project.draft().get("preview") or {}
    watch = parts.desk.jobs.current()
    preview = Plan(parts.desk.project).config.preview
    usual = {
        "sampler": preview.sampler,
        "steps": preview.steps,
        "cfg": preview.cfg,
        "seed": 1234,
        "strength": 1.0,
    }
    usual |= {"prompt": "", "negative": ""}
    if parts.desk.project.uses_demo:
        usual["prompt"] = DEMO_PROMPT
    elif watch is not None and watch.progress.previews and watch.progress.previews[0].prompts:
        usual["prompt"] = watch.progress.previews[0].prompts[0]
    return {**usual, **{name: value for name, value in draft.items() if value not in (None, "")}}


def _kept_value(parts: Parts, name: str) -> Any:
    return _kept(parts)[name]


def _lora_choices(parts: Parts, moment: Moment) -> Any:
    """The runs' files; the newest is chosen until the person chooses."""
    found = found_loras(moment)
    kept = parts.desk.project.draft().get("preview_lora") or ""
    choices = [(one.title, str(one.file)) for one in found]
    files = [file for _, file in choices]
    value = kept if kept in files or (kept and Path(kept).is_file()) else files[0] if files else None
    return gr.update(
        choices=[*choices, ("None, the base alone", "")], value=value if value is not None else ""
    )


def _wire(parts: Parts, fields: dict[str, Any], strength: Any, draw: Any) -> None:
    desk = parts.desk
    names = list(fields)

    def typed(*values: Any) -> None:
        given = dict(zip([*names, "strength"], values, strict=True))
        desk.project.keep(preview={name: value for name, value in given.items() if name != "lora"})

    def lora_chosen(file: str | None) -> None:
        desk.project.keep(preview_lora=file or "")

    def generate(*values: Any) -> None:
        typed(*values)
        given = dict(zip([*names, "strength"], values, strict=True))
        desk.studio.want(scene_of(moment_of(desk), given), float(given["strength"] or 0.0))

    def slid(value: float) -> None:
        desk.studio.look_at(float(value))

    def put_back(index: int) -> list[Any]:
        recent = desk.studio.view().recent
        if index >= len(recent):
            return [gr.skip() for _ in every]
        one = recent[index]
        desk.studio.want(one.scene, one.strength)
        values = {**dataclasses.asdict(one.scene), "strength": one.strength}
        desk.project.keep(
            preview_lora=one.scene.lora, preview={n: values[n] for n in [*names, "strength"] if n != "lora"}
        )
        return [values[name] for name in [*names, "strength"]]

    every = [*fields.values(), strength]
    for index in range(MOST_RECENT):
        slot = gr.Button("Put its settings back", elem_id=f"recent-{index}", visible="hidden")
        parts.action(slot.click(functools.partial(put_back, index), None, every, **QUIET))
    inputs = [event for name in names if name != "lora" for event in edited(fields[name])]
    gr.on([*inputs, strength.release], typed, every, None, **TYPING)
    parts.action(fields["lora"].input(lora_chosen, fields["lora"], None, **QUIET))
    parts.action(draw.click(generate, every, None, **TYPING))
    parts.action(strength.input(slid, strength, None, **TYPING))


def scene_of(moment: Moment, given: dict[str, Any]) -> Scene:
    """The scene that the form asks for; the base is the one that the LoRA was trained on."""
    file = str(given["lora"] or "")
    watch = owner(moment, file) if file else None
    config = (watch.config() if watch else None) or moment.plan.config
    return Scene(
        base=config.model.base,
        lora=file,
        prompt=str(given["prompt"] or ""),
        negative=str(given["negative"] or ""),
        seed=int(given["seed"] or 0) % (LARGEST_SEED + 1),
        steps=max(1, min(200, int(given["steps"] or 20))),
        cfg=max(1.0, min(30.0, float(given["cfg"] or 1.0))),
        sampler=str(given["sampler"] or "ddim"),
        prediction=config.model.prediction,
        vae=config.model.vae,
        clip_skip=config.train.clip_skip,
        tokens=config.train.tokens,
    )
