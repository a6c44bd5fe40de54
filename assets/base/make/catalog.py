"""What the base is taught: things, drawing styles, background colours, and how a caption names them.

Every script of this folder and `assets/demo/make.py` read these tables, so that a prompt, a check image
and a training caption can never disagree about a name or a colour.
"""

import random

SIDE = 128
"""Width and height of every image, in pixels."""

# Name in the caption -> label in emojibase, where the two differ.
# Chosen to be told apart at 128 pixels: one big cat, one bear, one crustacean, one round fruit of a kind.
THINGS: dict[str, str] = {
    # animals
    "fox": "fox",
    "lion": "lion",
    "panda": "panda",
    "koala": "koala",
    "rabbit": "rabbit face",
    "pig": "pig face",
    "monkey": "monkey face",
    "dog": "dog face",
    "elephant": "elephant",
    "giraffe": "giraffe",
    "unicorn": "unicorn",
    "hedgehog": "hedgehog",
    "owl": "owl",
    "penguin": "penguin",
    "flamingo": "flamingo",
    "parrot": "parrot",
    "rooster": "rooster",
    "frog": "frog",
    "turtle": "turtle",
    "snake": "snake",
    "dinosaur": "T-Rex",
    "whale": "spouting whale",
    "octopus": "octopus",
    "crab": "crab",
    "snail": "snail",
    "butterfly": "butterfly",
    "bee": "honeybee",
    "ladybug": "lady beetle",
    # plants
    "mushroom": "mushroom",
    "cactus": "cactus",
    "sunflower": "sunflower",
    "rose": "rose",
    "palm tree": "palm tree",
    "christmas tree": "Christmas tree",
    # food
    "apple": "red apple",
    "banana": "banana",
    "strawberry": "strawberry",
    "watermelon": "watermelon",
    "pineapple": "pineapple",
    "cherry": "cherries",
    "grapes": "grapes",
    "lemon": "lemon",
    "avocado": "avocado",
    "carrot": "carrot",
    "corn": "ear of corn",
    "eggplant": "eggplant",
    "pizza": "pizza",
    "hamburger": "hamburger",
    "french fries": "french fries",
    "doughnut": "doughnut",
    "ice cream": "soft ice cream",
    "cake": "birthday cake",
    # vehicles and places
    "rocket": "rocket",
    "sailboat": "sailboat",
    "tractor": "tractor",
    "car": "automobile",
    "bicycle": "bicycle",
    "house": "house",
    "castle": "castle",
    "tent": "tent",
    "volcano": "volcano",
    # objects
    "snowman": "snowman without snow",
    "umbrella": "umbrella",
    "balloon": "balloon",
    "guitar": "guitar",
    "drum": "drum",
    "key": "key",
    "crown": "crown",
    "light bulb": "light bulb",
    "soccer ball": "soccer ball",
    "pumpkin": "jack-o-lantern",
    "robot": "robot",
}

# Name in the caption -> the icon set that draws that way.
STYLES: dict[str, str] = {"noto": "noto", "fluent": "fluent-emoji", "twemoji": "twemoji"}

# Far enough apart to be named at sight, and deep or pale enough to set off the bright colours of the things.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "grey": (148, 150, 155),
    "red": (188, 26, 38),
    "orange": (250, 148, 44),
    "yellow": (252, 222, 92),
    "green": (66, 150, 84),
    "sky blue": (140, 204, 244),
    "navy": (32, 46, 108),
    "purple": (126, 82, 178),
    "pink": (248, 170, 200),
    "brown": (112, 72, 46),
}

WHITE_SHARE = 0.2
"""Share of training images on white, the commonest background of real data sets."""


def caption(thing: str, style: str | None = None, background: str | None = None) -> str:
    """Returns e.g. `owl, noto style, on a white background`, leaving out the parts that are None."""
    parts = [thing]
    if style:
        parts.append(f"{style} style")
    if background:
        article = "an" if background[0] in "aeiou" else "a"
        parts.append(f"on {article} {background} background")
    return ", ".join(parts)


def training_caption(thing: str, style: str, background: str, chance: random.Random) -> str:
    """Returns a caption with parts left out at random, so that short prompts work too.

    Half of the captions are whole, 10% are empty (the unconditional half of classifier-free guidance),
    5% are the bare name, and the others lack style or background.
    """
    draw = chance.random()
    if draw < 0.10:
        return ""
    if draw < 0.15:
        return caption(thing)
    if draw < 0.325:
        return caption(thing, style=style)
    if draw < 0.50:
        return caption(thing, background=background)
    return caption(thing, style, background)


def drawn_triples(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Returns `count` different (thing, style, background) drawn by the seed from all that is taught."""
    every = [(thing, style, ground) for thing in THINGS for style in STYLES for ground in BACKGROUNDS]
    return random.Random(seed).sample(every, count)
