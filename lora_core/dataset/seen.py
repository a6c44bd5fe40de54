"""What most pictures of a dataset have in common, told from their pixels without any model.

A few attributes that a thumbnail shows: the colour of a plain background, a frame, brightness, one colour all
over, black and white, one composition. Thresholds are set so that a photo has few of them: what is missed
costs nothing, and what is claimed has to be plain to see.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 24
"""Side of the thumbnail that all is told from, in pixels: a pixel is 4% of the picture."""
BACKGROUND = " background"
"""How names of attributes end that are the colour of a plain background."""
_NEAR = 36
_APART = 48
_LOW_CHROMA, _PLAIN_CHROMA, _VIVID = 8.0, 25.0, 110.0
_DARK, _BRIGHT = 60.0, 205.0
_ALIKE = 0.7
_WEIGHTS = np.array([0.299, 0.587, 0.114])
# Up to which hue, in degrees, a colour has which name.
_HUES = (
    (15, "red"), (42, "orange"), (70, "yellow"), (165, "green"), (195, "turquoise"), (255, "blue"),
    (290, "purple"), (345, "pink"), (361, "red"),
)  # fmt: skip
_ALSO = {
    "turquoise": "cyan teal aqua", "blue": "navy azure sky indigo", "purple": "violet lilac magenta",
    "pink": "magenta rose", "grey": "gray silver", "beige": "cream tan peach sand ivory", "brown": "sepia",
    "orange": "amber sepia", "yellow": "golden gold", "red": "crimson scarlet", "green": "lime emerald",
}  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """Something that pictures can have in common.

    Attributes:
        name: of it, which a caption could say.
        has: how a sentence says that pictures have it: "have a white background".
        words: any one of them in a caption says it.
    """

    name: str
    has: str
    words: frozenset[str]


def thumb(image: Image.Image) -> np.ndarray:
    """What is kept of a picture: (24, 24, 3), 0 to 255."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.uint8)


def attributes(thumbs: Sequence[np.ndarray]) -> dict[Attribute, list[int]]:
    """Each attribute that a picture has, with the indices of all pictures that have it."""
    found: dict[Attribute, list[int]] = {}
    for index, one in enumerate(thumbs):
        for attribute in _of_one(one.astype(np.float64)):
            found.setdefault(attribute, []).append(index)
    same = _same_composition(thumbs)
    if same:
        words = "centered centred centre center close-up closeup portrait headshot profile front side above"
        words += " full-body middle symmetrical"
        found[_attribute("composition", "share one composition", words)] = same
    return found


def _of_one(image: np.ndarray) -> list[Attribute]:
    chroma = image.max(-1) - image.min(-1)
    mean, luma = float(chroma.mean()), float((image @ _WEIGHTS).mean())
    found = [_edge(image)]
    if mean < _LOW_CHROMA:
        words = "monochrome greyscale grayscale black-and-white b&w bw grey gray sketch pencil ink lineart"
        found.append(_attribute("black and white", "are black and white", words))
    elif mean > _VIVID:
        words = "vivid saturated colorful colourful bright vibrant neon"
        found.append(_attribute("vivid colours", "have vivid colours", words))
    if luma < _DARK:
        words = "dark night dim shadow shadows low-key black evening"
        found.append(_attribute("dark", "are dark", words))
    elif luma > _BRIGHT:
        words = "bright light high-key sunny white pale overexposed"
        found.append(_attribute("bright", "are bright", words))
    if mean >= _PLAIN_CHROMA and (hue := _one_hue(image, chroma)):
        found.append(_attribute(f"{hue} colours", f"are mostly {hue}", f"{hue} {_ALSO.get(hue, '')}"))
    return [attribute for attribute in found if attribute is not None]


def _attribute(name: str, has: str, words: str) -> Attribute:
    return Attribute(name, has, frozenset(words.split()))


