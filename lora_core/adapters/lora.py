"""LoRA: the frozen layer plus a trained low-rank path beside it."""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lora_core.adapters.fused import fused_conv2d, fused_linear
from lora_core.adapters.storage import Stored
from lora_core.adapters.targets import Adaptable
from lora_core.adapters.weights import LayerWeights


@dataclass(frozen=True)
class LoraShape:
    """What all layers of one adapter share: rank, alpha, and the chances of the three kinds of dropout."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    @property
    def drops(self) -> bool:
        """Whether any dropout is on."""
        return max(self.dropout, self.rank_dropout, self.module_dropout) > 0


@dataclass
class Moment:
    """Where training stands, told to all layers before each micro-batch: dropout masks follow from it alone.

    A layer inside a checkpointed block runs twice a step; masks drawn from this moment are the same both
    times. Masks are drawn on the device that computes; each kind of device draws others. A micro-batch that
    goes through in parts has the masks of the whole: of its `rows` pictures, those from `first` to `last` go
    through now. 0 rows: all of them.
    """

    seed: int = 0
    micro_batch: int = 0
    first: int = 0
    last: int = 0
    rows: int = 0


class LoraLayer(Stored):
    """y = base(x) + strength * (alpha / r) * up(down(x)), for a linear layer or a convolution.

    down is (r, in) or (r, in, k, k) and starts random, up is (out, r) or (out, r, 1, 1) and starts at zero,
    so that training starts at the base exactly. Both are fp32 whatever the base's number format is. A layer
    whose factors lie in a `Storage` is computed by `fused`, unless a dropout is on.

    Source: Hu et al. 2021, section 4.1, equation 3.
    """

    def __init__(self, base: Adaptable, name: str, shape: LoraShape, moment: Moment, seed: int) -> None:
        """Wrap `base`; `name` and `seed` decide the random start and the dropout masks."""
        super().__init__()
        self.base: Adaptable = base
        self.name = name
        self.shape = shape
        self.moment = moment
        self.strength = 1.0
        weight = base.weight
        generator = torch.Generator().manual_seed(_number(seed, name))
        down = torch.empty(shape.rank, *weight.shape[1:])
        # U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the start of PyTorch's own linear layers and of the reference
        # LoRA.
        down.uniform_(-1.0, 1.0, generator=generator).div_(down[0].numel() ** 0.5)
        up = torch.zeros(weight.shape[0], shape.rank, *[1] * (weight.dim() - 2))
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(up.to(weight.device))

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight: other code asks layers for its dtype and device."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), or (B, in, h, w) to (B, out, h', w')."""
        scale = self.strength * self.shape.alpha / self.shape.rank
        dropping = self.training and self.shape.drops
        if self.place is not None and scale and not dropping:
            known = (self.down, self.up)
            if isinstance(self.base, nn.Conv2d):
                return fused_conv2d(x, self.base, self.place, scale, known)
            return fused_linear(x, self.base, self.place, scale, known)
        frozen: torch.Tensor = self.base(x)
        if self.strength == 0:
            return frozen
        low = x.to(self.down.dtype)
        update = self._dropped_update(low) if dropping else self._up(self._down(low))
        return frozen + (scale * update).to(frozen.dtype)

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.base, nn.Conv2d):
            return F.conv2d(x, self.down, None, self.base.stride, self.base.padding, self.base.dilation)
        return F.linear(x, self.down)

    def _up(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.up) if isinstance(self.base, nn.Conv2d) else F.linear(x, self.up)

    def _dropped_update(self, x: torch.Tensor) -> torch.Tensor:
        """The update with masks drawn from (seed, micro-batch, layer); what is kept is scaled up by 1 / (1 -
        p)."""
        draw = torch.Generator(x.device).manual_seed(
            _number(self.moment.seed, f"{self.moment.micro_batch}/{self.name}")
        )
        keep_module = torch.rand((), generator=draw, device=x.device) >= self.shape.module_dropout
        keep_rank = torch.rand(self.shape.rank, generator=draw, device=x.device) >= self.shape.rank_dropout
        if self.shape.dropout:
            kept = self._drawn_rows(x, draw) >= self.shape.dropout
            x = x * (kept / (1 - self.shape.dropout))
        low = self._down(x)
        mask = (
            keep_rank.to(low)
            * keep_module.to(low)
            / ((1 - self.shape.rank_dropout) * (1 - self.shape.module_dropout))
        )
        if isinstance(self.base, nn.Conv2d):
            mask = mask.view(-1, 1, 1)
        return self._up(low * mask)

    def _drawn_rows(self, x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Numbers in [0, 1) of the shape of `x`, those of its place in the whole micro-batch."""
        moment = self.moment
        if moment.last - moment.first == moment.rows:
            return torch.rand(x.shape, generator=draw, device=x.device)
        # A text encoder's layers see several rows a picture, one for each chunk of its caption.
        each = len(x) // (moment.last - moment.first)
        whole = torch.rand((each * moment.rows, *x.shape[1:]), generator=draw, device=x.device)
        return whole[each * moment.first : each * moment.last]

    def layer_weights(self) -> LayerWeights:
        """A detached copy of the factors, on the CPU."""
        return LayerWeights(
            self.down.detach().cpu().clone(), self.up.detach().cpu().clone(), self.shape.alpha
        )

    def from_layer_weights(self, weights: LayerWeights) -> None:
        """Take over factors of the same rank and alpha, bit for bit."""
        with torch.no_grad():
            self.down.copy_(weights.down.reshape(self.down.shape))
            self.up.copy_(weights.up.reshape(self.up.shape))
        self.mark_changed()


def _number(seed: int, text: str) -> int:
    """A 63-bit number that follows from both."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8], "little") >> 1
