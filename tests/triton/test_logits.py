"""The log-prob kernels against float64: values, gradients, statistics, shapes, strides, bytes."""

import pytest
import torch
from dpo_kernels.common import LogitOptions
from dpo_kernels.tri import rows
from dpo_kernels.tri.logits import logps_backward, logps_forward
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.compiled import on_gpu
from tests.harness.hints import check_hints
from tests.harness.order import program_order
from tests.harness.traffic import count_traffic
from tests.triton.support import assert_as_good_as_torch, scores

pytestmark = pytest.mark.usefixtures("interpreted")
IGNORE = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REAL_EMPTY = torch.empty


def make(n, vocabulary, dtype, *, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, vocabulary, generator=generator) * scale).to(dtype)
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    return logits, targets, torch.randn(n, generator=generator)


def run(logits, targets, upstream, scaling=None, *, stats=0, in_place=False):
    scaling = scaling or LogitOptions()
    logps, row_max, inv_sum, statistics = logps_forward(logits, targets, scaling, stats)
    gradient = logps_backward(logits, targets, row_max, inv_sum, upstream, scaling, in_place=in_place)
    return logps, gradient, statistics


def check(logits, targets, upstream, **scaling):
    with check_hints() as seen:
        logps, gradient, _ = run(logits, targets, upstream, LogitOptions(**scaling))
    assert logits.shape[:-1].numel() == 0 or on_gpu() or seen["tt.divisibility"]
    assert gradient.shape == logits.shape
    assert gradient.dtype == logits.dtype
    assert_as_good_as_torch(logps, gradient, logits, targets, upstream, **scaling)