def _edge(image: np.ndarray) -> Attribute | None:
    """A frame, or a plain background, by the pixels along the edge."""
    middle = np.median(_ring(image, 0), axis=0)

    def near(depth: int, apart: float) -> float:
        return float((np.abs(_ring(image, depth) - middle).max(-1) <= apart).mean())

    if near(0, _NEAR) < 0.8:
        return None
    for depth in range(1, 4):
        if near(depth, _APART) < 0.15:
            return _attribute("frame", "have a frame", "frame framed border bordered polaroid vignette")
    if near(1, _NEAR) < 0.8:
        return None
    colour = colour_name(middle)
    words = f"background backdrop plain blank {colour} {_ALSO.get(colour, '')}"
    return _attribute(colour + BACKGROUND, f"have {_article(colour)} {colour} background", words)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _ring(image: np.ndarray, depth: int) -> np.ndarray:
    """The pixels that are `depth` from the edge, (n, 3)."""
    inner = image[depth : SIDE - depth, depth : SIDE - depth]
    return np.concatenate([inner[0], inner[-1], inner[1:-1, 0], inner[1:-1, -1]])


def colour_name(colour: np.ndarray) -> str:
    """The name of an RGB colour of 0 to 255."""
    value, chroma = float(colour.max()), float(colour.max() - colour.min())
    if value < 50:
        return "black"
    saturation = chroma / value
    if saturation < 0.12:
        return "white" if value > 225 else "grey"
    hue = float(_hue(colour[None])[0])
    if 15 <= hue < 70:
        if saturation < 0.45 and value > 200:
            return "beige"
        if hue < 42 and value < 140:
            return "brown"
    return _named(hue)


def _named(hue: float) -> str:
    return next(name for most, name in _HUES if hue < most)


def _hue(colours: np.ndarray) -> np.ndarray:
    """Hues in degrees of (n, 3) colours; 0 for greys."""
    red, green, blue = colours.T
    top, chroma = colours.max(-1), np.maximum(colours.max(-1) - colours.min(-1), 1e-9)
    sector = np.where(
        top == red,
        (green - blue) / chroma % 6,
        np.where(top == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    hues: np.ndarray = 60 * sector % 360
    return hues


def _one_hue(image: np.ndarray, chroma: np.ndarray) -> str:
    """The colour that 70% of all colourfulness is within 30 degrees of, or ""."""
    weights, hues = chroma.ravel(), _hue(image.reshape(-1, 3))
    centres = np.arange(0, 360, 10)
    apart = np.abs((hues[None] - centres[:, None] + 180) % 360 - 180)
    inside = ((apart <= 30) * weights).sum(-1)
    best = int(inside.argmax())
    if inside[best] < 0.7 * weights.sum():
        return ""
    angles = np.radians(hues[apart[best] <= 30])
    mean = (np.exp(1j * angles) * weights[apart[best] <= 30]).sum()
    return _named(float(np.degrees(np.angle(mean)) % 360))


def _same_composition(thumbs: Sequence[np.ndarray]) -> list[int]:
    """The pictures whose light and dark lie as in the mean of all others."""
    if len(thumbs) < 3:
        return []
    blocks = np.array([one.astype(np.float64) @ _WEIGHTS for one in thumbs]).reshape(-1, 8, 3, 8, 3)
    flat = blocks.mean((2, 4)).reshape(len(thumbs), -1)
    flat -= flat.mean(-1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-9)
    total = flat.sum(0)
    return [
        index
        for index, one in enumerate(flat)
        if float(one @ (total - one)) >= _ALIKE * max(float(np.linalg.norm(total - one)), 1e-9)
    ]


def colour_of_word(word: str) -> str:
    """The colour that a word is a name of, "" where it is none."""
    names = {name for _, name in _HUES} | {"black", "white", "grey", "beige", "brown"}
    return word if word in names else next((n for n, also in _ALSO.items() if word in also.split()), "")


def background_colours(found: dict[Attribute, list[int]], pictures: int) -> list[str]:
    """The colour of each picture's plain background, "" where it has none."""
    colours = [""] * pictures
    for attribute, members in found.items():
        if attribute.name.endswith(BACKGROUND):
            for index in members:
                colours[index] = attribute.name.removesuffix(BACKGROUND)
    return colours
