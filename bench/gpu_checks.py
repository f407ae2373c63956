"""What must hold before a GPU's speed means anything: values and gradients against float64, repeats, no syncs, graph
replay.

N rows, V vocabulary, H hidden, C completions, T pairs. Runs on CUDA, and on CPU tensors inside an interpreter at tiny
sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from dpo_kernels import (
    LOSSES,
    PairCall,
    dpo_loss_from_logits,
    linear_token_logps,
    pair_loss,
    ranking_loss,
    reference,
    token_logps,
)
from torch import Tensor

from dpo.selftest import Check


@dataclass(frozen=True)
class Sizes:
    """One scale of the checks."""

    rows: int
    vocabularies: tuple[int, ...]
    head: tuple[int, int, int]
    """N, H, V of the LM head."""


FULL = Sizes(333, (7, 127, 128, 1000, 32000, 50257, 128256, 151936, 262144), (1000, 512, 32001))
TINY = Sizes(5, (7, 130), (6, 16, 70))
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _logits(rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    maker = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(rows, vocabulary, generator=maker) * 3).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=maker)
    targets[::5] = -100
    return logits.to(device), targets.to(device), torch.randn(rows, generator=maker).to(device)


def _gradient(function: Callable[[Tensor], Tensor], leaf: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = leaf.detach().clone().requires_grad_()
    out = function(x)
    out.backward(upstream.to(out.dtype))
    assert x.grad is not None
    return out.detach().double(), x.grad.double()


def check_logps(sizes: Sizes, device: str) -> list[Check]:
    """Error at most torch's own in fp32, plus 2 ulp for log-probs and 1e-6 |g| for gradients."""
    found = []
    for vocabulary in sizes.vocabularies:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            logits, targets, g = _logits(sizes.rows, vocabulary, dtype, device)
            # float64 on the CPU: not every GPU has it at a bearable speed.
            cpu, goal, up = logits.cpu(), targets.cpu(), g.cpu()
            truth, slope = _gradient(lambda x, t=goal: reference.token_logps(x, t), cpu.double(), up)
            torchs, torch_slope = _gradient(lambda x, t=goal: reference.token_logps(x, t), cpu.float(), up)
            ours, grad = _gradient(lambda x, t=targets: token_logps(x, t, backend="triton"), logits, g)
            ulp = 2.0**-22 * truth.abs().max().item()
            allowed = (torchs - truth).abs().max().item() + ulp
            name = f"token_logps V={vocabulary} {dtype}"
            found.append(Check(name, (ours.cpu() - truth).abs().max().item(), allowed))
            most = (torch_slope - slope).abs().max().item() + (1e-6 + ROUNDING[dtype]) * up.abs().max().item()
            found.append(Check(name + " gradient", (grad.cpu() - slope).abs().max().item(), most))
    return found


def check_losses(sizes: Sizes, device: str) -> list[Check]:
    """The fused loss, the pair loss and the ranking loss against their torch paths in float64."""
    vocabulary = sizes.vocabularies[-1]
    logits, targets, _ = _logits(sizes.rows, vocabulary, torch.float32, device)
    ids = torch.arange(sizes.rows, device=device) % 4
    ref = torch.full((sizes.rows,), -3.0, device=device)
    index = torch.tensor([0, 2, 0], device=device), torch.tensor([1, 3, 3], device=device)
    one = torch.ones((), device=device)

    def fused(x: Tensor, backend: str, cpu: bool) -> Tensor:
        t, i, r, a, b = (part.cpu() if cpu else part for part in (targets, ids, ref, *index))
        return dpo_loss_from_logits(x, t, i, r, a, b, num_completions=4, backend=backend).loss

    truth, slope = _gradient(lambda x: fused(x, "torch", True), logits.cpu().double(), one.cpu())
    ours, grad = _gradient(lambda x: fused(x, "triton", False), logits, one)
    found = [
        Check("dpo_loss_from_logits", (ours.cpu() - truth).abs().item(), 1e-6 * max(1.0, truth.item())),
        Check("dpo_loss_from_logits gradient", (grad.cpu() - slope).abs().max().item(), 1e-7),
    ]
    policy = torch.linspace(-40.0, 3.0, 4, device=device)
    rankings = torch.tensor([[0, 1, 2, 3], [3, 1, -1, -1]], device=device)
    for name, function in (
        ("pair_loss", lambda x, b, i: pair_loss(x, torch.zeros_like(x), *i[:2], backend=b).loss),
        ("ranking_loss", lambda x, b, i: ranking_loss(x, torch.zeros_like(x), i[2], backend=b).loss),
    ):
        places = (*index, rankings)
        on_cpu = tuple(part.cpu() for part in places)
        truth, slope = _gradient(lambda x, f=function, p=on_cpu: f(x, "torch", p), policy.cpu().double(), one.cpu())
        ours, grad = _gradient(lambda x, f=function, p=places: f(x, "triton", p), policy, one)
        found.append(Check(name, (ours.cpu() - truth).abs().item(), 1e-6 * max(1.0, truth.item())))
        found.append(Check(name + " gradient", (grad.cpu() - slope).abs().max().item(), 1e-7))
    return found


