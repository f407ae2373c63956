"""From the flags of `dpo train` to the kernels that run: the profiler counts matrix products, the interpreter counts
launches of Triton kernels; the trainer itself is not asked.

N completion tokens of the step, V vocabulary, H hidden, r rank of an adapter.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dpo.cli import main
from dpo.metrics import read_json_lines
from tests.train.test_cli import fails
from tests.train.toy import write_toy

V, H, RANK, PAIRS = 258, 32, 5, 6
FOLD, GRADIENT = "fold_kernel", "tile_gradient_kernel"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"), pairs=PAIRS)


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """A picture takes as long as all the rest."""
    monkeypatch.setattr("dpo.train.draw_curves", lambda run: None)


@pytest.fixture
def launches():
    """Launches of Triton kernels by name, which run in the interpreter."""
    pytest.importorskip("triton")
    from tests.harness.interpret import interpret
    from tests.harness.traffic import count_traffic

    with interpret(), count_traffic() as traffic:
        yield traffic.launches


def train(toy: Path, output: Path, *flags: str) -> tuple[Counter[str], list[dict]]:
    """One step over all pairs: products with the LM head's weight (full) and with its adapter's factors (low), in units
    of one product of all N rows; and the metrics."""
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(output)]
    words += ["--pairs-per-step", str(PAIRS), "--max-steps", "1", "--lr", "1e-3", "--warmup-steps", "0"]
    words += ["--reference-cache", str(output.parent / f"{output.name}-references")]  # or a run finds another's
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        main([*words, "--no-check-sharing", *flags])
    rows = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    tokens = sum(len(row[side]) + 1 for row in rows for side in ("chosen", "rejected"))
    operations: Counter[str] = Counter()
    for event in found.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() in ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise"):
            sizes = sorted({size for shape in event.shapes()[:3] for size in shape if size > 1})
            _count(operations, sizes, tokens)
    return operations, read_json_lines(output / "metrics.jsonl")


def _count(operations: Counter[str], sizes: list[int], tokens: int) -> None:
    """One product of three different sizes: [n, a] and [a, b] with n of the N rows in it."""
    if V not in sizes:
        return
    rest = [size for size in sizes if size != V]
    inner = H if H in rest else RANK if RANK in rest else 0
    rows = [size for size in rest if size != inner]
    assert inner, f"a product with the vocabulary, but neither hidden rows nor an adapter's: {sizes}"
    assert len(rows) == 1, sizes
    operations["full" if inner == H else "low"] += rows[0] / tokens  # pyright: ignore[reportArgumentType]


PLANS = {
    "auto": ((), 3),
    "retain": (("--head-plan", "retain"), 3),
    "recompute": (("--head-plan", "recompute"), 4),
    "a workspace for nothing but the gradient's own memory": (("--head-workspace-mb", "1"), 3),
    "frozen head": (("--lora-r", "4"), 2),
    "frozen head, forced": (("--lora-r", "4", "--head-plan", "frozen"), 2),
    "frozen head, retain": (("--lora-r", "4", "--head-plan", "retain"), 2),
    "frozen head, recompute": (("--lora-r", "4", "--head-plan", "recompute"), 3),
    "two phases": (("--two-phase",), 4),
}
"""Flags, and products of the training step: forward, dL/dhidden, dL/dweight, and what is computed again."""


def check(toy, tmp_path, flags: tuple[str, ...], products: int) -> dict:
    if "--lora-r" in flags:
        pytest.importorskip("peft")
    found, metrics = train(toy, tmp_path / "run", *flags)
    reference = 1  # one product for the cached log-probs of the reference
    assert found == {"full": pytest.approx(products + reference)}
    assert metrics[0]["margin"] == 0.0
    return metrics[0]


@pytest.mark.parametrize(("flags", "products"), PLANS.values(), ids=PLANS.keys())
def test_the_head_does_the_products_of_its_plan_on_torch(toy, tmp_path, launches, flags, products):
    check(toy, tmp_path, (*flags, "--kernel-backend", "torch"), products)
    assert not launches


@pytest.mark.parametrize(
    ("plan", "way"),
    [
        ("retain", "flag"),
        ("retain", "environment"),
        ("retain", "auto"),
        ("recompute", "flag"),
        ("frozen head", "flag"),
    ],
)
def test_the_head_runs_on_triton_where_that_is_asked_for_or_best(toy, tmp_path, launches, monkeypatch, plan, way):
    flags, products = PLANS[plan]
    if way == "environment":
        monkeypatch.setenv("DPO_KERNELS_BACKEND", "triton")
    found = check(toy, tmp_path, (*flags, *(("--kernel-backend", "triton") if way == "flag" else ())), products)
    # a tile is folded in the forward of the reference and of the step, and turned into gradients once
    assert launches[FOLD] == 2
    assert launches[GRADIENT] == 1
    plain = train(toy, tmp_path / "plain", *flags, "--kernel-backend", "torch")[1][0]
    assert found["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_on_a_cpu_without_an_interpreter_the_torch_path_runs_and_triton_is_refused(toy, tmp_path, monkeypatch, capsys):
    tri = pytest.importorskip("dpo_kernels.tri")
    monkeypatch.setattr(tri, "head_forward", None)  # would be called
    check(toy, tmp_path, (), 3)
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output"]
    assert "--kernel-backend triton: " in fails(capsys, *words, str(tmp_path / "x"), "--kernel-backend", "triton")


LORA_HEAD = "--lora-r", str(RANK), "--lora-targets", "lm_head,q_proj"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_adapter_of_the_head_takes_its_own_products(toy, tmp_path, launches, backend):
    pytest.importorskip("peft")
    found, metrics = train(toy, tmp_path / "run", *LORA_HEAD, "--head-plan", "retain", "--kernel-backend", backend)
    # logits and dL/dhidden with the weight, which has no gradient; logits, dL/d(x A^T) and dL/dB with the factors
    assert found == {"full": pytest.approx(2 + 1), "low": pytest.approx(3)}
    assert metrics[0]["margin"] == 0.0
    assert bool(launches) == (backend == "triton")


def test_the_frozen_plan_is_refused_where_something_of_the_head_trains(toy, tmp_path, capsys):
    pytest.importorskip("peft")
    files = "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(tmp_path / "x")
    for flags in ((), LORA_HEAD):
        assert "--head-plan frozen: expected" in fails(capsys, "train", *files, "--head-plan", "frozen", *flags)


def test_a_product_more_would_be_seen(toy, tmp_path, launches, monkeypatch):
    """The count itself: the same run with a head that quietly multiplies once more."""
    import dpo.loss

    def careless(hidden, weight, *args, **options):
        torch.mm(hidden.detach(), weight.detach().t())
        return plain(hidden, weight, *args, **options)

    plain = dpo.loss.linear_dpo_loss
    monkeypatch.setattr(dpo.loss, "linear_dpo_loss", careless)
    found, _ = train(toy, tmp_path / "run", "--kernel-backend", "torch")
    assert found == {"full": pytest.approx(5)}
