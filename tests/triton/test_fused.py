"""From logits to the loss in one launch: float64, any order of programs, replay, layouts, hard values."""

import pytest
import torch
from dpo_kernels import reference
from dpo_kernels.calls import PairCall
from dpo_kernels.common import LogitOptions
from dpo_kernels.tri import KernelCall, fixed
from dpo_kernels.tri.fused import fused_backward, fused_forward
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.hints import check_hints
from tests.harness.order import program_order
from tests.harness.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("interpreted")
IGNORE = -100
REAL_EMPTY = torch.empty


def call(reduction="mean", smoothing=0.0):
    return KernelCall.of(PairCall.check("sigmoid", 0.1, reduction, label_smoothing=smoothing))


class Batch:
    """N rows of C completions in T pairs, with the float64 truth."""

    def __init__(
        self, n=40, vocabulary=301, completions=6, pairs=9, *, dtype=torch.float32, reference_per="token", seed=0
    ):
        generator = torch.Generator().manual_seed(seed)
        self.logits = (torch.randn(n, vocabulary, generator=generator) * 3).to(dtype)
        self.targets = torch.randint(0, vocabulary, (n,), generator=generator)
        self.targets[::7] = IGNORE
        self.ids = torch.randint(-1, completions, (n,), generator=generator)
        self.chosen, self.rejected = torch.randint(0, completions, (2, pairs), generator=generator)
        self.completions, self.reference_per = completions, reference_per
        size = {"token": n, "completion": completions, "none": 0}[reference_per]
        self.ref = -torch.rand(size, generator=generator) * 10 if size else None
        self.upstream = torch.randn(pairs, generator=generator)

    def truth(self, options, reduction, **loss):
        x = self.logits.double().requires_grad_()
        logps = reference.token_logps(
            x, self.targets, temperature=options.temperature, logit_scale=options.logit_scale, softcap=options.softcap
        )
        ids = self.ids.where(self.targets != IGNORE, -1)
        per_token = logps - self.ref.double() if self.ref is not None and self.reference_per == "token" else logps
        delta = reference.completion_sums(per_token, ids, self.completions)
        if self.ref is not None and self.reference_per == "completion":
            delta = delta - self.ref.double()
        found = reference.pair_loss(
            delta, torch.zeros_like(delta), self.chosen, self.rejected, reduction=reduction, **loss
        )
        found[0].backward(self.upstream.double() if reduction == "none" else None)
        return found, x.grad

    def run(self, options, pair_call, work=None, **backward):
        out = fused_forward(
            self.logits, self.targets, self.ids, self.ref, self.chosen, self.rejected, None, self.completions,
            options, pair_call, ref_per_token=self.reference_per == "token", work=work,
        )  # fmt: skip
        upstream = self.upstream if pair_call.reduction == "none" else torch.ones(())
        tensors = self.logits, self.targets, self.ids, self.chosen, self.rejected
        grad = fused_backward(*tensors, out, upstream, self.completions, options, pair_call.reduction, **backward)
        return out, grad


