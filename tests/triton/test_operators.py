"""Operators and dispatch: opcheck, compiled whole graphs, public functions on the Triton backend, what is refused."""

import re
from pathlib import Path

import pytest
import torch
from dpo_kernels import (
    DPOLoss,
    dpo_loss,
    dpo_loss_from_logits,
    fused_operators,
    operators,
    pair_loss,
    ranking_loss,
    token_logps,
)

from tests.harness.interpret import interpret
from tests.harness.traffic import count_traffic

OURS = "dpo_kernels::"
NUMBERS = (-100, 0.8, 1.5, 0.0)
NUMBERS_OF_A_TERM = [1.0, 0.1, 0.0, 0.5]
"""Of the sigmoid loss, code 0: weight, smoothing."""


@pytest.fixture
def poisoned_allocations():
    """Not here: opcheck compares whole outputs, some of which nobody may read."""


def rows(n=5, vocabulary=33, dtype=torch.float32, requires_grad=True):
    logits = torch.randn(n, vocabulary).to(dtype).requires_grad_(requires_grad)
    return logits, torch.randint(0, vocabulary, (n,))


def pairs(completions=4, count=3):
    policy = torch.randn(completions, requires_grad=True)
    chosen, rejected = torch.randint(0, completions, (2, count)).unbind()
    return policy, torch.randn(completions), chosen, rejected


@pytest.mark.usefixtures("interpreted")
class TestOpcheck:
    """All four checks: schema, autograd registration, fake tensors, ahead-of-time tracing with dynamic shapes."""

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("stats", [0, 15])
    def test_token_logps(self, backend, stats):
        torch.library.opcheck(operators.token_logps, (*rows(), *NUMBERS, stats, False, backend))

    def test_token_logps_of_a_shifted_view_and_a_misaligned_start(self):
        logits, targets = torch.randn(2, 4, 33, requires_grad=True), torch.randint(0, 33, (6,))
        torch.library.opcheck(operators.token_logps, (logits[:, 1:], targets, *NUMBERS, 0, False, "triton"))

    def test_token_logps_backward(self):
        logits, targets = rows(requires_grad=False)
        logps, maximum, inverse, _ = operators.token_logps(logits, targets, *NUMBERS, 0, False, "triton")
        arguments = torch.randn(5), logits, targets, logps, maximum, inverse, *NUMBERS
        torch.library.opcheck(operators.token_logps_backward, (*arguments, "triton"))
        torch.library.opcheck(
            operators.token_logps_backward_, (torch.randn(5), logits, targets, maximum, inverse, *NUMBERS)
        )

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_pair_loss(self, reduction):
        torch.library.opcheck(
            operators.pair_loss, (*pairs(), None, None, [0], NUMBERS_OF_A_TERM, 0.1, False, reduction)
        )

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_ranking_loss(self, reduction):
        policy, ref, _, _ = pairs()
        rankings = torch.tensor([[0, 1, 2], [3, 1, -1]])
        torch.library.opcheck(operators.ranking_loss, (policy, ref, rankings, 0.1, reduction, 3))

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_dpo_loss_from_logits(self, reduction):
        logits, targets = rows()
        _, ref, chosen, rejected = pairs()
        tensors = logits, targets, torch.randint(0, 4, (5,)), ref, chosen, rejected, None
        numbers = 4, False, False, *NUMBERS, [0], NUMBERS_OF_A_TERM, 0.1, False, reduction
        torch.library.opcheck(fused_operators.dpo_loss_from_logits, (*tensors, *numbers))

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_dpo_loss_from_logits_backward(self, reduction):
        logits, targets = rows(requires_grad=False)
        ids, (_, ref, chosen, rejected) = torch.randint(0, 4, (5,)), pairs()
        forward = logits, targets, ids, ref, chosen, rejected, None, 4, False, False, *NUMBERS
        loss, losses, _, *kept = fused_operators.dpo_loss_from_logits(
            *forward, [0], NUMBERS_OF_A_TERM, 0.1, False, reduction
        )
        slopes, grad, _, *statistics = kept
        upstream = torch.ones_like(losses if reduction == "none" else loss)
        tensors = upstream, logits, targets, ids, chosen, rejected, slopes, grad, *statistics
        for backward in (
            fused_operators.dpo_loss_from_logits_backward,
            fused_operators.dpo_loss_from_logits_backward_,
        ):
            torch.library.opcheck(backward, (*tensors, 4, *NUMBERS, reduction))

    def test_backward_of_unreduced_pairs_and_rankings(self):
        _, _, chosen, rejected = pairs()
        torch.library.opcheck(operators.pair_loss_backward, (torch.randn(2, 3), torch.randn(3), chosen, rejected, 4))
        rankings = torch.tensor([[0, 1, 2], [3, 1, -1]])
        torch.library.opcheck(operators.ranking_loss_backward, (torch.randn(2, 3), torch.randn(2), rankings, 4))

    def test_none_is_left_out(self):
        """Every operator of the package is in this class or in `test_head_operators.py`."""
        tests = Path(__file__).read_text() + (Path(__file__).parent / "test_head_operators.py").read_text()
        found = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if OURS in name}
        assert len(found) >= 13
        assert not {name for name in found if not re.search(rf"operators\.{name}\b", tests)}


