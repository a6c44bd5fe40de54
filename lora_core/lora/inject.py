"""An adapter in a base for training: its layers, what they start from, the trained state, and its average.

Layers are called "part.path", such as "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q" or
"text_encoder.text_model.encoder.layers.0.self_attn.q_proj". The patterns of block tables
(`settings/schema.py`) are searched for in these names; of several that match, the last in the table counts.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_core.backends.base import Adaptable, replace_submodule
from lora_core.errors import AdapterFileError, ConfigError
from lora_core.lora.layer import AdaptedLayer, DropoutState, FlatParams, LoraLayer
from lora_core.lora.lycoris import as_update, layer_maker
from lora_core.lora.weights import (
    AdapterWeights,
    LayerKey,
    LayerUpdate,
    LayerWeights,
    LoadedLora,
    LoraSpec,
    Merger,
    is_shape_of,
    layer_by_path,
)
from lora_core.model_files.families import Targets, canonical_path
from lora_core.models.encode import tokenize
from lora_core.models.load import BaseModel
from lora_core.models.prompts import TokenizerWithTokens
from lora_core.settings.schema import (
    ADAPTER_KINDS,
    NOTHING_TRAINED,
    AdapterSection,
    NewToken,
    chosen,
    compile_pattern,
    last_matches,
)


def target_modules(part: str, module: nn.Module, targets: Targets) -> dict[str, tuple[str, Adaptable]]:
    """The layers of `module` to adapt: canonical path to (real path, layer), in the module's own order."""
    pattern = targets.pattern(part)
    if pattern is None:
        return {}
    found: dict[str, tuple[str, Adaptable]] = {}
    for path, layer in module.named_modules():
        name = canonical_path(part, path)
        if isinstance(layer, Adaptable) and pattern.fullmatch(name):
            found[name] = (path, layer)
    return found


@dataclass(frozen=True)
class LayerPlan:
    """One layer to adapt: its spec, and its learning rate; at 0 the layer is frozen but still acts."""

    spec: LoraSpec
    rate: float


def plan_layers(
    modules: Mapping[str, nn.Module],
    rates: Mapping[str, float],
    targets: Targets,
    section: AdapterSection,
    block_lr: Mapping[str, float],
    kept: Container[LayerKey] = (),
) -> dict[LayerKey, LayerPlan]:
    """The layers to adapt, in the order of `rates`, the learning rates by part, and of the modules.

    A layer whose rank is 0 is left out, and so is one whose rate is 0, unless it is among `kept`, those of an
    adapter to continue, and another layer of its part is trained. With rsLoRA the scale is alpha / sqrt(rank)
    instead of alpha / rank (Kalajdzievski 2023). Convolutions larger than 1 x 1 have a rank and an alpha of
    their own, unless those are 0.

    Raises:
        ConfigError: a pattern matches no layer, a trained part has no such layer, or
            nothing is left.
    """
    found: list[LayerKey] = []
    for part, rate in rates.items():
        if targets.pattern(part) is not None:
            found += _find_layers(modules, part, targets, required=rate > 0)
    tables: dict[str, Mapping[str, float]] = {
        "adapter.block_ranks": section.block_ranks,
        "adapter.block_alphas": section.block_alphas,
        "optimizer.block_lr": block_lr,
    }
    names = {".".join(key): key for key in found}
    ranks, alphas, own_rates = (
        {names[name]: value for name, value in last_matches(table, names).items()}
        for table in tables.values()
    )
    rate_of = {key: own_rates.get(key, rates[key[0]]) for key in found}
    trained = {part for part, _ in (key for key in found if rate_of[key] > 0 and ranks.get(key, 1) > 0)}

    def is_large(key: LayerKey) -> bool:
        layer = (layer_by_path(modules[key[0]], key[1]) or ("", None))[1]
        return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)

    plans: dict[LayerKey, LayerPlan] = {}
    for key in found:
        larger = (section.conv_rank, section.conv_alpha) if is_large(key) else (0, 0.0)
        rank = int(ranks.get(key, larger[0] or section.rank))
        if rank > 0 and (rate_of[key] > 0 or (key in kept and key[0] in trained)):
            alpha = alphas.get(key, larger[1] or section.alpha)
            alpha *= math.sqrt(rank) if section.rslora else 1.0
            dropouts = section.dropout, section.rank_dropout, section.module_dropout
            spec = LoraSpec(rank, alpha, *dropouts, section.kind)
            plans[key] = LayerPlan(spec, rate_of[key])
    for setting, table in tables.items():
        _check_patterns(setting, table, found, plans)
    if not trained:
        raise ConfigError(NOTHING_TRAINED)
    return plans