def check(batch, options, reduction="mean", smoothing=0.0):
    (loss, won, lost), gradient = batch.truth(options, reduction, label_smoothing=smoothing)
    with check_hints():
        out, grad = batch.run(options, call(reduction, smoothing))
    assert gradient is not None
    if reduction == "none":
        torch.testing.assert_close(out.pairs.losses.double(), loss.detach(), rtol=1e-6, atol=1e-6)
    else:
        assert out.pairs.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(out.pairs.rewards[0].double(), won, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(out.pairs.rewards[1].double(), lost, rtol=1e-6, atol=5e-6)
    rtol, atol = {torch.float32: (2e-6, 2e-7), torch.bfloat16: (2.0**-8, 1e-6), torch.float16: (2.0**-11, 1e-6)}[
        grad.dtype
    ]
    torch.testing.assert_close(grad.double(), gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reference_per", ["token", "completion", "none"])
def test_against_float64(dtype, reference_per):
    check(Batch(dtype=dtype, reference_per=reference_per), LogitOptions())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_and_scaling(reduction):
    check(Batch(), LogitOptions(temperature=0.7, softcap=20.0), reduction, smoothing=0.2)


def test_large_vocabulary():
    check(Batch(n=6, vocabulary=50257, completions=3, pairs=2, dtype=torch.bfloat16), LogitOptions())


def test_one_row_completions_and_completions_without_rows():
    batch = Batch(n=4, completions=7, pairs=12)
    batch.ids = torch.tensor([0, 1, 2, 3])
    check(batch, LogitOptions())


@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one_row(n):
    batch = Batch(n=n, reference_per="none")
    (loss, _, _), _ = batch.truth(LogitOptions(), "mean")
    out, grad = batch.run(LogitOptions(), call())
    assert out.pairs.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert grad.shape == batch.logits.shape


def test_all_rows_ignored_is_ln_two():
    batch = Batch(reference_per="none")
    batch.targets.fill_(IGNORE)
    with count_traffic() as traffic:
        out, grad = batch.run(LogitOptions(), call())
    assert traffic.loaded["logits"] == 0
    assert out.pairs.loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-7)
    assert not grad.any()


def test_policy_equal_to_reference_gives_exactly_zero_rewards():
    batch = Batch()
    batch.ref = torch.zeros(40)
    logps = batch.run(LogitOptions(), call())[0].logps
    batch.ref = logps.clone()
    out, _ = batch.run(LogitOptions(), call())
    assert not out.pairs.rewards[0].any()
    assert not out.pairs.rewards[1].any()


@pytest.mark.parametrize("length", [1, 7])
def test_padded_batch_equals_packed_rows(length):
    batch = Batch(n=5 * length, vocabulary=130, completions=5, pairs=6)
    batch.ids = torch.arange(5).repeat_interleave(length)
    out, grad = batch.run(LogitOptions(), call())
    logits, targets = batch.logits.view(5, length, -1), batch.targets.view(5, length)
    padded = fused_forward(
        logits,
        targets,
        None,
        batch.ref,
        batch.chosen,
        batch.rejected,
        None,
        5,
        LogitOptions(),
        call(),
        ref_per_token=True,
    )
    grad_padded = fused_backward(
        logits, targets, None, batch.chosen, batch.rejected, padded, torch.ones(()), 5, LogitOptions(), "mean"
    )
    assert torch.equal(padded.pairs.loss, out.pairs.loss)
    assert torch.equal(grad_padded.view_as(grad), grad)


def test_shifted_padded_view():
    """logits[:, :-1] against targets[:, 1:]: two row strides, no copy."""
    batch = Batch(n=12, vocabulary=129, completions=4, pairs=5)
    wide = torch.randn(4, 4, 129)
    wide[:, :-1] = batch.logits.view(4, 3, 129)
    batch.ids = torch.arange(4).repeat_interleave(3)
    expected, expected_grad = batch.run(LogitOptions(), call())
    view, targets = wide[:, :-1], batch.targets.view(4, 3)
    index = batch.chosen, batch.rejected
    with check_hints(), count_traffic():
        out = fused_forward(view, targets, None, batch.ref, *index, None, 4, LogitOptions(), call(), ref_per_token=True)
        grad = fused_backward(view, targets, None, *index, out, torch.ones(()), 4, LogitOptions(), "mean")
    # Another alignment, another order of additions within a row.
    assert out.pairs.loss.item() == pytest.approx(expected.pairs.loss.item(), rel=1e-6)
    torch.testing.assert_close(grad.reshape(12, 129), expected_grad, rtol=1e-5, atol=1e-8)


def test_stride_of_two_to_the_thirty():
    """Row offsets pass 2^31 elements; pages never touched cost no memory."""
    batch, stride = Batch(n=3, vocabulary=336, completions=2, pairs=2, dtype=torch.bfloat16), 2**30
    batch.ids, batch.targets = torch.tensor([0, 1, 1]), torch.tensor([5, 335, 6])
    expected, expected_grad = batch.run(LogitOptions(), call())
    wide = REAL_EMPTY(2 * stride + 336, dtype=torch.bfloat16).as_strided((3, 336), (stride, 1))
    batch.logits = wide.copy_(batch.logits)
    out, grad = batch.run(LogitOptions(), call(), in_place=True)
    assert grad.data_ptr() == wide.data_ptr()
    assert torch.equal(out.logps, expected.logps)
    assert torch.equal(grad, expected_grad)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 5),
    vocabulary=st.integers(1, 70),
    completions=st.integers(1, 4),
    pairs=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    reference_per=st.sampled_from(["token", "completion", "none"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.integers(0, 31),
)
def test_any_shape_and_mask(n, vocabulary, completions, pairs, dtype, reference_per, reduction, ignored):
    batch = Batch(n, vocabulary, completions, pairs, dtype=dtype, reference_per=reference_per, seed=ignored)
    for row in range(n):
        batch.targets[row] = IGNORE if ignored >> row & 1 else row % vocabulary
    check(batch, LogitOptions(), reduction)


def test_in_place_gradient():
    batch = Batch(vocabulary=129)
    _, expected = batch.run(LogitOptions(), call())
    _, grad = batch.run(LogitOptions(), call(), in_place=True)
    assert grad.data_ptr() == batch.logits.data_ptr()
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_program_order_and_replay_are_bitwise_equal(reduction):
    batch = Batch(completions=3, pairs=8)
    work = torch.zeros(fixed.workspace_size(3), dtype=torch.int64)
    expected = batch.run(LogitOptions(), call(reduction), work)
    for seed in range(4):
        with program_order(seed):
            out, grad = batch.run(LogitOptions(), call(reduction), work)
        assert not work.any()
        assert torch.equal(grad, expected[1])
        for name in ("loss", "losses", "rewards", "slopes"):
            assert torch.equal(getattr(out.pairs, name), getattr(expected[0].pairs, name)), name


def test_infinite_and_enormous_log_probs_show_where_they_belong():
    batch = Batch(n=6, completions=6, pairs=3, reference_per="none")
    batch.ids, batch.targets = torch.arange(6), torch.tensor([5, 6, 7, 8, 9, 10])
    batch.chosen, batch.rejected = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])
    batch.logits[0, 5] = -torch.inf
    batch.logits[2, 3] = torch.nan
    out, _ = batch.run(LogitOptions(), call("sum"))
    assert out.pairs.rewards[0][0] == -torch.inf
    assert out.pairs.losses[0] == torch.inf
    assert out.pairs.losses[1].isnan()
    assert out.pairs.losses[2].isfinite()
    assert out.pairs.grad[4:].isfinite().all()


