"""A vocabulary-sharded LM head on gloo: two and three processes, uneven shards, against one process in float64."""

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dpo_kernels import LinearDPOLoss, linear_dpo_loss, linear_token_logps, plans, sharding

V, H, R = 131, 12, 3
SCALING = 0.7
SHARDS = {2: (90, 41), 3: (64, 1, 66)}
"""Rows of the weight on each rank."""
NAMES = ("entropy", "max_is_target", "mean_logit", "log_sum_sq")
OPTIONS = ({}, {"softcap": 4.0, "temperature": 0.8, "logit_scale": 0.5})


def whole(dtype=torch.float64, rows=37):
    """hidden, weight, bias, a, b, targets (some ignored), upstream gradient: the same on every rank."""
    maker = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=maker, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, V, (rows,), generator=maker)
    targets[2::5] = -100
    weight = normal(V, H) / 2
    weight[7] *= 40  # logits that only one shard has
    return normal(rows, H), weight, normal(V), normal(R, H), normal(V, R), targets, normal(rows)


def gradients(tensors, call, upstream, needed):
    leaves = [part.clone().requires_grad_(need) for part, need in zip(tensors, needed, strict=True)]
    found = call(leaves)
    found.logps.backward(upstream)
    return found, [leaf.grad for leaf in leaves]


def own_rows(parts, rank, size):
    """This rank's rows of what has a row for each token; hidden and a are whole."""
    start = sum(SHARDS[size][:rank])
    rows = slice(start, start + SHARDS[size][rank])
    hidden, weight, bias, a, b = parts
    return [hidden, weight[rows], bias[rows], a, b[rows]]


def check_plan(rank, size, plan, options, group, budget=None):
    *parts, targets, upstream = whole()
    trained = plan != "frozen"
    needed = (True, trained, trained, True, trained)

    def call(leaves, process_group=None, **more):
        hidden, weight, bias, a, b = leaves
        return linear_token_logps(
            hidden, weight, targets, bias=bias, lora=(a, b, SCALING), stats=NAMES, process_group=process_group,
            **options, **more,
        )  # fmt: skip

    truth, expected = gradients(parts, call, upstream, needed)
    found, grads = gradients(
        own_rows(parts, rank, size),
        lambda leaves: call(leaves, group, plan=plan, workspace_bytes=budget),
        upstream,
        needed,
    )
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    if trained:
        expected = own_rows(expected, rank, size)
    for mine, right in zip(grads, expected, strict=True):
        assert (mine is None) == (right is None)
        if mine is not None:
            torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)


def check_same_bits(rank, size):
    """Every rank, every plan: the same fp32 log-probs; and bf16 weights work."""
    for dtype in (torch.float32, torch.bfloat16):
        *parts, targets, _ = whole(dtype)
        hidden, weight, bias, _, _ = own_rows(parts, rank, size)
        found = [
            linear_token_logps(
                hidden.clone().requires_grad_(), weight.clone().requires_grad_(plan != "frozen"), targets, bias=bias,
                plan=plan, process_group=dist.group.WORLD,
            ).detach()
            for plan in ("frozen", "retain", "recompute")
        ]  # fmt: skip
        others = [torch.empty_like(found[0]) for _ in range(size)]
        dist.all_gather(others, found[0])
        assert all(torch.equal(part, found[0]) for part in (*found, *others))


def check_losses(rank, size):
    """The preference loss and its gradient; every rank may take another plan."""
    *parts, targets, _ = whole(rows=12)
    targets, ids = targets.clamp(min=0), torch.arange(12) % 4
    index = {"chosen": torch.tensor([0, 2]), "rejected": torch.tensor([1, 3]), "num_completions": 4}
    hidden, weight, bias, a, b = parts
    one = [part.clone().requires_grad_() for part in (hidden, weight)]
    truth = linear_dpo_loss(one[0], one[1], targets, ids, None, bias=bias, lora=(a, b, SCALING), **index)
    truth.loss.backward()
    hidden, weight, bias, a, b = own_rows(parts, rank, size)
    mine = [part.clone().requires_grad_() for part in (hidden, weight)]
    criterion = LinearDPOLoss(process_group=dist.group.WORLD, plan=("retain", "recompute")[rank % 2])
    found = criterion(*mine, targets, None, bias=bias, lora=(a, b, SCALING), completion_ids=ids, **index)
    found.loss.backward()
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    expected = own_rows([one[0].grad, one[1].grad, bias, a, b], rank, size)
    for leaf, right in zip(mine, expected, strict=False):
        torch.testing.assert_close(leaf.grad, right, rtol=1e-10, atol=1e-12)


def check_edges(rank, size):
    *parts, targets, _ = whole()
    hidden, weight, _, _, _ = own_rows(parts, rank, size)
    group = sharding.name_of(dist.group.WORLD)
    empty = linear_token_logps(hidden[:0], weight, targets[:0], process_group=group)
    assert empty.shape == (0,)
    ignored = linear_token_logps(hidden, weight, torch.full_like(targets, -100), process_group=group)
    assert not ignored.any()
    with pytest.raises(ValueError, match=rf"targets: expected entries in \[0, {V}\) or -100, found {V}"):
        linear_token_logps(hidden, weight, targets.where(targets != 0, V).index_fill(0, torch.tensor(0), V),
                           process_group=group)  # fmt: skip


def check_triton(rank, size):
    """The folds, interpreted: fp32 against float64. A target of another shard may be -100 in this one's numbering."""
    from tests.harness.interpret import interpret

    *parts, targets, upstream = whole(rows=9)
    small = [part.float() for part in parts]

    def call(leaves, **more):
        hidden, weight, bias, a, b = leaves
        return linear_token_logps(
            hidden, weight, targets, bias=bias, lora=(a, b, SCALING), stats=NAMES, softcap=5.0, **more
        )

    for plan in ("frozen", "retain"):
        trained = plan != "frozen"
        needed = (True, trained, trained, True, trained)
        truth, expected = gradients([part.double() for part in small], call, upstream, needed)
        expected = own_rows(expected, rank, size) if trained else expected
        with interpret():
            found, grads = gradients(
                own_rows(small, rank, size),
                lambda leaves, p=plan: call(leaves, plan=p, backend="triton", process_group=dist.group.WORLD),
                upstream.float(),
                needed,
            )
        torch.testing.assert_close(tuple(found), tuple(truth), rtol=1e-5, atol=1e-5, check_dtype=False)
        for mine, right in zip(grads, expected, strict=True):
            if mine is not None:
                torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=2e-5)


def work(rank, size, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size,
                            timeout=timedelta(seconds=120))  # fmt: skip
    plans.TILE_ROWS, plans.TILE_ELEMENTS, plans.GPU_TILE = 16, 16 * 32, (8, 8 * 32)
    for plan, options in itertools.product(("frozen", "retain", "recompute"), OPTIONS):
        check_plan(rank, size, plan, options, dist.group.WORLD)
    check_plan(rank, size, "retain", {}, sharding.name_of(dist.group.WORLD), budget=9000)
    check_same_bits(rank, size)
    check_losses(rank, size)
    check_edges(rank, size)
    check_triton(rank, size)
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shards_are_one_head(size, tmp_path):
    mp.spawn(work, args=(size, tmp_path / "store"), nprocs=size)  # pyright: ignore[reportPrivateImportUsage]