def launches(traffic):
    """Without the one that asks the interpreter how it rounds."""
    return {name: count for name, count in traffic.launches.items() if name != "round_kernel"}


def gradient_of(function, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.usefixtures("interpreted")
class TestPublicFunctions:
    """The same call on both backends."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_token_logps(self, dtype):
        logits, targets = rows(dtype=dtype, requires_grad=False)
        targets[1] = -100
        results = []
        for backend in ("triton", "torch"):
            upstream = torch.arange(5.0)
            found = gradient_of(lambda x, b=backend, u=upstream: (token_logps(x, targets, backend=b) * u).sum(), logits)
            results.append(found)
        (ours, [grad]), (theirs, [expected]) = results
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(grad, expected, rtol=1e-6 if dtype == torch.float32 else 2.0**-7, atol=1e-6)

    def test_statistics(self):
        logits, targets = rows()
        names = ("log_sum_sq", "entropy", "max_is_target", "mean_logit")
        ours, theirs = (token_logps(logits, targets, stats=names, backend=b) for b in ("triton", "torch"))
        for name in names:
            a, b = getattr(ours, name), getattr(theirs, name)
            assert a.dtype == b.dtype
            assert not a.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert ours.logps.requires_grad

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_pair_loss(self, reduction):
        policy, ref, chosen, rejected = pairs()
        found = []
        for backend in ("triton", "torch"):

            def loss(p, r, backend=backend):
                out = pair_loss(p, r, chosen, rejected, reduction=reduction, label_smoothing=0.1, backend=backend)
                return (out.loss * torch.arange(2.5, out.loss.numel() + 2.5)).sum()

            found.append(gradient_of(loss, policy, ref))
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("top_k", [None, 1, 2])
    def test_ranking_loss(self, reduction, top_k):
        policy, ref, _, _ = pairs()
        rankings = torch.tensor([[0, 1, 2, 3], [3, 1, -1, -1], [2, -1, -1, -1]])
        found = []
        for backend in ("triton", "torch"):

            def loss(p, r, backend=backend):
                out = ranking_loss(p, r, rankings, reduction=reduction, top_k=top_k, backend=backend)
                return (out.loss * torch.arange(2.5, out.loss.numel() + 2.5)).sum()

            found.append(gradient_of(loss, policy, ref))
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("ref_per", ["token", "completion"])
    def test_dpo_loss_from_logits(self, reduction, ref_per):
        logits, targets = rows(n=9)
        ids, (_, ref, chosen, rejected) = torch.randint(-1, 4, (9,)), pairs()
        ref = torch.randn(9) if ref_per == "token" else ref
        found = []
        for backend in ("triton", "torch"):

            def loss(x, backend=backend):
                out = dpo_loss_from_logits(
                    x, targets, ids, ref, chosen, rejected, reduction=reduction, num_completions=4, backend=backend
                )
                return (out.loss * torch.arange(2.5, out.loss.numel() + 2.5)).sum()

            found.append(gradient_of(loss, logits))
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)

    def test_one_launch_each_way_from_the_module(self):
        logits, targets = torch.randn(4, 3, 20, requires_grad=True), torch.randint(0, 20, (4, 3))
        with count_traffic() as traffic:
            found = DPOLoss(backend="triton")(logits, targets)
            assert launches(traffic) == {"fused_forward_kernel": 1}
            found.loss.backward()
        assert launches(traffic) == {"fused_forward_kernel": 1, "fused_backward_kernel": 1}

    def test_the_papers_function(self, monkeypatch):
        monkeypatch.setenv("DPO_KERNELS_BACKEND", "triton")
        policy, ref, chosen, rejected = pairs()
        with count_traffic() as traffic:
            losses, rewards = dpo_loss(policy, ref, chosen, rejected, 0.1)
            losses.sum().backward()
        assert set(launches(traffic)) == {"pair_forward_kernel", "pair_backward_kernel"}
        torch.testing.assert_close(rewards, 0.1 * (policy - ref).detach())

    def test_gradient_in_place(self):
        logits, targets = rows(requires_grad=False)
        _, [expected] = gradient_of(lambda x: token_logps(x, targets, backend="triton").sum(), logits)
        leaf = logits.clone().requires_grad_()
        computed = leaf * 1.0
        logps = token_logps(computed, targets, inplace_backward=True, backend="triton")
        logps.sum().backward(retain_graph=True)
        assert leaf.grad is not None
        assert expected is not None
        assert torch.equal(leaf.grad, expected)
        assert torch.equal(computed.detach(), expected)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logps.sum().backward()
        with pytest.raises(ValueError, match="found a leaf"):
            token_logps(leaf, targets, inplace_backward=True, backend="triton")
        with pytest.raises(ValueError, match="Triton backend"):
            token_logps(leaf * 1, targets, inplace_backward=True, backend="torch")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiled_whole_graph(backend):
    """No graph break, forward and backward, at two sizes."""
    _, ref, chosen, rejected = pairs()

    def step(x, targets, ids):
        lp = token_logps(x, targets, backend=backend).sum()
        if backend == "triton":
            out = dpo_loss_from_logits(
                x, targets, ids, ref, chosen, rejected, num_completions=4, inplace_backward=False, backend=backend
            )
            return lp + out.loss
        return lp

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (6, 9):
        logits, targets = rows(n=n)
        ids = torch.randint(0, 4, (n,))
        eager, [grad] = gradient_of(lambda x, t=targets, i=ids: step(x, t, i), logits)
        traced, [traced_grad] = gradient_of(lambda x, t=targets, i=ids: compiled(x, t, i), logits)
        torch.testing.assert_close(traced, eager)
        torch.testing.assert_close(traced_grad, grad)


class TestRefusals:
    def test_no_gpu_and_no_interpreter(self):
        with pytest.raises(ValueError, match=r"backend: 'triton' runs on CUDA tensors, or under an interpreter"):
            token_logps(*rows(), backend="triton")

    def test_float64(self):
        with interpret(), pytest.raises(ValueError, match=r"found torch.float64"):
            token_logps(*rows(dtype=torch.float64), backend="triton")

    def test_bf16_where_the_interpreter_does_not_round(self):
        with interpret(bf16=False):
            assert token_logps(*rows(), backend="triton").isfinite().all()
            with pytest.raises(ValueError, match=r"silently wrong in torch.bfloat16"):
                token_logps(*rows(dtype=torch.bfloat16), backend="triton")

    def test_unknown_names(self, monkeypatch):
        with pytest.raises(ValueError, match=r"backend: expected one of torch, triton or None, found 'cuda'"):
            token_logps(*rows(), backend="cuda")
        monkeypatch.setenv("DPO_KERNELS_BACKEND", "gpu")
        with pytest.raises(ValueError, match=r"found 'gpu'"):
            token_logps(*rows())

    def test_environment_chooses(self, monkeypatch):
        monkeypatch.setenv("DPO_KERNELS_BACKEND", "triton")
        with interpret(), count_traffic() as traffic:
            token_logps(*rows())
        assert traffic.launches["logps_forward_kernel"] == 1
        monkeypatch.setenv("DPO_KERNELS_BACKEND", "torch")
        with interpret(), count_traffic() as traffic:
            token_logps(*rows())
        assert not launches(traffic)

    def test_without_being_asked(self):
        """CPU: torch, unless an interpreter is there that computes rightly."""
        with count_traffic() as traffic:
            token_logps(*rows())
        assert not launches(traffic)
        with interpret(), count_traffic() as traffic:
            token_logps(*rows())
        assert traffic.launches["logps_forward_kernel"] == 1
        with interpret(bf16=False), count_traffic() as traffic:
            token_logps(*rows(dtype=torch.bfloat16))
        assert "logps_forward_kernel" not in launches(traffic)
