"""In what terms the rules of the tools that read adapter files are written down; `tools.py` holds the
rules."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """How a tool's files call the layers of a part.

    Attributes:
        part: "unet", "text_encoder", "text_encoder_2".
        form: the name, with {path} (diffusers' dotted path), {flat} (with underscores), {ldm} and {ldm_flat}
            (the original name), {bare} (without `text_model.`), {older} (q_proj as to_q, to_out.0 as to_out)
            and {processor} (that below `.processor.`).
        paths: a regular expression for the paths that have such a name; "" for all.
        encoders: how many text encoders the family must have; 0 for any number.
        blocks: which block names the family's own kohya files must have; "" for any.
        open_clip: whether the part must (True) or must not (False) come from OpenCLIP; None for either.
        given: a regular expression that some key must hold, or these names are not known.
    """

    part: str
    form: str
    paths: str = ""
    encoders: int = 0
    blocks: str = ""
    open_clip: bool | None = None
    given: str = ""


@dataclass(frozen=True)
class Leaves:
    """How a name goes on for the factors of a layer.

    Attributes:
        down, up, mid: what follows the name.
        spelling: which of diffusers' spellings it is ("old", "linear" or "peft"); "kohya" otherwise.
        alpha: what follows the name for its alpha; "" where the tool has none with these leaves.
    """

    down: str
    up: str
    mid: str = ""
    spelling: str = "kohya"
    alpha: str = ".alpha"


@dataclass(frozen=True)
class Dialect:
    """One set of rules by which a tool reads a file.

    Attributes:
        names: of the layers.
        leaves: of the factors; of several at one name, the first counts.
        starts: the dialect is for files of which every key begins so; () for all other files.
        others: the kinds besides plain LoRA that it applies, such as "LoHa".
        norms: of the norm layers, to which "norm" in `others` applies.
        dora: what it divides DoRA magnitudes by, as in `layers.dora_update`, "" where it drops them; "base
            rows" is that of row-normed files only.
        ignores: ends of keys that it drops without a word.
        beside: beginnings of keys that it takes, or passes over, without touching a layer.
        unused: beginnings or ends of keys that it reads without effect where they stand beside a LoRA.
        tucker_lokr: what it does at a LoKr of Tucker form: "" uses it; "fails"; "lost", skips the layer.
        strict: what makes it refuse the whole file: "" nothing; "layers", a layer that it knows without a
            pair; "stems", any name without one; "keys", any key that is left over.
        alphas: "own", each layer its own; "component", the most frequent one of a component, but for the
            layers in `own_alpha`; "header", those of the file's header.
        own_alpha: part to the paths that keep their own alpha with "component"; in a text encoder only if the
            file has the `text_model` level in its names just where the model has it.
        zero_is_rank: whether alpha 0 is taken for "as the rank".
        exact_shapes: whether a linear layer's factors must be 2-D and a convolution's 4-D.
        most_unmatched: with more keys left over than this, nothing is loaded.
        whole_attention: whether q, k, v and out of an OpenCLIP text encoder work only together.
        spelled: whether a text encoder's spelling is guessed from some of its keys, as diffusers does.
        needs_match: whether a component of which no layer is found refuses the file.
        must_hold: a text that every key must hold.
        one_naming: for families with original block names: both namings in one file are refused ("refuse"),
            the original ones are dropped ("drop"), or, once one of diffusers' names is there, the first key
            must have one too ("first").
        told_by_shapes: whether the tool guesses the family from shapes, as InvokeAI does.
    """

    names: tuple[Names, ...]
    leaves: tuple[Leaves, ...]
    starts: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    norms: tuple[Names, ...] = ()
    dora: str = ""
    ignores: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    tucker_lokr: str = ""
    strict: str = ""
    alphas: str = "own"
    own_alpha: tuple[tuple[str, str], ...] = ()
    zero_is_rank: bool = False
    exact_shapes: bool = False
    most_unmatched: int | None = None
    whole_attention: bool = False
    spelled: bool = False
    needs_match: bool = False
    must_hold: str = ""
    one_naming: str = ""
    told_by_shapes: bool = False


@dataclass(frozen=True)
class Tool:
    """A tool and the dialects that it reads, tried in this order."""

    name: str
    dialects: tuple[Dialect, ...]