@pytest.mark.usefixtures("big_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 127, 128, 1000, 32000, 50257])
def test_value_and_gradient(vocabulary, dtype):
    logits, targets, upstream = make(5, vocabulary, dtype)
    targets[1] = IGNORE
    check(logits, targets, upstream)


@pytest.mark.slow
@pytest.mark.usefixtures("big_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [128256, 151936, 262144, 262143])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_vocabularies(vocabulary, dtype, softcap):
    logits, targets, upstream = make(3, vocabulary, dtype)
    check(logits, targets, upstream, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [9, 300, 4099])
def test_launch_rule_as_it_is(vocabulary, dtype):
    logits, targets, upstream = make(3, vocabulary, dtype)
    check(logits, targets, upstream)


@pytest.mark.slow
def test_three_hundred_rows():
    logits, targets, upstream = make(300, 1031, torch.bfloat16)
    targets[::7] = IGNORE
    check(logits, targets, upstream)


@pytest.mark.usefixtures("big_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "scaling",
    [
        {"logit_scale": -1.5},
        {"temperature": 0.7},
        {"logit_scale": 0.0625},
        {"softcap": 30.0},
        {"softcap": 5.0, "temperature": 1.5, "logit_scale": 2.0},
    ],
    ids=str,
)
def test_scaling(dtype, scaling):
    check(*make(4, 1003, dtype), **scaling)


@pytest.mark.usefixtures("big_blocks")
class TestHardLogits:
    def test_logits_of_ten_thousand(self):
        logits, targets, upstream = make(6, 1000, torch.float32, scale=4000.0)
        logits.clamp_(-1e4, 1e4)
        targets[:3] = logits[:3].argmax(-1)
        check(logits, targets, upstream)

    def test_a_large_maximum_costs_nothing(self):
        """Seven equal logits near 1e4: lp = -log 7, though an fp32 log-sum-exp there has steps of 1e-3."""
        logits, targets = torch.full((2, 1000), -9999.0), torch.tensor([3, 900])
        logits[:, 3:7] = logits[:, 898:901] = 9999.3
        logps, _, _ = run(logits, targets, torch.ones(2))
        torch.testing.assert_close(logps.double(), -torch.full((2,), 7.0).double().log(), rtol=2e-7, atol=0.0)

    def test_one_dominating_logit(self):
        logits, targets, upstream = make(4, 1000, torch.bfloat16)
        logits[:, 17] = 200.0
        targets[0] = targets[1] = 17
        check(logits, targets, upstream)

    def test_log_probs_near_zero(self):
        """The log of a sum near 1: no rounding of the sum, so at most three quarters of torch's error."""
        logits, targets, _ = make(64, 53, torch.float32, scale=8.0, seed=3)
        targets = logits.argmax(-1)
        truth = torch.log_softmax(logits.double(), -1).amax(-1)
        torchs = torch.log_softmax(logits, -1).amax(-1)
        ours = logps_forward(logits, targets, LogitOptions())[0]
        assert (ours - truth).square().mean() <= 0.75**2 * (torchs - truth).square().mean()

    def test_masked_vocabulary(self):
        logits, targets, upstream = make(4, 5003, torch.float32)
        logits[0, 100:] = -torch.inf
        logits[1, :4999] = -torch.inf
        logits[2, ::2] = -torch.inf
        targets[:4] = torch.tensor([50, 5000, 1, 3])
        check(logits, targets, upstream)

    def test_masked_target(self):
        logits, targets, upstream = make(2, 1000, torch.float32)
        logits[0, targets[0]] = -torch.inf
        logps, gradient, _ = run(logits, targets, upstream)
        assert logps[0] == -torch.inf
        assert torch.isfinite(gradient).all()

    def test_not_a_number_and_infinity_show(self):
        logits, targets, upstream = make(3, 5003, torch.float32)
        logits[0, 4000] = torch.nan
        logits[1, 3] = torch.inf
        logps, _, _ = run(logits, targets, upstream)
        assert torch.isnan(logps[:2]).all()
        assert torch.isfinite(logps[2])

    def test_target_outside_the_vocabulary_is_nan_and_reads_nothing_there(self):
        logits, targets, upstream = make(3, 1000, torch.float32)
        targets[0], targets[1] = 1000, -1
        with count_traffic():
            logps, _, _ = run(logits, targets, upstream)
        assert torch.isnan(logps[:2]).all()

    def test_zero_upstream_gradient(self):
        logits, targets, _ = make(3, 1000, torch.float32)
        _, gradient, _ = run(logits, targets, torch.zeros(3))
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.usefixtures("big_blocks")
class TestLayouts:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("offset", [1, 3, 5])
    def test_misaligned_start(self, dtype, offset):
        _, targets, upstream = make(3, 501, dtype)
        flat = make(1, 3 * 501 + offset, dtype)[0][0]
        check(flat[offset:].view(3, 501), targets, upstream)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("vocabulary", [128, 1000, 501])
    def test_shifted_padded_batch(self, dtype, vocabulary):
        logits, targets, upstream = make(3 * 5, vocabulary, dtype)
        batch = logits.view(3, 5, vocabulary)
        check(batch[:, :-1], targets[:12].view(3, 4), upstream[:12])
        check(batch[:, 1:], targets[:12].view(3, 4), upstream[:12])

    def test_column_slice_and_strided_columns(self):
        logits, targets, upstream = make(4, 2010, torch.bfloat16)
        check(logits[:, 3:1004], targets % 1001, upstream)
        check(logits[:, ::2], targets % 1005, upstream)

    def test_expanded_rows(self):
        logits, targets, upstream = make(1, 130, torch.float32)
        check(logits.expand(4, 130), targets.expand(4), upstream.expand(4))

    def test_three_strides_are_copied(self):
        logits, targets, upstream = make(24, 40, torch.float32)
        cut = logits.view(2, 3, 4, 40).transpose(0, 2)
        check(cut, targets.view(4, 3, 2), upstream)

    def test_stride_of_two_to_the_thirty(self):
        """Row offsets pass 2^31 elements; pages never touched cost no memory."""
        stride, vocabulary = 2**30, 333
        logits = REAL_EMPTY(2 * stride + vocabulary, dtype=torch.bfloat16).as_strided((3, vocabulary), (stride, 1))
        values, targets, upstream = make(3, vocabulary, torch.bfloat16)
        logits.copy_(values)
        logps, row_max, inv_sum, _ = logps_forward(logits, targets, LogitOptions())
        gradient = logps_backward(logits, targets, row_max, inv_sum, upstream, LogitOptions(), in_place=True)
        assert gradient.data_ptr() == logits.data_ptr()
        assert_as_good_as_torch(logps, gradient, values, targets, upstream)

    def test_no_rows_and_only_ignored_rows(self):
        logits, targets, upstream = make(4, 100, torch.float32)
        logps, gradient, _ = run(logits[:0], targets[:0], upstream[:0])
        assert logps.shape == (0,)
        assert gradient.shape == (0, 100)
        logps, gradient, stats = run(logits, torch.full_like(targets, IGNORE), upstream, stats=15)
        for zeros in (logps, gradient, stats):
            assert torch.equal(zeros, torch.zeros_like(zeros))

    @pytest.mark.parametrize("vocabulary", [128, 501])
    def test_in_place_gradient_equals_the_other(self, vocabulary):
        logits, targets, upstream = make(4, vocabulary, torch.bfloat16)
        targets[2] = IGNORE
        _, expected, _ = run(logits, targets, upstream)
        _, gradient, _ = run(logits, targets, upstream, in_place=True)
        assert gradient.data_ptr() == logits.data_ptr()
        assert torch.equal(gradient, expected)

    def test_in_place_refuses_a_copy(self):
        logits, targets, upstream = make(4, 100, torch.float32)
        with pytest.raises(ValueError, match="unit stride"):
            run(logits[:, ::2], targets % 50, upstream, in_place=True)


@pytest.mark.usefixtures("big_blocks")
@pytest.mark.parametrize("scaling", [{}, {"logit_scale": -0.5}, {"softcap": 20.0, "temperature": 0.8}], ids=str)
@pytest.mark.parametrize("vocabulary", [63, 5001])
def test_statistics(vocabulary, scaling):
    logits, targets, upstream = make(6, vocabulary, torch.bfloat16)
    targets[0], targets[1] = (logits[0].float() * scaling.get("logit_scale", 1.0)).argmax(), IGNORE
    _, _, stats = run(logits, targets, upstream, LogitOptions(**scaling), stats=15)
    z = scores(logits.double(), **scaling)
    logps = torch.log_softmax(z, -1)
    truth = torch.stack(
        [
            -(logps.exp() * logps).sum(-1),
            (z.gather(-1, targets.clamp(min=0)[:, None])[:, 0] == z.amax(-1)).double(),
            z.mean(-1),
            torch.logsumexp(2 * logps, -1),
        ]
    )
    truth[:, 1] = 0.0
    torch.testing.assert_close(stats.double(), truth, rtol=2e-6, atol=2e-6)
    for bit in range(4):
        _, _, alone = run(logits, targets, upstream, LogitOptions(**scaling), stats=1 << bit)
        assert torch.equal(alone[0], stats[bit])


def test_entropy_with_masked_vocabulary_is_finite():
    logits, targets, upstream = make(2, 700, torch.float32)
    logits[:, 10:] = -torch.inf
    targets %= 10
    _, _, stats = run(logits, targets, upstream, stats=1)
    logps = torch.log_softmax(logits[:, :10].double(), -1)
    torch.testing.assert_close(stats[0].double(), -(logps.exp() * logps).sum(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("big_blocks")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 5),
    vocabulary=st.integers(1, 70),
    offset=st.integers(0, 9),
    gap=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    ignored=st.integers(0, 31),
)
def test_any_shape_stride_and_mask(n, vocabulary, offset, gap, dtype, ignored):
    _, targets, upstream = make(n, vocabulary, dtype)
    flat = make(1, offset + n * (vocabulary + gap) + 1, dtype)[0][0]
    logits = flat.as_strided((n, vocabulary), (vocabulary + gap, 1), offset)
    for row in range(n):
        targets[row] = IGNORE if ignored >> row & 1 else targets[row]
    check(logits, targets, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [32000, 50257])
def test_bytes_and_exponentials(vocabulary, dtype, monkeypatch):
    """One read forward, one read and one write backward, nothing of ignored rows; about one exponential an element."""
    real = rows.launch_for(dtype, vocabulary, torch.device("cpu"))
    logits, targets, upstream = make(4, vocabulary, dtype)
    targets[2] = IGNORE
    minimum = 3 * vocabulary * dtype.itemsize
    with count_traffic() as forward:
        _, row_max, inv_sum, _ = logps_forward(logits, targets, LogitOptions())
    assert forward.loaded["logits"] <= minimum * 1.01
    assert sum(forward.loaded.values()) + sum(forward.stored.values()) <= 1.01 * minimum + 32 * 4
    with count_traffic() as backward:
        logps_backward(logits, targets, row_max, inv_sum, upstream, LogitOptions())
    written = 4 * vocabulary * dtype.itemsize
    assert backward.loaded["logits"] <= minimum
    assert backward.stored["grad_logits"] == written
    assert sum(backward.loaded.values()) + sum(backward.stored.values()) <= 1.01 * (minimum + written) + 32 * 4
    visited = 3 * -(-vocabulary // real.block) * real.block
    assert forward.exponentials <= visited * (1 + 1 / 16) + 3 * 2 * real.lanes
    with count_traffic() as capped:
        logps_forward(logits, targets, LogitOptions(softcap=30.0))
    assert capped.exponentials <= visited * (2 + 1 / 16) + 3 * 4 * real.lanes


@pytest.mark.usefixtures("big_blocks")
def test_program_order_changes_nothing():
    logits, targets, upstream = make(7, 501, torch.bfloat16)
    expected = run(logits, targets, upstream, stats=15)
    for seed in range(3):
        with program_order(seed):
            got = run(logits, targets, upstream, stats=15)
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b)
