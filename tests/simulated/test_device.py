"""The simulated device itself: it refuses and counts what a card would, and has the bits of a processor."""

import pytest
import torch
import torch.nn.functional as F

from tests.simulated.device import GIB, DeviceTensor, SimulatedDevice


def test_tensors_say_where_they_are_and_mix_with_no_others() -> None:
    with SimulatedDevice():
        x = torch.ones(2, 3, device="cuda")
        assert x.device == torch.device("cuda:0")
        assert x.is_cuda
        assert (x * 2 + torch.tensor(1.0)).cpu().tolist() == [[3.0] * 3] * 2
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([x, torch.ones(2, 3)])
        with pytest.raises(TypeError, match="cuda:0"):
            x.numpy()
        assert x.to("cuda") is x
        assert torch.ones(1).to(x).device == x.device


def test_mps_has_no_float64() -> None:
    with SimulatedDevice("mps"):
        x = torch.ones(2, device="mps")
        assert x.cpu().double().sum() == 2
        for make in (x.double, lambda: torch.zeros(1, dtype=torch.float64, device="mps")):
            with pytest.raises(TypeError, match="float64"):
                make()


def test_waiting_copying_and_launching_are_counted_with_their_lines() -> None:
    with SimulatedDevice() as card:
        x = torch.ones(4).to("cuda")
        card.clear()
        y = (x.view(2, 2).T @ x.view(2, 2)).sum()
        assert card.report()["launches"] == 2
        assert not card.syncs
        assert float(y) == y.tolist() == 4 * 2.0
        assert y > 1
        y.to("cpu", non_blocking=True)
        assert card.report()["syncs"] == 3
        assert card.report()["downloads"] == 2
        torch.zeros(3).to(x.device)
        torch.zeros(3).pin_memory().to(x.device, non_blocking=True)
        x.copy_(torch.zeros(4), non_blocking=True)
        x[torch.tensor([1, 2])]
        assert card.uploads == {"elsewhere": 3}
        torch.linalg.solve(x.view(2, 2) + torch.eye(2, device=x.device), x[:2])
        waits = ("item", "copy to the host", "copy to the device", "index by an index of the host")
        waits += ("_linalg_check_errors",)
        assert card.syncs.total() == 3 + 3
        assert set(card.syncs) == {f"{wait}, elsewhere" for wait in waits}
        torch.randn(2, device="cuda")
        torch.randn(2, device="cuda", generator=torch.Generator("cuda"))
        assert card.draws.total() == 1


def test_memory_ends_and_comes_back() -> None:
    with SimulatedDevice(gib=1, others=GIB // 4) as card:
        x = torch.empty(GIB // 8, dtype=torch.float32, device="meta")
        assert torch.cuda.mem_get_info() == (GIB * 3 // 4, GIB)
        held = torch.empty(GIB // 8, device="cuda")
        view = held[1:]
        del held
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty_like(view)
        assert torch.cuda.memory_allocated() == GIB // 2
        del view, x
        assert card.live == 0
        torch.cuda.set_per_process_memory_fraction(0.25)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(GIB // 8, device="cuda")
        card.fail_at = card.allocations + 2
        torch.empty(1, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1, device="cuda")
        torch.empty(1, device="cuda")
        assert card.failures == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_have_the_bits_of_the_processor(dtype: torch.dtype) -> None:
    def work(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        x, weight = x.requires_grad_(), weight.requires_grad_()
        heads = F.linear(F.silu(x), weight).view(2, 5, 2, 8).transpose(1, 2)
        F.scaled_dot_product_attention(heads, heads, heads).square().mean().backward()
        assert x.grad is not None
        assert weight.grad is not None
        return [x.grad.cpu(), weight.grad.cpu()]

    x, weight = torch.randn(2, 5, 16, dtype=dtype), torch.randn(16, 16, dtype=dtype)
    wanted = work(x.clone(), weight.clone())
    with SimulatedDevice() as card:
        found = work(x.to("cuda"), weight.to("cuda"))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert card.live == 0


def test_shapes_alone_need_no_memory() -> None:
    with SimulatedDevice(gib=80, numbers=False) as card:
        layer = torch.nn.Linear(2**14, 2**14, device="cuda")
        layer(torch.randn(2**14, 2**14, device="cuda")).sum().backward()
        assert isinstance(layer.weight, DeviceTensor)
        assert 3 * GIB < card.peak < 3 * GIB + 2**20
        assert layer.bias.grad is not None
        assert layer.bias.grad.cpu().tolist() == [1.0] * 2**14
