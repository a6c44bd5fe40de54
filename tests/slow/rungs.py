"""What each rung of the memory ladder saves and costs: peak memory and seconds a step, a fresh process for
each.

    python tests/slow/rungs.py [--size middle|sd15|sdxl] [--precision fp32|bf16] [--steps 3]

The base is a UNet of random weights. The peak is of the process while it steps, less what it held before the
base was there; weights in a file count for nothing in it, though the system may keep that file in memory that
it has no other use for.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUNGS = ("plain", "checkpointing", "half", "int8", "offload", "int8+offload", "all")
LIKE_15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
UNETS: dict[str, dict[str, Any]] = {
    "middle": {**LIKE_15, "block_out_channels": (128, 256, 512, 512)},
    "sd15": {**LIKE_15, "block_out_channels": (320, 640, 1280, 1280)},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SIDE = 32


def peak() -> int:
    """Bytes of this process that were resident at most since `mark`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def mark() -> None:
    """Let the peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measured(rung: str, size: str, precision: str, steps: int) -> dict[str, float]:
    """Steps of a LoRA on the attention of a random base, in this process."""
    import ctypes
    import gc

    import torch
    from accelerate import init_empty_weights
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn

    from lora_core.backends.compact import FileStore, WeightPolicy, quantize_int8
    from lora_core.lora.inject import inject
    from lora_core.lora.layer import LoraSpec
    from lora_core.model_files.families import ATTENTION

    torch.set_num_threads(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    nn.Linear(4, 4)(torch.ones(1, 4)).sum().backward()
    mark()
    before = peak()
    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel(**UNETS[size]).requires_grad_(False)
    folder = TemporaryDirectory(dir=ROOT / "tests")
    policy = WeightPolicy(
        quantize_int8 if rung in ("int8", "int8+offload", "all") else None,
        FileStore(torch.device("cpu"), Path(folder.name)) if "offload" in rung or rung == "all" else None,
    )
    torch.manual_seed(0)
    for name, parameter in list(unet.named_parameters()):
        path, _, leaf = name.rpartition(".")
        value = torch.randn(parameter.shape, dtype=dtype) / max(1, parameter[0].numel()) ** 0.5
        setattr(unet.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
        if policy and leaf == "weight":
            policy.apply_to_layer(unet, path)
    numbers = sum(p.numel() for p in unet.parameters())
    injected = inject({"unet": unet}, ["unet"], ATTENTION, LoraSpec(16, 16.0), 1)
    unet.train()
    if rung in ("checkpointing", "all"):
        unet.enable_gradient_checkpointing()
    parts = 2 if rung in ("half", "all") else 1
    optimizer = torch.optim.AdamW(injected.parameters(), 1e-4)
    x, t = torch.randn(2, 4, SIDE, SIDE, dtype=dtype), torch.tensor([10, 500])
    context = torch.randn(2, 77, UNETS[size]["cross_attention_dim"], dtype=dtype)
    more = {"text_embeds": torch.randn(2, 1280, dtype=dtype), "time_ids": torch.full((2, 6), 256.0)}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    mark()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        for rows in torch.arange(2).chunk(parts):
            told = {name: value[rows] for name, value in more.items()}
            predicted = unet(x[rows], t[rows], context[rows], added_cond_kwargs=told).sample
            predicted.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return {"peak": peak() - before, "seconds": min(seconds), "numbers": numbers}


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--size", choices=UNETS, default="middle")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--rungs", nargs="*", default=RUNGS)
    options.add_argument("--rung", help="measure one in this process")
    chosen = options.parse_args()
    if chosen.rung:
        say(json.dumps(measured(chosen.rung, chosen.size, chosen.precision, chosen.steps)))
        return
    say(f"{chosen.size}, {chosen.precision}, batch of 2, latents {SIDE}x{SIDE}, one thread")
    first: dict[str, float] = {}
    for rung in chosen.rungs:
        found = in_a_fresh_process(rung, chosen.size, chosen.precision, chosen.steps)
        first = first or found
        say(
            f"{rung:14} {found['peak'] / 2**20:8,.0f} MB {found['peak'] / first['peak']:5.2f}"
            f" {found['seconds']:7.2f} s {found['seconds'] / first['seconds']:5.2f}"
        )


def say(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def in_a_fresh_process(rung: str, size: str, precision: str, steps: int) -> dict[str, float]:
    """What `measured` gives there."""
    command = [sys.executable, __file__, "--rung", rung, "--size", size, "--precision", precision]
    done = subprocess.run(
        [*command, "--steps", str(steps)], cwd=ROOT, env=environment(), capture_output=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def environment() -> dict[str, str]:
    """One thread, and memory that is given back when it is freed."""
    import os

    return {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # fmt: skip


if __name__ == "__main__":
    main()
