"""The arithmetic of the losses, as jit helpers shared by every kernel that ends in a loss.

C completions, T pairs, R rankings. Deltas are log ratios, policy minus reference, in float64; slopes are dloss/ddelta
in fp32.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOSS_IDS = {"sigmoid": 0}
"""Names of `pairs.LOSSES` that the kernels know, and the constant that selects each."""

SIGMOID = tl.constexpr(0)


@triton.jit
def softplus(x):
    """log(1 + e^x) without overflow; log1p(u) = log(w) * u / (w - 1) with w = 1 + u keeps its relative accuracy for
    small u.
    """
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) without overflow, accurate in both tails."""
    u = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, u) / (1.0 + u)


@triton.jit
def pair_formula(won, lost, beta, smoothing, LOSS: tl.constexpr):
    """(loss, dloss/dwon, dloss/dlost) of pairs with float64 log ratios.

    sigmoid: -(1-e) log sigmoid(m) - e log sigmoid(-m), m = beta (won - lost); dL/dm = e - sigmoid(-m).
    """
    tl.static_assert(LOSS == SIGMOID)
    margin = ((won - lost) * beta).to(tl.float32)
    # log sigmoid(-m) = log sigmoid(m) - m. Without smoothing an infinite margin must not meet 0 * inf.
    loss = softplus(-margin) + tl.where(smoothing > 0.0, smoothing * margin, 0.0)
    slope = beta * (smoothing - sigmoid(-margin))
    return loss, slope, -slope