def test_a_row_of_no_existing_completion_makes_the_loss_nan():
    batch = Batch(reference_per="none")
    batch.ids[1] = 6
    work = torch.zeros(fixed.workspace_size(6), dtype=torch.int64)
    with count_traffic():
        out, _ = batch.run(LogitOptions(), call(), work)
    assert out.pairs.loss.isnan()
    assert not work.any()


def test_launches_and_bytes():
    """One launch each way, and nothing V-wide beyond one read forward, one read and one write backward."""
    batch = Batch(n=20, vocabulary=32000, dtype=torch.bfloat16)
    rows = int(((batch.targets != IGNORE) & (batch.ids >= 0)).sum())
    with count_traffic() as traffic:
        out = fused_forward(
            batch.logits, batch.targets, batch.ids, batch.ref, batch.chosen, batch.rejected, None, 6,
            LogitOptions(), call(), ref_per_token=True,
        )  # fmt: skip
    assert traffic.launches == {"fused_forward_kernel": 1}
    moved = sum(traffic.loaded.values()) + sum(traffic.stored.values())
    # A row: its target, completion, reference, three results; a pair: indices, gathers and results; a completion: its
    # sums.
    assert moved <= rows * 64000 * 1.01 + 64 * 20 + 128 * 9 + 64 * 6
    with count_traffic() as traffic:
        tensors = batch.logits, batch.targets, batch.ids, batch.chosen, batch.rejected
        fused_backward(*tensors, out, torch.ones(()), 6, LogitOptions(), "mean")
    assert traffic.launches == {"fused_backward_kernel": 1}
    moved = sum(traffic.loaded.values()) + sum(traffic.stored.values())
    assert moved <= (rows + 20) * 64000 * 1.01 + 64 * 20
