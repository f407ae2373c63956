"""token_logps: values and gradients against float64, over shapes, dtypes, masks, strides and extreme logits."""

import math

import pytest
import torch
from dpo_kernels import TokenStats, reference, token_logps
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_helpers import assert_no_worse, gradient, leaf, lp_allowance, max_error

ALL_STATS = ("entropy", "max_is_target", "mean_logit", "log_sum_sq")
OPTIONS = [{}, {"temperature": 0.7}, {"logit_scale": 0.25}, {"softcap": 5.0, "temperature": 1.3, "logit_scale": 0.5}]


def check(logits, targets, grad=None, **options):
    """Ours, eager fp32 and float64 on the same numbers; the gradient's allowance is 1e-6 |g| (a half unit for bf16)."""
    grad = torch.randn(targets.shape, dtype=torch.float64) if grad is None else grad
    truth_in, eager_in, ours_in = leaf(logits, torch.float64), leaf(logits), leaf(logits)
    truth = reference.token_logps(truth_in, targets, **options)
    truth.backward(grad)
    eager = reference.token_logps(eager_in, targets, **options)
    eager.backward(grad.to(eager.dtype))
    ours = token_logps(ours_in, targets, **options)
    ours.backward(grad.to(ours.dtype))
    assert ours.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert gradient(ours_in).dtype == logits.dtype
    assert gradient(ours_in).shape == logits.shape
    assert_no_worse(ours, eager, truth, lp_allowance(truth), "lp")
    largest = grad.abs().max().item() if grad.numel() else 0.0
    assert_no_worse(gradient(ours_in), gradient(eager_in), gradient(truth_in), 1e-6 * largest, "gradient")
    ignored = targets == options.get("ignore_index", -100)
    assert (ours[ignored] == 0).all()
    assert (gradient(ours_in)[ignored] == 0).all()
    return ours


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (17, 127), (5, 128), (300, 1000), (3, 50257)])
def test_matches_float64(rows, vocabulary, dtype, options):
    logits = (torch.randn(rows, vocabulary) * 4).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    targets[1::3] = -100
    check(logits, targets, **options)


@pytest.mark.parametrize("vocabulary", [128256, 151936, 262144])
def test_large_vocabularies(vocabulary):
    check(torch.randn(3, vocabulary) * 3, torch.tensor([vocabulary - 1, -100, 0]))


def test_logits_up_to_ten_thousand():
    check((torch.rand(40, 32000) - 0.5) * 2e4, torch.randint(32000, (40,)))


def test_one_dominating_logit():
    logits = torch.randn(8, 5000)
    targets = torch.arange(8) * 17
    logits[torch.arange(4), targets[:4]] = 1e4  # the target dominates: lp near 0
    logits[4:, 4999] = 1e4  # another dominates: lp near -1e4
    ours = check(logits, targets)
    assert ours[:4].tolist() == [0.0] * 4


def test_masked_vocabulary():
    logits = torch.randn(6, 3000)
    logits[:, 100:2900] = float("-inf")
    logits[2, :2999] = float("-inf")
    targets = torch.tensor([0, 99, 2999, 2950, 5, -100])
    ours = check(logits, targets)
    assert ours[2] == 0.0


def test_all_minus_infinity_is_nan_as_in_torch():
    logits = torch.full((1, 10), float("-inf"))
    ours = token_logps(logits, torch.tensor([3]))
    assert ours.isnan().all()
    assert reference.token_logps(logits, torch.tensor([3])).isnan().all()


def test_impossible_target():
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    ours = token_logps(logits, torch.tensor([1]))
    assert ours.item() == -math.inf


def test_no_rows_and_no_kept_rows():
    for shape in [(0, 9), (3, 0, 9)]:
        logits = torch.zeros(shape, requires_grad=True)
        ours = token_logps(logits, torch.zeros(shape[:-1], dtype=torch.int64))
        assert isinstance(ours, torch.Tensor)
        assert ours.shape == shape[:-1]
        ours.sum().backward()
        assert gradient(logits).shape == shape
    check(torch.randn(4, 9), torch.full((4,), -100))


def test_ignored_rows_are_not_read():
    logits = torch.randn(6, 50)
    logits[1::2] = float("nan")
    targets = torch.tensor([1, -100, 2, -100, 3, -100])
    logits.requires_grad_()
    ours = token_logps(logits, targets)
    ours.sum().backward()
    assert ours.isfinite().all()
    assert gradient(logits).isfinite().all()


def test_zero_gradient_and_other_ignore_index():
    check(torch.randn(5, 30), torch.tensor([0, -1, 2, 3, -1]), torch.zeros(5, dtype=torch.float64), ignore_index=-1)
    check(torch.randn(5, 30), torch.tensor([0, 7, 2, 3, 7]), ignore_index=7)