def _find_layers(
    modules: Mapping[str, nn.Module], part: str, targets: Targets, required: bool = True
) -> list[LayerKey]:
    names = target_modules(part, modules[part], targets)
    if not names and required:
        raise ConfigError(
            f"The {part} of this base has no layer that adapter.targets names; choose other targets."
        )
    return [(part, name) for name in names]


def _check_patterns(
    setting: str, table: Mapping[str, float], found: list[LayerKey], plans: Container[LayerKey]
) -> None:
    """Refuse a pattern without effect; one that leaves layers out has only to match some."""
    for text, value in table.items():
        pattern = compile_pattern(text)
        matches = [key for key in found if pattern.search(".".join(key))]
        if not matches or (value > 0 and not any(key in plans for key in matches)):
            raise ConfigError(
                f"{setting} has the pattern {text!r}, which matches no adapted layer; layers are called"
                " like unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q."
            )


@dataclass
class Injected:
    """Trainable layers in a base, by (part, module path), and new tokens, by part."""

    layers: dict[LayerKey, AdaptedLayer]
    dropout_state: DropoutState
    tokens: "dict[str, TokenLayer]" = field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        """All trained tensors, in a fixed order."""
        every = (*self.layers.values(), *self.tokens.values())
        return [tensor for layer in every for tensor in layer.trained()]

    def parts(self) -> list[str]:
        """The adapted components."""
        return list(dict.fromkeys([*(part for part, _ in self.layers), *self.tokens]))

    @property
    def strength(self) -> float:
        """What the update of every layer is multiplied by."""
        return next(iter(self.layers.values())).strength

    def set_strength(self, strength: float) -> None:
        """Multiply the update of every layer by `strength`; at 0 the base is computed, bit for bit."""
        for layer in (*self.layers.values(), *self.tokens.values()):
            layer.strength = strength


@contextmanager
def at_strength(injected: Injected, strength: float) -> Iterator[None]:
    """The adapter at `strength` while the context is open."""
    before = injected.strength
    injected.set_strength(strength)
    try:
        yield
    finally:
        injected.set_strength(before)


def inject(
    modules: dict[str, nn.Module], parts: Iterable[str], targets: Targets, spec: LoraSpec, seed: int
) -> Injected:
    """Replace the targeted layers of `parts` by trainable ones around them; `seed` is that of the random
    start and of the dropout masks.

    Raises:
        ConfigError: a part has no such layer.
    """
    keys = [key for part in parts for key in _find_layers(modules, part, targets)]
    return inject_layers(modules, dict.fromkeys(keys, spec), seed)


def inject_layers(modules: dict[str, nn.Module], specs: Mapping[LayerKey, LoraSpec], seed: int) -> Injected:
    """Replace each layer that `specs` names by a trainable one around it; arguments as of `inject`."""
    state = DropoutState(seed)
    layers: dict[LayerKey, AdaptedLayer] = {}
    for (part, name), spec in specs.items():
        located = layer_by_path(modules[part], name)
        assert located is not None, f"{part} {name}"
        path, base = located
        make = layer_maker(chosen(ADAPTER_KINDS, spec.kind, "adapter.kind").resolve())
        layers[part, name] = make(base, f"{part}/{name}", spec, state, seed)
        replace_submodule(modules[part], path, layers[part, name])
    return Injected(layers, state)


