"""Every loss that TRL 1.16 has, against TRL's own code: value and gradient per token on the same log-probs.

TRL's `_compute_loss` runs on a stand-in for trainer and model that hands it log-probs. Where we differ on purpose
(kernels/README.md lists it) the test says by how much.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dpo_kernels import LOSSES, pair_loss, token_pair_loss
from torch import Tensor, nn

from tests.kernel_helpers import gradient

pytestmark = pytest.mark.peers
PAIRS, LENGTH, BETA = 5, 14, 0.3
OURS_ALONE = {"simpo", "alphapo", "orpo", "cpo", "unlikelihood"}
"""Not in TRL's DPOTrainer; the first four are in trainers of their own, below."""


class Batch:
    """Right-padded rows, chosen first, with prompts of two tokens; fp32 log-probs as leaves."""

    def __init__(self, seed: int = 0, *, equal_lengths: bool = False) -> None:
        maker = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, LENGTH - 2, (2 * PAIRS,), generator=maker)
        if equal_lengths:
            self.lengths[:] = 6
        place = torch.arange(LENGTH)
        self.mask = ((place >= 2) & (place < 2 + self.lengths[:, None])).long()
        shape = 2 * PAIRS, LENGTH - 1
        self.logps = -2.0 * torch.rand(shape, generator=maker)
        self.ref = self.logps + torch.randn(shape, generator=maker)
        self.squares = -2.0 * torch.rand(shape, generator=maker)

    @property
    def rows(self) -> Tensor:
        """Which of the shifted positions are completion tokens."""
        return self.mask[:, 1:].bool()


class Given(nn.Module):
    """A model whose log-probs are given."""

    is_gradient_checkpointing = False

    def __init__(self, logps: Tensor, squares: Tensor) -> None:
        super().__init__()
        self.logps, self.squares = logps, squares

    def forward(self, **inputs: Any) -> SimpleNamespace:
        zero = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=self.logps, log_sum_sq_probs=self.squares, entropy=zero, mean_logits=zero, is_top1=zero.bool()
        )


def trl_loss(batch: Batch, loss: list[str], **options: Any) -> tuple[Tensor, Tensor]:
    """TRL's loss and dL/dlp [2 PAIRS, LENGTH - 1]."""
    trainer = pytest.importorskip("trl", reason="the peers extra is not installed").DPOTrainer
    logps = batch.logps.clone().requires_grad_()
    args = SimpleNamespace(discopop_tau=options.pop("discopop_tau", 0.05), gradient_checkpointing_kwargs=None)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, autocast=nullcontext
    )
    model = Given(logps.where(batch.rows, 0.0), batch.squares)  # as from labels of -100
    settings = {
        "loss_weights": [1.0] * len(loss), "label_smoothing": 0.0, "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5, "ld_alpha": None, "use_weighting": False,
    }  # fmt: skip
    reference = Given(batch.ref.where(batch.rows, 0.0), batch.squares)
    fake = SimpleNamespace(
        model=model, ref_model=reference, args=args, accelerator=accelerator, beta=BETA,
        loss_types=loss, aux_loss_enabled=False, precompute_ref_logps=False, _metrics={"train": defaultdict(list)},
        _tp_size=1, _total_train_tokens=0, **settings | options,
    )  # fmt: skip
    inputs = {"input_ids": torch.zeros_like(batch.mask), "attention_mask": torch.ones_like(batch.mask)}
    value = trainer._compute_loss(fake, model, inputs | {"completion_mask": batch.mask}, False)
    value.backward()
    return value.detach(), gradient(logps)


def our_loss(batch: Batch, loss: str, **options: Any) -> tuple[Tensor, Tensor]:
    logps = batch.logps.clone().requires_grad_()
    ids = torch.arange(2 * PAIRS)[:, None].expand_as(logps).where(batch.rows, -1)
    base = batch.ref.reshape(-1) if any(LOSSES[part.split(":")[0]].reference for part in loss.split(",")) else None
    found = token_pair_loss(
        logps.reshape(-1), base, ids.reshape(-1), torch.arange(PAIRS), torch.arange(PAIRS, 2 * PAIRS), loss=loss,
        beta=BETA, log_sum_sq=batch.squares.reshape(-1) if options.get("wpo") else None, **options,
    )  # fmt: skip
    found.loss.backward()
    return found.loss.detach(), gradient(logps)


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=2e-5, atol=2e-6)


PLAIN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "robust": ({"label_smoothing": 0.1}, {}),
    "exo_pair": ({"label_smoothing": 1e-3}, {}),
}
"""Options that TRL needs to compute what we do without any."""


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in OURS_ALONE | {"sft"}])
def test_every_loss(loss):
    batch = Batch()
    theirs, ours = PLAIN.get(loss, ({}, {}))
    assert_same(our_loss(batch, loss, **ours), trl_loss(batch, [loss], **theirs))


TRLS_ALPHA = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}


