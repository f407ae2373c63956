"""What `bench_head.py` times: bare matrix products, our plans, and what other libraries do for the same work.

Rows are tokens: `tokens` in all, of which `rows` belong to completions, in sequences of equal length, chosen ones
first. A side is a function that does one forward and backward and returns the gradients of (hidden of completion rows,
weight).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from dpo_kernels import linear_dpo_loss, linear_token_logps
from dpo_kernels.products import product_nt, takes_onednn
from torch import Tensor

Side = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    """One run."""

    rows: int = 512
    """Completion rows."""
    tokens: int = 1280
    """All rows: prompts and padding too. Only peers that compute those see them."""
    sequences: int = 8
    hidden: int = 512
    vocabulary: int = 32000
    dtype: str = "float32"
    """Of the GEMMs; bfloat16 runs ours under autocast with an fp32 weight."""
    threads: int = 1
    rounds: int = 9
    peers: bool = False


@dataclass(frozen=True)
class Problem:
    """The same numbers for every side."""

    settings: Settings
    hidden: Tensor = field(repr=False)
    """[tokens, H] in the GEMMs' dtype"""
    weight: Tensor = field(repr=False)
    """[V, H] fp32"""
    reference: Tensor = field(repr=False)
    """[V, H] fp32: the reference's weight, for sides that run it too"""
    labels: Tensor = field(repr=False)
    """[tokens], -100 outside completions"""
    grad: Tensor = field(repr=False)
    """[rows] fp32: dL/dlp"""

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.settings.dtype)

    @cached_property
    def rows(self) -> Tensor:
        """[rows] places of completion rows"""
        return (self.labels != -100).nonzero().squeeze(1)

    def completion(self) -> tuple[Tensor, Tensor]:
        """hidden and targets of completion rows."""
        return self.hidden[self.rows].clone(), self.labels[self.rows]

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def make_problem(settings: Settings) -> Problem:
    maker = torch.Generator().manual_seed(0)
    hidden = torch.randn(settings.tokens, settings.hidden, generator=maker)
    weight, other = (
        torch.randn(settings.vocabulary, settings.hidden, generator=maker) * settings.hidden**-0.5 for _ in range(2)
    )
    labels = torch.randint(settings.vocabulary, (settings.tokens,), generator=maker)
    length = settings.tokens // settings.sequences
    place = torch.arange(settings.tokens) % length
    labels[place < length - settings.rows // settings.sequences] = -100
    grad = torch.randn(settings.rows, generator=maker)
    return Problem(settings, hidden.to(getattr(torch, settings.dtype)), weight, weight + 0.1 * other, labels, grad)


def bare_gemms(problem: Problem, count: int, *, fastest: bool) -> Side:
    """logits (twice if four), dH, and from three on dW: nothing else, into buffers that exist.

    fastest: each by the faster of torch's own product and oneDNN's, whatever ours takes; else torch's own.
    """
    hidden, weight = problem.completion()[0], problem.weight.to(problem.dtype)
    logits = torch.zeros(hidden.shape[0], weight.shape[0], dtype=problem.dtype)
    products = [(hidden, weight.t())] * (2 if count == 4 else 1) + [(logits, weight)]
    products += [(logits.t(), hidden)] if count > 2 else []
    calls = [_product(a, b, fastest=fastest) for a, b in products]

    def run() -> None:
        for call in calls:
            call()

    return run


def _product(a: Tensor, b: Tensor, *, fastest: bool) -> Side:
    out = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)
    ways: list[Side] = [lambda: torch.mm(a, b, out=out)]
    if fastest and takes_onednn(a, b):
        ways.append(lambda: product_nt(a, b.t()))
    return min(ways, key=lambda way: min(_seconds(way) for _ in range(3))) if len(ways) > 1 else ways[0]


def _seconds(call: Side) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ours(problem: Problem, plan: str) -> Side:
    hidden, targets = problem.completion()
    hidden, weight = hidden.requires_grad_(), problem.weight.clone().requires_grad_(plan != "frozen")

    def run() -> tuple[Tensor | None, Tensor | None]:
        hidden.grad = weight.grad = None
        with problem.autocast():
            logps = linear_token_logps(hidden, weight, targets, plan=plan)
        logps.backward(problem.grad)
        return hidden.grad, weight.grad

    return run


