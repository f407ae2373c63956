"""The paper's own function (Rafailov et al. 2023, arXiv:2305.18290, Appendix B), same arguments, same results.

Shapes: C completions, T pairs.
"""

from torch import Tensor

from .pairs import pair_loss


def dpo_loss(
    pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """pi_logps, ref_logps [C] log-probs of completions; yw_idxs, yl_idxs [T] preferred and dispreferred completions.

    Returns losses [T] (not reduced) and rewards [C] = beta * (pi_logps - ref_logps), detached.
    """
    losses = pair_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta=beta, reduction="none").loss
    return losses, beta * (pi_logps - ref_logps).detach()
