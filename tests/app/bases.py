"""Single files that look like checkpoints to whoever reads only headers: true names, no numbers."""

import json
from pathlib import Path

GIBIBYTE = 2**30


def write_header(path: Path, shapes: dict[str, list[int]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of these tensors in fp16, whose numbers are a hole in the file."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path


UNET = "model.diffusion_model."
# The context widths that tell families: Rombach et al. 2022 (768), SD 2 (1024), Podell et al. 2023 (2048).
WIDTHS = {"sd15": 768, "sd2": 1024, "sdxl": 2048}


def checkpoint(path: Path, family: str, size: int = 0, **shapes: list[int]) -> Path:
    """One attention layer of a family's UNet, and `size` bytes that make the file as large as a base."""
    channels, block = (640, "input_blocks.4.1") if family == "sdxl" else (320, "input_blocks.1.1")
    attention = f"{UNET}{block}.transformer_blocks.0.attn2"
    tensors = {
        f"{UNET}input_blocks.0.0.weight": [320, 4, 3, 3],
        f"{attention}.to_q.weight": [channels, channels],
        f"{attention}.to_k.weight": [channels, WIDTHS[family]],
        f"{attention}.to_out.0.bias": [channels],
        f"{UNET}{block}.transformer_blocks.0.ff.net.2.weight": [channels, 4 * channels],
        f"{UNET}{block.removesuffix('.1')}.0.in_layers.2.weight": [channels, 320, 3, 3],
        **shapes,
    }
    if size:
        tensors["filler"] = [size // 2]
    return write_header(path, tensors)