def ours_with_reference(problem: Problem) -> Side:
    """What Liger's loss does: the reference's log-probs, then the DPO loss and its gradients."""
    hidden, targets = problem.completion()
    hidden, weight = hidden.requires_grad_(), problem.weight.clone().requires_grad_()
    count = problem.settings.sequences
    ids = torch.arange(count).repeat_interleave(problem.settings.rows // count)
    chosen, rejected = torch.arange(count).chunk(2)

    def run() -> tuple[Tensor | None, Tensor | None]:
        hidden.grad = weight.grad = None
        with problem.autocast():
            with torch.no_grad():
                ref = linear_token_logps(hidden, problem.reference, targets)
            found = linear_dpo_loss(hidden, weight, targets, ids, ref, chosen, rejected, num_completions=count)
        found.loss.backward()
        return hidden.grad, weight.grad

    return run


def _from_logps(problem: Problem, hidden: Tensor, targets: Tensor, grad: Tensor, logps: Callable[..., Tensor]) -> Side:
    """A peer that gives log-probs of rows: its gradients of hidden and weight from dL/dlp."""
    hidden, weight = hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    every = hidden.shape[0] != problem.settings.rows

    def run() -> tuple[Tensor | None, Tensor | None]:
        hidden.grad = weight.grad = None
        with problem.autocast():
            value = logps(hidden, weight, targets)
        value.backward(grad.to(value.dtype))
        found = hidden.grad
        return (found[problem.rows] if every and found is not None else found), weight.grad

    return run


def eager(problem: Problem) -> Side:
    """Logits of completion rows in full, log_softmax in fp32."""

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")

    return _from_logps(problem, *problem.completion(), problem.grad, logps)


def cut_cross_entropy(problem: Problem) -> Side:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="torch_compile")

    return _from_logps(problem, *problem.completion(), problem.grad, logps)


def trl(problem: Problem, *, completion_only: bool) -> Side:
    """TRL's head as its DPOTrainer runs it on CPU: every row; or, as it does where Triton is, completion rows."""
    from trl.trainer import utils  # pyright: ignore[reportMissingImports]

    function: Any = utils._ChunkedLogProbFunction  # pyright: ignore[reportPrivateImportUsage]
    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = function.apply(hidden, weight, None, targets.clamp(min=0), 1.0, size, None, 1.0, ("log_probs",))[0]
        return found.masked_fill(targets == -100, 0)

    if completion_only:
        return _from_logps(problem, *problem.completion(), problem.grad, logps)
    grad = torch.zeros(problem.settings.tokens).index_copy(0, problem.rows, problem.grad)
    return _from_logps(problem, problem.hidden, problem.labels, grad, logps)


def liger(problem: Problem, *, compiled: bool) -> Side:
    """Liger's fused linear DPO with the reference, on all rows as it takes them; chunks of its default, one pair."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # pyright: ignore[reportMissingImports]

    shape = problem.settings.sequences, -1, problem.settings.hidden
    criterion = LigerFusedLinearDPOLoss(beta=0.1, compiled=compiled, use_ref_model=True)
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    labels = problem.labels.view(shape[:2])

    def run() -> tuple[Tensor | None, Tensor | None]:
        hidden.grad = weight.grad = None
        with problem.autocast():
            rows = hidden.view(shape)
            loss, *_ = criterion(weight, rows, labels, None, rows.detach(), problem.reference)
        loss.backward()
        return (None if hidden.grad is None else hidden.grad[problem.rows]), weight.grad

    return run


PEERS: dict[str, Callable[[Problem], Side]] = {
    "eager torch, completion rows": eager,
    "cut-cross-entropy (torch_compile)": cut_cross_entropy,
    "TRL as shipped, all rows": lambda problem: trl(problem, completion_only=False),
    "TRL, completion rows": lambda problem: trl(problem, completion_only=True),
    "Liger DPO with reference": lambda problem: liger(problem, compiled=False),
    "Liger DPO with reference, compiled": lambda problem: liger(problem, compiled=True),
}
OURS = {"frozen": 2, "retain": 3, "recompute": 4}
"""Plan: how many GEMMs it does."""
WITH_REFERENCE = "ours, DPO with reference"


def sides_of(problem: Problem) -> tuple[dict[str, Side], dict[str, str]]:
    """Every side that runs here, and why the others do not."""
    sides: dict[str, Side] = {}
    for count in OURS.values():
        sides[f"{count} bare GEMMs"] = bare_gemms(problem, count, fastest=True)
    for count in OURS.values():
        sides[f"{count} bare GEMMs, torch.mm"] = bare_gemms(problem, count, fastest=False)
    sides |= {f"ours, {plan}": ours(problem, plan) for plan in OURS}
    sides[WITH_REFERENCE] = ours_with_reference(problem)
    missing: dict[str, str] = {}
    for name, make in PEERS.items() if problem.settings.peers else ():
        try:
            side = make(problem)
            side()
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
        else:
            sides[name] = side
    return sides, missing