class TokenLayer(AdaptedLayer):
    """A text encoder's token embedding with rows for new tokens, whose ids are -1, -2, ...

    At strength s they are start + s (vectors - start), so that at 0 a new token means the words that it
    started from, which the base knows. The frozen table is not touched.

    Source: Gal et al. 2022, "An Image is Worth One Word", section 4; Roich et al. 2021, "Pivotal Tuning", for
    training the model around learned embeddings.
    """

    factor_names = ("vectors",)

    def __init__(self, base: Any, part: str, tokens: Mapping[str, torch.Tensor]) -> None:
        """Add `tokens`, each with its vectors (n, width), to the embedding `base` of a part."""
        count = sum(map(len, tokens.values()))
        super().__init__(base, part, LoraSpec(count, count), DropoutState(), 0)
        self.counts = {token: len(vectors) for token, vectors in tokens.items()}
        start = torch.cat([*tokens.values()]).detach().to(base.weight.device, torch.float32)
        self.start: torch.Tensor
        self.register_buffer("start", start)
        self.vectors = nn.Parameter(start.clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to embeddings (B, T, width)."""
        vectors = self.vectors
        known: torch.Tensor = self.base(ids.clamp(min=0))
        rows = vectors if self.strength == 1.0 else torch.lerp(self.start, vectors, self.strength)
        new = nn.functional.embedding((-1 - ids).clamp(min=0), rows).to(known.dtype)
        return torch.where(ids[..., None] < 0, new, known)

    def by_token(self) -> dict[str, torch.Tensor]:
        """A detached copy of each token's vectors, on the CPU."""
        rows = self.vectors.detach().cpu().clone().split([*self.counts.values()])
        return dict(zip(self.counts, rows, strict=True))

    def load(self, tokens: Mapping[str, torch.Tensor], name: str) -> None:
        """Take over the vectors of the tokens, bit for bit; AdapterFileError where `name` has others."""
        own = {token: (count, self.start.shape[1]) for token, count in self.counts.items()}
        if (found := {token: tuple(tokens[token].shape) for token in own if token in tokens}) != own:
            raise AdapterFileError(f"{name} has the new tokens {found}, and this run {own}.")
        with torch.no_grad():
            self.vectors.copy_(torch.cat([tokens[token] for token in own]))
        if self.flat is not None:
            self.flat.mark_changed()


def put_tokens(base: BaseModel, adapters: Iterable[AdapterWeights]) -> dict[str, TokenLayer]:
    """Have a base know the new tokens of these adapters and no others.

    Raises:
        AdapterFileError: the vectors are of another width than the base's, or two adapters have different
            vectors for one word, which is read in any case.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for weights in adapters:
        for part, tokens in weights.tokens.items():
            known = {token.lower(): rows for token, rows in found.setdefault(part, {}).items()}
            for token, rows in tokens.items():
                if not torch.equal(known.get(token.lower(), rows), rows):
                    raise AdapterFileError(
                        f"Two of the LoRAs have a new token {token}, each with vectors of its own, and a word"
                        " has one meaning; use one of these LoRAs at a time."
                    )
            found[part] |= tokens
    layers = {}
    for part, encoder in base.text_encoders.items():
        embedding = encoder.get_input_embeddings()
        embedding, tokens = getattr(embedding, "base", embedding), found.get(part, {})
        width = embedding.weight.shape[1]
        if wrong := next((token for token, rows in tokens.items() if rows.shape[1] != width), ""):
            raise AdapterFileError(
                f"The adapter's new token {wrong} is {tokens[wrong].shape[1]} wide, the base's tokens"
                f" {width}; it is for another base."
            )
        if tokens:
            layers[part] = TokenLayer(embedding, part, tokens)
        encoder.set_input_embeddings(layers.get(part, embedding))
        tokenizer = base.tokenizers[part]
        plain = tokenizer.plain if isinstance(tokenizer, TokenizerWithTokens) else tokenizer
        counts = {token: len(rows) for token, rows in tokens.items()}
        # Other bases may share the table.
        base.tokenizers = {**base.tokenizers, part: TokenizerWithTokens(plain, counts) if tokens else plain}
    return layers


@contextmanager
def merged(base: BaseModel, merger: Merger, adapters: Sequence[LoadedLora]) -> Iterator[None]:
    """The base as with these adapters, and their new tokens, while the context is open."""
    try:
        merger.apply(list(adapters))
        put_tokens(base, [one.weights for one in adapters if one.strength or one.text_strength])
        yield
    finally:
        merger.apply([])
        put_tokens(base, [])


def start_tokens(base: BaseModel, tokens: Sequence[NewToken]) -> AdapterWeights:
    """New tokens with the vectors of the words that they start from; where there are more vectors than the
    words have tokens, each is taken several times, as in A1111.

    Raises:
        ConfigError: the words have no token.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for part, encoder in base.text_encoders.items():
        for token in tokens:
            ids = tokenize(base.tokenizers[part], token.words)
            if not ids:
                raise ConfigError(f"adapter.new_tokens has {token.words!r}, in which the base reads nothing.")
            count = token.vectors or len(ids)
            rows = [ids[number * len(ids) // count] for number in range(count)]
            vectors = encoder.get_input_embeddings().weight[torch.tensor(rows)].float()
            found.setdefault(part, {})[token.name] = vectors
    return AdapterWeights({}, tokens=found)


def adapter_weights(injected: Injected) -> AdapterWeights:
    """The canonical form of the trained adapter."""
    found = {key: layer.layer_weights() for key, layer in injected.layers.items()}
    plain = {key: layer for key, layer in found.items() if isinstance(layer, LayerWeights)}
    others = {key: one for key, one in found.items() if key not in plain}
    tokens = {part: layer.by_token() for part, layer in injected.tokens.items()}
    return AdapterWeights(plain, others=others, tokens=tokens)


def load_weights(injected: Injected, weights: AdapterWeights) -> None:
    """Set trainable layers to an adapter's factors, bit for bit.

    Raises:
        AdapterFileError: the two do not have the same layers and shapes.
    """
    every_layer = weights.every_layer()
    if set(every_layer) != set(injected.layers):
        odd = sorted(set(every_layer) ^ set(injected.layers))[0]
        raise AdapterFileError(
            f"The saved adapter does not have the layers of this run; they differ at {' '.join(odd)}."
        )
    for key, layer in injected.layers.items():
        saved = every_layer[key]
        given = zip(layer.trained(), layer.factors_of(saved), strict=False)
        if any(own.numel() != one.numel() for own, one in given):
            raise AdapterFileError(f"The saved adapter has other shapes than this run at {' '.join(key)}.")
        layer.from_layer_weights(saved)
    for part, token_layer in injected.tokens.items():
        token_layer.load(weights.tokens.get(part, {}), "The saved adapter")


def act_as(injected: Injected, weights: AdapterWeights) -> None:
    """Have trainable layers act as `weights`, of at most their ranks; those that it lacks do nothing."""
    for key, layer in injected.layers.items():
        own, given = layer.layer_weights(), weights.layers.get(key)
        assert isinstance(own, LayerWeights)
        fitted = fit_to_rank(given, own)[0] if given else replace(own, up=torch.zeros_like(own.up))
        layer.from_layer_weights(fitted)


def init_from_lora(injected: Injected, weights: AdapterWeights, name: str) -> list[str]:
    """Set layers fresh from `inject_layers` so that they act as `weights`, of any ranks and alphas; those
    that it lacks stay fresh. `name` of its file is for messages.

    Returns:
        Notes for the user: what was truncated, and what is not continued.

    Raises:
        AdapterFileError: nothing of it fits, or a layer has another shape than the base's.
    """
    every_layer = weights.every_layer()
    common = [key for key in injected.layers if key in every_layer]
    if not common:
        raise AdapterFileError(
            f"{name} adapts none of the layers that are to be trained; see adapter.targets."
        )
    notes = _take_tokens(injected, weights, name)
    energy, lost_energy, truncated = 0.0, 0.0, 0
    for key in common:
        layer, given = injected.layers[key], every_layer[key]
        wanted, size = tuple(layer.base.weight.shape), given.weight_shape
        if not is_shape_of(size, wanted):
            raise AdapterFileError(
                f"{name} cannot be continued: its layer {'.'.join(key)} is {list(size)} large, the base's"
                f" {list(wanted)}; it is for another base."
            )
        update = as_update(key, given)
        low = update.low
        if low is None or not isinstance(layer, LoraLayer):
            _take_over(layer, given, f"{name} cannot be continued: its layer {'.'.join(key)}")
            continue
        if update.magnitude is not None and update.magnitude.shape[0] != 1:
            raise AdapterFileError(
                f"{name} cannot be continued: its DoRA magnitudes are of rows, as PEFT has them, and those"
                " trained here are of columns; make a plain LoRA of it first, with `merge --rank`."
            )
        fresh = LayerWeights(layer.down.detach(), layer.up.detach(), layer.spec.alpha)
        fitted, kept, lost = fit_to_rank(low, fresh)
        layer.from_layer_weights(fitted if isinstance(given, LayerWeights) else replace(update, low=fitted))
        if low.rank > fresh.rank:
            energy, lost_energy, truncated = energy + kept + lost, lost_energy + lost, truncated + 1
    if truncated:
        share = 1.0 - lost_energy / energy if energy else 1.0
        notes.append(
            f"{truncated} layers of {name} have a higher rank than this run; their best approximation holds"
            f" {100 * share:.1f}% of their energy."
        )
    left = len(every_layer) - len(common)
    if left:
        notes.append(
            f"{left} of the {len(every_layer)} layers of {name} are not continued, because this run does"
            " not train them; its result is without them."
        )
    return notes


def _take_tokens(injected: Injected, weights: AdapterWeights, name: str) -> list[str]:
    """Continue a file's vectors of the new tokens; a sentence on those that the run has not."""
    for part, layer in injected.tokens.items():
        layer.load(layer.by_token() | weights.tokens.get(part, {}), name)
    own = {token for layer in injected.tokens.values() for token in layer.counts}
    left = sorted({token for tokens in weights.tokens.values() for token in tokens} - own)
    note = f"{name} has new tokens that are not continued, as adapter.new_tokens does not name them"
    return [f"{note}: {', '.join(left)}."] if left else []


def _take_over(layer: AdaptedLayer, given: LayerUpdate, its_layer: str) -> None:
    """Have a fresh layer act as an update of its kind, whose factors have to be as large as its own."""
    own, found = layer.layer_weights().tensors(), given.tensors()
    sizes, wanted = ({name: tensor.numel() for name, tensor in each.items()} for each in (found, own))
    # A file has alpha in fp32.
    same = math.isclose(given.scale, layer.layer_weights().scale, rel_tol=1e-6)
    if sizes != wanted or not same:
        raise AdapterFileError(
            f"{its_layer} has the factors {sizes} at the scale {given.scale:g}, and this run {wanted} at"
            f" {layer.layer_weights().scale:g}; set adapter.kind, rank and alpha to those of the file."
        )
    layer.from_layer_weights(given)


def fit_to_rank(given: LayerWeights, fresh: LayerWeights) -> tuple[LayerWeights, float, float]:
    """`given` in the rank and at the scale of `fresh`.

    Up to the rank of `fresh` the factors are kept, `up` scaled by the quotient of the two scales, and
    filled up with the fresh rows of down and columns of zeros in up. Beyond it, the best approximation of
    that rank is taken (Eckart and Young 1936), through the singular values of the two small factors of a QR
    decomposition of up and down, so that the product is never formed.

    Returns:
        The layer, and how much of the update's squared norm is kept and how much is lost.
    """
    scale = given.scale / fresh.scale
    down, up = given.down.double().flatten(1), given.up.double().flatten(1)
    fresh_down = fresh.down.double().flatten(1).cpu()
    kept, lost = 0.0, 0.0
    if given.rank <= fresh.rank:
        new_down = torch.cat([down, fresh_down[given.rank :]])
        new_up = torch.cat([scale * up, torch.zeros(len(up), fresh.rank - given.rank, dtype=torch.double)], 1)
    else:
        left, small_up = torch.linalg.qr(up)
        right, small_down = torch.linalg.qr(down.T)
        u, singular, v = torch.linalg.svd(small_up @ small_down.T * scale)
        squares = (singular * fresh.scale).square()
        kept, lost = float(squares[: fresh.rank].sum()), float(squares[fresh.rank :].sum())
        count = min(fresh.rank, len(singular))
        root = singular[:count].sqrt()
        new_up, new_down = torch.zeros(len(up), fresh.rank).double(), fresh_down.clone()
        new_up[:, :count] = left @ u[:, :count] * root
        new_down[:count] = root[:, None] * (v[:count] @ right.T)
    layer = LayerWeights(
        new_down.float().reshape(fresh.down.shape), new_up.float().reshape(fresh.up.shape), fresh.alpha
    )
    return layer, kept, lost


def limit_norms(injected: Injected, flat_params: FlatParams, limit: float) -> None:
    """Scale down the update of each trained layer whose norm is above `limit`."""
    with flat_params.mutate():
        for layer in injected.layers.values():
            if layer.flat is not None:
                assert isinstance(layer, LoraLayer)
                limit_norm(layer, limit)


def limit_norm(layer: LoraLayer, limit: float) -> None:
    """Scale both factors alike so that the norm of the update is at most `limit`.

    |up down|^2 = <up^T up, down down^T> needs no product as large as the weight. Source: max-norm
    regularization, Srivastava et al. 2014, section 5.1, of the update, as kohya's `scale_weight_norms`.
    """
    down, up = layer.down.detach().flatten(1), layer.up.detach().flatten(1)
    squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0.0)
    norm = squared.sqrt() * (layer.spec.alpha / layer.spec.rank)
    factor = (limit / norm).clamp(max=1.0).sqrt()
    down.mul_(factor)
    up.mul_(factor)


class Average:
    """An average of an adapter, steadier than its last step: validated, sampled and exported in its place."""

    def __init__(self, injected: Injected, flat_params: FlatParams) -> None:
        """Average the adapter `injected`, which `flat_params` holds."""
        self._injected = injected
        self._flat_params = flat_params

    def update(self, step: int) -> None:
        """Take in the adapter after optimizer step `step`, counted from 1."""

    def in_place(self) -> AbstractContextManager[None]:
        """Put the average into the adapter's place while the context is open; both keep their bits."""
        raise NotImplementedError

    def weights(self) -> AdapterWeights:
        """The average as an adapter."""
        with self.in_place():
            return adapter_weights(self._injected)

    def load(self, weights: AdapterWeights) -> None:
        """Restore a saved average, bit for bit."""


class ScheduleFree(Average):
    """What a schedule-free optimizer trains for: it takes gradients at one point, y, and is to be used at
    another, x, which follows from y and its state. Source: Defazio et al. 2024, "The Road Less Scheduled"."""

    def __init__(self, injected: Injected, flat_params: FlatParams, optimizer: Any) -> None:
        """Average as `optimizer` does, whose `eval` puts x into the place of y."""
        super().__init__(injected, flat_params)
        self._optimizer = optimizer

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put x into the place of y. The way back is a copy: that of the optimizer would round."""
        with self._flat_params.mutate() as live:
            kept = live.clone()
            self._optimizer.eval()
        try:
            yield
        finally:
            with self._flat_params.mutate() as live:
                self._optimizer.train()
                live.copy_(kept)


class EMA(Average):
    """Exponential moving average of an adapter."""

    def __init__(self, injected: Injected, flat_params: FlatParams, decay: float) -> None:
        """Start at the adapter as it is; `decay` is below 1."""
        super().__init__(injected, flat_params)
        self._decay = decay
        self._mean = flat_params.data.detach().clone()

    def update(self, step: int) -> None:
        """Take in the adapter after optimizer step `step`, counted from 1.

        mean = d mean + (1 - d) adapter, d = min(decay, (1 + step) / (10 + step)): the ramp forgets the
        untrained start. Source: TensorFlow's ExponentialMovingAverage.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        self._mean.lerp_(self._flat_params.data.detach(), 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the average with the adapter while the context is open; both keep their bits."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, weights: AdapterWeights) -> None:
        """Restore a saved average, bit for bit."""
        with self.in_place():
            load_weights(self._injected, weights)

    def _swap(self) -> None:
        with self._flat_params.mutate() as live:
            kept = live.clone()
            live.copy_(self._mean)
            self._mean.copy_(kept)