def check_every_loss(device: str) -> list[Check]:
    """Every loss of the table in the pair kernel and, with lengths and log-probs apart, in the fused one."""
    found = []
    policy, ref = torch.linspace(-30.0, -3.0, 4), torch.tensor([-28.0, -25.0, -9.0, -4.0])
    lengths, index = torch.tensor([9, 4, 12, 6]), (torch.tensor([0, 2, 0]), torch.tensor([1, 3, 3]))
    maker = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(20, 33, generator=maker), torch.randint(0, 33, (20,), generator=maker)
    for loss in (*LOSSES, "sigmoid:1,sft:0.5"):
        call = PairCall.check(loss, 0.1, "mean")
        if not call.in_kernel:
            continue

        def pair(x: Tensor, backend: str, place: str, loss: str = loss, call: PairCall = call) -> Tensor:
            base = ref.to(place, x.dtype) if call.reference else None
            counts = lengths.to(place) if call.lengths else None
            w, lo = (part.to(place) for part in index)
            return pair_loss(x, base, w, lo, loss=loss, lengths=counts, backend=backend).loss

        def fused(x: Tensor, backend: str, place: str, loss: str = loss, call: PairCall = call) -> Tensor:
            base = torch.full((20,), -3.0, device=place, dtype=x.dtype) if call.reference else None
            t, ids, w, lo = (part.to(place) for part in (targets, torch.arange(20) % 4, *index))
            return dpo_loss_from_logits(x, t, ids, base, w, lo, num_completions=4, loss=loss, backend=backend).loss

        for name, function, leaf in (("pair_loss", pair, policy), ("dpo_loss_from_logits", fused, logits)):
            truth, slope = _gradient(lambda x, f=function: f(x, "torch", "cpu"), leaf.double(), torch.ones(()))
            ours, grad = _gradient(
                lambda x, f=function: f(x, "triton", device), leaf.to(device), torch.ones((), device=device)
            )
            most = 2e-6 * max(1.0, truth.abs().item()), 2e-6 * max(1.0, slope.abs().max().item())
            found.append(Check(f"{name} {loss}", (ours.cpu() - truth).abs().item(), most[0]))
            found.append(Check(f"{name} {loss} gradient", (grad.cpu() - slope).abs().max().item(), most[1]))
    return found


def check_head(sizes: Sizes, device: str) -> list[Check]:
    """Every plan of the LM head, fp32 and bf16, against float64."""
    n, width, vocabulary = sizes.head
    maker = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, width, generator=maker), torch.randn(vocabulary, width, generator=maker) * 0.1
    targets, g = torch.randint(0, vocabulary, (n,), generator=maker), torch.randn(n, generator=maker)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        h, w = hidden.to(dtype), weight.to(dtype)
        truth, slope = _gradient(lambda x, w=w: reference.linear_token_logps(x, w.double(), targets), h.double(), g)
        for plan in ("frozen", "retain", "recompute"):
            where, goal = w.detach().clone().to(device).requires_grad_(plan != "frozen"), targets.to(device)
            ours, grad = _gradient(
                lambda x, w=where, t=goal, p=plan: linear_token_logps(x, w, t, plan=p, backend="triton"),
                h.to(device),
                g.to(device),
            )
            # cuBLAS may use TF32 only where it is allowed to; by default fp32 products are exact to fp32.
            scale = slope.abs().max().item()
            found.append(Check(f"head {plan} {dtype}", (ours.cpu() - truth).abs().max().item(), 2e-5))
            most = (2e-5 if dtype == torch.float32 else 2.0**-7) * scale
            found.append(Check(f"head {plan} {dtype} gradient", (grad.cpu() - slope).abs().max().item(), most))
    return found


def check_repeats(sizes: Sizes, device: str) -> list[Check]:
    """Bitwise equal on repetition, forward and backward."""
    logits, targets, _ = _logits(sizes.rows, sizes.vocabularies[-1], torch.bfloat16, device)
    ids = torch.arange(sizes.rows, device=device) % 2
    index = torch.tensor([0], device=device), torch.tensor([1], device=device)

    def once() -> tuple[Tensor, Tensor]:
        def loss(x: Tensor) -> Tensor:
            return dpo_loss_from_logits(x, targets, ids, None, *index, num_completions=2, backend="triton").loss

        return _gradient(loss, logits, torch.ones((), device=device))

    first = once()
    differing = sum(not torch.equal(a, b) for _ in range(3) for a, b in zip(first, once(), strict=True))
    return [Check("repeats that differ", differing, 0.0)]


def check_cuda_only(sizes: Sizes) -> list[Check]:
    """No host synchronisation, and equal results from a captured graph replayed on new inputs."""
    logits, targets, _ = _logits(sizes.rows, 32000, torch.bfloat16, "cuda")
    ids = torch.arange(sizes.rows, device="cuda") % 2
    index = torch.tensor([0], device="cuda"), torch.tensor([1], device="cuda")
    x = logits.clone().requires_grad_()

    def step() -> Tensor:
        x.grad = None
        found = dpo_loss_from_logits(x, targets, ids, None, *index, num_completions=2, backend="triton")
        found.loss.backward()
        return found.loss

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        synced = 0.0
    except RuntimeError:
        synced = 1.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    differing = 0
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to("cuda"))
        graph.replay()
        loss, grad = captured.clone(), x.grad.clone() if x.grad is not None else None
        expected = step().detach()
        differing += not torch.equal(loss, expected)
        differing += grad is None or x.grad is None or not torch.equal(grad, x.grad)
    return [Check("host synchronisations", synced, 0.0), Check("graph replays that differ", differing, 0.0)]


def run_checks(sizes: Sizes, device: str) -> list[Check]:
    found = [*check_logps(sizes, device), *check_losses(sizes, device), *check_head(sizes, device)]
    found += [*check_every_loss(device), *check_repeats(sizes, device)]
    return found + (check_cuda_only(sizes) if device == "cuda" else [])
