"""What a PNG says of how it was made, in the form that A1111 writes and reads: written and read back.

Source of the form: A1111's `infotext_utils.py` and the extra networks' `<lora:name:te:unet>`; "CFG Rescale"
is what its extension CFG_Rescale_webui writes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

LONGEST = 200_000
"""Characters that are looked at; what is longer was not written by a picture tool."""
_SETTING = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_TAG = re.compile(r"<lora:([^<>]+)>")
_NEGATIVE = "Negative prompt:"


@dataclass(frozen=True)
class Tag:
    """An adapter in a prompt: its name and strengths; `text_strength` is None where it is the same."""

    name: str
    strength: float
    text_strength: float | None = None

    def text(self) -> str:
        """`<lora:name:strength>`, or `<lora:name:text encoder:UNet>` where the two differ."""
        name = re.sub(r"[<>:\s]+", " ", self.name).strip()
        if self.text_strength is None or self.text_strength == self.strength:
            return f"<lora:{name}:{self.strength:g}>"
        return f"<lora:{name}:{self.text_strength:g}:{self.strength:g}>"


@dataclass(frozen=True)
class Info:
    """What is said of a picture. What a text does not say is None, or "" where it is words."""

    prompt: str = ""
    negative: str = ""
    steps: int | None = None
    sampler: str = ""
    cfg: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model: str = ""
    clip_skip: int | None = None
    loras: tuple[Tag, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    cfg_rescale: float | None = None

    def text(self) -> str:
        """The text to put into a PNG under `parameters`."""
        lines = [" ".join([self.prompt, *(tag.text() for tag in self.loras)])]
        if self.negative:
            lines.append(f"{_NEGATIVE} {self.negative}")
        size = f"{self.width}x{self.height}" if self.width and self.height else None
        cfg = None if self.cfg is None else f"{self.cfg:g}"
        said = {
            "Steps": self.steps, "Sampler": self.sampler or None, "CFG scale": cfg,
            "CFG Rescale": f"{self.cfg_rescale:g}" if self.cfg_rescale else None, "Seed": self.seed,
            "Size": size, "Model": self.model or None,
            "Clip skip": self.clip_skip if (self.clip_skip or 1) > 1 else None, **self.extra,
        }  # fmt: skip
        lines.append(", ".join(f"{key}: {_quoted(str(v))}" for key, v in said.items() if v is not None))
        return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value.strip()


def parsed(text: str) -> Info:
    """What a text under `parameters` says; a text of another form is all prompt."""
    lines = text[:LONGEST].strip().split("\n")
    found = {}
    settings = _SETTING.findall(lines[-1])
    if len(settings) >= 3:
        lines.pop()
        found = {key.strip(): _unquoted(value) for key, value in settings}
    start = next((n for n, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    prompt = "\n".join(lines[:start])
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).strip()
    tags = tuple(tag for match in _TAG.finditer(prompt) if (tag := _tag(match[1])) is not None)
    width, height = _size(found.get("Size", ""))
    return Info(
        prompt=re.sub(r" ?<lora:[^<>]+>", "", prompt).strip() if tags else prompt.strip(),
        negative=negative, steps=_whole(found.get("Steps")), sampler=_sampler(found),
        cfg=_number(found.get("CFG scale")), cfg_rescale=_number(found.get("CFG Rescale")),
        seed=_whole(found.get("Seed")), width=width, height=height,
        model=found.get("Model", ""), clip_skip=_whole(found.get("Clip skip")), loras=tags, extra=found,
    )  # fmt: skip


def _sampler(found: Mapping[str, str]) -> str:
    """Newer A1111 writes the schedule apart."""
    name, schedule = found.get("Sampler", ""), found.get("Schedule type", "")
    joined = schedule not in ("", "Automatic", "Uniform") and not name.endswith(schedule)
    return f"{name} {schedule}" if joined else name


def _tag(text: str) -> Tag | None:
    positional = [part for part in text.split(":") if "=" not in part]
    named = dict(part.split("=", 1) for part in text.split(":") if "=" in part)
    if not positional or not positional[0].strip():
        return None
    on_text = _number(named.get("te", positional[1] if len(positional) > 1 else "1"))
    if on_text is None:
        return None
    on_unet = _number(named.get("unet", positional[2] if len(positional) > 2 else str(on_text)))
    if on_unet is None:
        return None
    return Tag(positional[0].strip(), on_unet, None if on_text == on_unet else on_text)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if abs(number) < 1e9 else None


def _whole(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"-?\d{1,19}", text.strip()) else None


def _size(text: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"\s*(\d{1,5})\s*x\s*(\d{1,5})\s*", text)
    return (int(match[1]), int(match[2])) if match else (None, None)