@pytest.mark.parametrize("name", ["sliced", "transposed", "vocabulary stride 2", "three leading", "scalar"])
def test_layouts(name):
    made = {
        "sliced": lambda: torch.randn(3, 8, 40)[:, :-1],
        "transposed": lambda: torch.randn(8, 3, 40).transpose(0, 1),
        "vocabulary stride 2": lambda: torch.randn(5, 80)[:, ::2],
        "three leading": lambda: torch.randn(2, 3, 4, 40)[:, 1:],
        "scalar": lambda: torch.randn(40),
    }
    logits = made[name]()
    targets = torch.randint(40, logits.shape[:-1])
    if targets.dim():
        targets.view(-1)[::4] = -100
    truth = reference.token_logps(leaf(logits, torch.float64), targets)
    base = logits.clone().requires_grad_() if name == "scalar" else logits.requires_grad_()
    ours = token_logps(base, targets)
    assert max_error(ours, truth) < 1e-5
    (found,) = torch.autograd.grad(ours.sum(), base)
    wide = leaf(logits, torch.float64)
    reference.token_logps(wide, targets).sum().backward()
    assert max_error(found, gradient(wide)) < 1e-6


def test_same_bits_with_and_without_gradient():
    logits, targets = torch.randn(50, 999), torch.randint(999, (50,))
    with torch.no_grad():
        plain = token_logps(logits, targets)
    traced = token_logps(leaf(logits), targets)
    assert torch.equal(plain, traced)


@pytest.mark.parametrize("options", OPTIONS)
def test_statistics(options):
    logits = torch.randn(30, 777) * 3
    logits[3, :700] = float("-inf")
    targets = logits[:, 700:].argmax(1) + 700
    targets[::4] = 5
    targets[3] = 750
    targets[1::5] = -100
    found = token_logps(logits, targets, stats=ALL_STATS, **options)
    assert isinstance(found, TokenStats)
    assert found.mean_logit is not None
    assert found.max_is_target is not None
    truth = reference.token_stats(logits.double(), targets, **options)
    for name in ("entropy", "log_sum_sq"):
        torch.testing.assert_close(getattr(found, name).double(), truth[name], rtol=1e-5, atol=1e-5)
    finite = truth["mean_logit"].isfinite()
    torch.testing.assert_close(found.mean_logit.double()[finite], truth["mean_logit"][finite], rtol=1e-5, atol=1e-6)
    assert torch.equal(found.max_is_target, truth["max_is_target"])
    some = token_logps(logits, targets, stats=["entropy"], **options)
    assert isinstance(some, TokenStats)
    assert some.max_is_target is None
    assert torch.equal(some.logps, found.logps)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 12),
    vocabulary=st.integers(1, 70),
    seed=st.integers(0, 2**20),
    keep=st.lists(st.booleans(), min_size=12, max_size=12),
    scale=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
)
def test_any_shape_and_mask(rows, vocabulary, seed, keep, scale):
    maker = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=maker) * scale
    targets = torch.randint(vocabulary, (rows,), generator=maker).where(
        torch.tensor(keep[:rows], dtype=torch.bool), -100
    )
    check(logits, targets, torch.randn(rows, generator=maker, dtype=torch.float64))


def test_golden_two_tokens():
    """softmax((0, ln 3)) = (1/4, 3/4)."""
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    lp = token_logps(logits, torch.tensor([1]))
    (2.0 * lp).sum().backward()
    assert lp.item() == pytest.approx(math.log(0.75), abs=1e-15)
    assert gradient(logits)[0].tolist() == pytest.approx([-0.5, 0.5], abs=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "logits: expected a floating-point tensor"),
        ({"logits": torch.zeros(2, 0)}, "logits: expected shape"),
        ({"targets": torch.tensor([0, 3])}, "targets: expected entries in"),
        ({"targets": torch.tensor([0, -1])}, "targets: expected entries in"),
        ({"targets": torch.tensor([0])}, "targets: expected shape"),
        ({"targets": torch.tensor([0.0, 1.0])}, "targets: expected an integer tensor"),
        ({"temperature": 0.0}, "temperature: expected"),
        ({"softcap": -1.0}, "softcap: expected"),
        ({"stats": ("variance",)}, "stats: expected names"),
        ({"stats": "entropy"}, "stats: expected names"),
        ({"backend": "cuda"}, "backend: expected one of"),
    ],
)
def test_errors(change, message):
    arguments = {"logits": torch.zeros(2, 3), "targets": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError, match=message):
        token_logps(arguments.pop("logits"), arguments.pop("targets"), **arguments)
