import json
import random

import pytest
import torch

from lora_core.errors import LoraError, RunError
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import OPTIMIZERS
from lora_core.train.checkpoint import (
    CheckpointState,
    _joined_factors,
    clear_unfinished,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

KEY = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")


def _weights():
    return AdapterWeights({KEY: LayerWeights(torch.randn(4, 8), torch.randn(8, 4), 2.0)})


def _save(run, step, **state):
    optimizer = state.pop("optimizer", {"state": {}, "param_groups": []})
    return save_checkpoint(run, _weights(), CheckpointState(step, optimizer, **state), FAMILIES["tiny"], {})


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", RunConfig())


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_an_optimizer_goes_on_bit_for_bit(run, name, request):
    row = OPTIMIZERS[name]
    if row.package == "bitsandbytes":
        request.getfixturevalue("bitsandbytes")
    pytest.importorskip(row.load.partition(":")[0])
    generator = random.Random(0)

    def made():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5, 3))]
        return parameters, row.resolve()(
            [{"params": [p], "initial_lr": 1e-2} for p in parameters], lr=1e-2, **row.defaults
        )

    def stepped(parameters, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    parameters, optimizer = made()
    for seed in range(3):
        stepped(parameters, optimizer, seed)
    path = _save(
        run, 3, optimizer=optimizer.state_dict(), scaler={"scale": 65536.0}, best={"step": 2, "gain": 0.1}
    )
    _, state = load_checkpoint(path)
    assert (state.step, state.scaler, state.best) == (3, {"scale": 65536.0}, {"step": 2, "gain": 0.1})
    others, other = made()
    for mine, theirs in zip(others, parameters, strict=True):
        mine.data.copy_(theirs.data)
    other.load_state_dict(state.optimizer)
    for seed in (generator.randrange(1000) for _ in range(5)):
        stepped(parameters, optimizer, seed)
        stepped(others, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_the_adapter_comes_back_bit_for_bit(run):
    weights = _weights()
    path = save_checkpoint(
        run, weights, CheckpointState(1, {"state": {}}), FAMILIES["tiny"], {"ss_output_name": "x"}
    )
    back, _ = load_checkpoint(path)
    assert torch.equal(back.layers[KEY].down, weights.layers[KEY].down)
    assert torch.equal(back.layers[KEY].up, weights.layers[KEY].up)
    assert back.layers[KEY].alpha == 2.0


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["shorter", "flipped", "gone"])
def test_a_broken_checkpoint_is_known(run, name, how):
    file = _save(run, 1) / name
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "shorter":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 255
        file.write_bytes(data)
    with pytest.raises(RunError, match="is broken"):
        load_checkpoint(run.checkpoint(1))


def test_old_ones_go_but_not_the_best(run):
    for step in (10, 20, 30, 40, 50):
        _save(run, step, planned=True)
    prune_checkpoints(run, 2, {20})
    assert run.checkpoint_steps() == [20, 40, 50]
    prune_checkpoints(run, 2, ())
    assert run.checkpoint_steps() == [40, 50]


def test_what_was_not_planned_takes_no_place_of_what_was(run):
    for step in (10, 20, 25, 30, 33, 34):
        _save(run, step, planned=step % 10 == 0)
    prune_checkpoints(run, 2, {33})
    assert run.checkpoint_steps() == [20, 30, 33, 34]


def test_what_a_kill_leaves_is_cleared_and_never_counted(run):
    _save(run, 1)
    (run.checkpoints / ".step-000002.making").mkdir()
    (run.exports / ".x.safetensors.99.tmp").write_bytes(b"half")
    assert run.checkpoint_steps() == [1]
    clear_unfinished(run)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000001"]
    assert not list(run.exports.iterdir())


def test_a_full_disk_leaves_the_last_one_whole(run, monkeypatch):
    _save(run, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LoraError, match="No space left"):
        _save(run, 2)
    monkeypatch.undo()
    assert run.checkpoint_steps() == [1]
    assert not list(run.checkpoints.glob(".*"))
    assert json.loads((run.checkpoint(1) / "state.json").read_text())["step"] == 1
    load_checkpoint(run.checkpoint(1))


@pytest.mark.parametrize("name", ["adamw", "nadam", "lion", "prodigy"])
def test_a_state_with_a_tensor_for_each_factor_goes_on_bit_for_bit(name):
    """As earlier versions wrote it, whose groups were not flat."""
    row = OPTIMIZERS[name]
    pytest.importorskip(row.load.partition(":")[0])

    def made(*groups):
        parts = [{"params": [torch.nn.Parameter(one) for one in group]} for group in groups]
        return parts, row.resolve()(parts, lr=1e-2, **row.defaults)

    def stepped(optimizer, gradients):
        tensors = [one for group in optimizer.param_groups for one in group["params"]]
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient.reshape(tensor.shape)
        optimizer.step()
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    torch.manual_seed(0)
    factors = [torch.randn(3, 4), torch.randn(5, 3), torch.randn(2, 7)]
    gradients = [[torch.randn_like(one) for one in factors] for _ in range(4)]
    parts, before = made(factors[:2], factors[2:])
    for row_of in gradients[:3]:
        stepped(before, row_of)
    now = [torch.cat([one.detach().flatten() for one in part["params"]]) for part in parts]
    _, flat = made(*([one] for one in now))
    flat.load_state_dict(_joined_factors(before.state_dict(), flat, 3))
    joined = [torch.cat([one.flatten() for one in gradients[3][:2]]), gradients[3][2]]
    assert torch.equal(stepped(flat, joined), stepped(before, gradients[3]))
    _, other = made([torch.randn(9)], [torch.randn(14)])
    with pytest.raises(RunError, match="of an earlier version"):
        other.load_state_dict(_joined_factors(before.state_dict(), other, 3))