@pytest.mark.parametrize(
    ("loss", "ours", "theirs"),
    [
        ("robust", {"label_smoothing": 0.3}, {"label_smoothing": 0.3}),
        ("exo_pair", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
        ("aot", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
        ("aot_unpaired", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
        ("discopop", {"discopop_tau": 0.4}, {"discopop_tau": 0.4}),
        *((name, {"ld_alpha": 0.4}, {"ld_alpha": 0.4}) for name in ("sigmoid", "ipo", "nca_pair", "apo_down", "aot")),
        *((name, {"wpo": True}, {"use_weighting": True}) for name in ("sigmoid", "ipo", "bco_pair", "sigmoid_norm")),
        ("sigmoid:0.8,bco_pair:0.2", {}, {"loss_weights": [0.8, 0.2]}),
        # TRL's alpha is one less ours: its (u^(a-1) - 1) / (a-1) is (1 - u^-(1-a)) / (1-a)
        ("sigmoid", {"f_divergence": "alpha", "f_alpha": 0.7}, TRLS_ALPHA),
    ],
    ids=str,
)
def test_options(loss, ours, theirs):
    batch = Batch(1)
    assert_same(our_loss(batch, loss, **ours), trl_loss(batch, [p.split(":")[0] for p in loss.split(",")], **theirs))


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
@pytest.mark.parametrize("loss", [name for name, entry in LOSSES.items() if "f_divergence" in entry.options])
def test_divergences(loss, kind):
    batch = Batch(2)
    theirs, ours = PLAIN.get(loss, ({}, {}))
    name = {"js": "js_divergence"}.get(kind, kind)
    assert_same(
        our_loss(batch, loss, f_divergence=kind, **ours), trl_loss(batch, [loss], f_divergence_type=name, **theirs)
    )


def test_sft_is_a_mean_over_completions_and_trls_over_the_tokens_of_the_batch():
    assert_same(our_loss(Batch(equal_lengths=True), "sft"), trl_loss(Batch(equal_lengths=True), ["sft"]))
    batch = Batch()
    chosen = batch.logps[:PAIRS].where(batch.rows[:PAIRS], 0.0).sum(1)
    torch.testing.assert_close(our_loss(batch, "sft")[0], -(chosen / batch.lengths[:PAIRS]).mean())
    torch.testing.assert_close(trl_loss(batch, ["sft"])[0], -chosen.sum() / batch.lengths[:PAIRS].sum())


def test_label_smoothing_of_the_sigmoid_loss_is_ignored_by_trl():
    batch = Batch()
    assert trl_loss(batch, ["sigmoid"], label_smoothing=0.3)[0] == trl_loss(batch, ["sigmoid"])[0]
    assert (our_loss(batch, "sigmoid", label_smoothing=0.3)[0] - our_loss(batch, "sigmoid")[0]).abs() > 1e-2


@pytest.mark.parametrize(
    ("loss", "theirs", "ours"),
    [
        ("simpo", {"loss_type": "simpo", "simpo_gamma": 0.5}, {}),
        (
            "simpo",
            {"loss_type": "simpo", "simpo_gamma": 1.3, "label_smoothing": 0.2},
            {"gamma": 1.3, "label_smoothing": 0.2},
        ),
        ("alphapo", {"loss_type": "simpo", "simpo_gamma": 0.5, "alpha": 0.25}, {}),
        ("cpo", {"loss_type": "sigmoid", "label_smoothing": 0.1}, {"label_smoothing": 0.1, "cpo_alpha": 0.0}),
    ],
    ids=str,
)
def test_trainers_of_their_own_without_their_likelihood_terms(loss, theirs, ours):
    pytest.importorskip("trl", reason="the peers extra is not installed")
    from trl.experimental.cpo import CPOTrainer  # pyright: ignore[reportMissingImports]

    settings = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.0, "beta": BETA}
    fake: Any = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), **settings | theirs)
    policy, lengths, sides = _sums(loss)
    logps: Any = (policy / (lengths if loss != "cpo" else 1)).chunk(2)
    value = CPOTrainer.cpo_loss(fake, *logps)[0].mean()
    value.backward()
    given = policy.detach().clone().requires_grad_()
    found = pair_loss(given, None, *sides, loss=loss, beta=BETA, lengths=lengths, **ours)  # pyright: ignore[reportArgumentType]
    found.loss.backward()
    torch.testing.assert_close(found.loss, value)
    torch.testing.assert_close(gradient(given), gradient(policy))


def test_orpo_without_its_likelihood_term():
    """TRL's likelihood covers prompt and completion, ours the completion, as the paper's P(y|x) does."""
    pytest.importorskip("trl", reason="the peers extra is not installed")
    from trl.experimental.orpo import ORPOTrainer  # pyright: ignore[reportMissingImports]

    fake: Any = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), beta=BETA)
    policy, lengths, sides = _sums("orpo")
    logps: Any = (policy / lengths).chunk(2)
    value = -ORPOTrainer.odds_ratio_loss(fake, *logps)[0].mean()
    likelihood = -(policy / lengths)[:PAIRS].mean()
    (value + likelihood).backward()
    given = policy.detach().clone().requires_grad_()
    found = pair_loss(given, None, *sides, loss="orpo", beta=BETA, lengths=lengths)
    found.loss.backward()
    torch.testing.assert_close(found.loss, value + likelihood)
    torch.testing.assert_close(gradient(given), gradient(policy))


def _sums(loss: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Log-probs and lengths of completions, chosen first, and the pairs."""
    batch = Batch(3)
    sums = batch.logps.where(batch.rows, 0.0).sum(1)
    return sums.requires_grad_(), batch.lengths, (torch.arange(PAIRS), torch.arange(PAIRS, 2 * PAIRS))
