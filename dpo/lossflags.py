"""The settings of `dpo train` that choose a loss, and the checks that no other setting is given with it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from dpo.errors import UserError

if TYPE_CHECKING:
    from dpo_kernels import PairCall


@dataclass(frozen=True, kw_only=True)
class LossFlags:
    """A loss and its options. One that the loss does not use is an error; `dpo losses` prints who uses what."""

    loss: str = "sigmoid"
    """The objective, or a weighted sum such as sigmoid:1,sft:0.1.
    sigmoid (the paper's), robust, hinge, ipo, exo_pair, nca_pair,
    bco_pair, sppo_hard, apo_zero, apo_down, discopop, aot, aot_unpaired,
    sigmoid_norm, simpo, alphapo, orpo, cpo, unlikelihood, sft.
    `dpo losses` explains each."""
    label_smoothing: float | None = None
    """Probability that a preference is labelled the wrong way round (conservative DPO). None: the loss's own."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = None
    """What holds the policy to the reference, for losses of a margin. None: reverse KL, as the paper has it."""
    f_alpha: float | None = None
    """With --f-divergence alpha: near 0 reverse KL, 1 forward KL. None: 0.5."""
    token_reduction: Literal["mean", "sum"] | None = None
    """A completion's log-probs as mean over its tokens or as sum: ipo, cpo, unlikelihood, sft. None: the loss's own."""
    discopop_tau: float | None = None
    """Temperature of discopop's blend. None: 0.05."""
    gamma: float | None = None
    """Margin that simpo and alphapo ask for. None: 0.5."""
    alphapo_alpha: float | None = None
    """Shape of alphapo's reward. None: 0.25."""
    cpo_alpha: float | None = None
    """Weight of cpo's likelihood term. None: 1."""
    unlikelihood_alpha: float | None = None
    """Weight of the rejected completion in unlikelihood. None: 1."""
    bco_baseline: Literal["running", "none"] | None = None
    """What bco_pair takes from its rewards: the mean of all rewards so far (the paper), or none. None: running."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the tokens beyond the length of a pair's shorter completion. None: 1, plain."""
    ld_reference: bool = True
    """With --ld-alpha: weigh the reference's tokens too."""
    wpo: bool = False
    """WPO: weigh pairs by how likely the policy is to write them itself."""

    @property
    def loss_options(self) -> dict[str, Any]:
        """The options that were given, as `dpo_kernels` takes them."""
        options = {field.name: getattr(self, field.name) for field in fields(LossFlags) if field.name != "loss"}
        if options["bco_baseline"] is not None:
            options["bco_baseline"] = 0.0
        return {name: value for name, value in options.items() if value is not None}

    @property
    def running_baseline(self) -> bool:
        """Whether the loss keeps the mean of all rewards so far."""
        return self.pair_call().coupled == "state" and self.bco_baseline != "none"

    @property
    def needs_whole_step(self) -> bool:
        """Whether the loss of a pair depends on other pairs of its step."""
        return self.pair_call().coupled == "batch" or self.running_baseline

    def pair_call(self, beta: float = 0.1) -> PairCall:
        """The loss as the kernels take it.

        Raises:
            UserError: an unknown loss, or an option that it does not use or that has a wrong value.
        """
        from dpo_kernels import PairCall

        try:
            return PairCall.check(self.loss, beta, "sum", **self.loss_options)
        except ValueError as error:
            name, colon, rest = str(error).partition(":")
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}{colon}{rest}".replace("expected none", "expected no such flag")) from None

    def resolve_reference(self, reference: str, reference_model: str | None, reduction: str) -> str:
        """What --reference auto stands for; refuses what the loss cannot use.

        Raises:
            UserError: naming the flag and the loss.
        """
        call = self.pair_call()
        if call.coupled == "batch" and reduction != "pairs":
            raise UserError(f"--reduction: expected pairs with --loss {self.loss}, which sorts them, found {reduction}")
        if call.reference:
            if reference == "none":
                raise UserError(f"--reference: expected a reference for --loss {self.loss}, found none")
            return "cached" if reference == "auto" else reference
        if reference not in ("auto", "none"):
            raise UserError(f"--reference: expected none with --loss {self.loss}, which uses none, found {reference}")
        if reference_model is not None:
            raise UserError(
                f"--reference-model: expected none with --loss {self.loss}, which uses none, found {reference_model}"
            )
        return "none"
