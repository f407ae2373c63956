"""The arithmetic of the losses, as jit helpers shared by every kernel that ends in a loss.

T pairs. Log ratios, log-probs and scores are float64, margins and everything after them fp32; slopes are derivatives by
a completion's log-prob. `formulas.py` has the same on torch, `reference.py` the plain formulas that both are held to.
Order: functions, losses of a margin, all losses, weighted sums, what a launch needs to know.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from ..calls import NUMBERS_A_TERM, PairCall
from ..losses import DIVERGENCES, KERNEL_IDS, LOSSES

SIGMOID, ROBUST, HINGE = (tl.constexpr(KERNEL_IDS[name]) for name in ("sigmoid", "robust", "hinge"))
IPO, EXO, DISCOPOP = (tl.constexpr(KERNEL_IDS[name]) for name in ("ipo", "exo_pair", "discopop"))
NORM, NCA, BCO = (tl.constexpr(KERNEL_IDS[name]) for name in ("sigmoid_norm", "nca_pair", "bco_pair"))
SPPO, ZERO, DOWN = (tl.constexpr(KERNEL_IDS[name]) for name in ("sppo_hard", "apo_zero", "apo_down"))
SIMPO, ALPHA, ORPO = (tl.constexpr(KERNEL_IDS[name]) for name in ("simpo", "alphapo", "orpo"))
CPO, UNLIKELY, SFT = (tl.constexpr(KERNEL_IDS[name]) for name in ("cpo", "unlikelihood", "sft"))
REVERSE_KL, FORWARD_KL = tl.constexpr(DIVERGENCES.index("reverse_kl")), tl.constexpr(DIVERGENCES.index("forward_kl"))
JENSEN_SHANNON, ALPHA_DIVERGENCE = tl.constexpr(DIVERGENCES.index("js")), tl.constexpr(DIVERGENCES.index("alpha"))

LOG_2 = tl.constexpr(math.log(2.0))


@triton.jit
def quotient(a, b):
    """a / b for finite b that fp32 holds too. A float64 division is a call, for which its caller keeps registers on the
    stack: here two Newton steps from fp32, within 2 ulp.
    """
    if b.dtype == tl.float64:
        rough = (1.0 / b.to(tl.float32)).to(tl.float64)
        closer = rough * (2.0 - b * rough)
        found = a * (closer * (2.0 - b * closer))
    else:
        found = a / b
    return found


@triton.jit
def softplus(x):
    """log(1 + e^x) without overflow; log1p(u) = log(w) * u / (w - 1) with w = 1 + u keeps its relative accuracy for
    small u.
    """
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * quotient(u, tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) without overflow, accurate in both tails."""
    u = tl.exp(-tl.abs(x))
    return quotient(tl.where(x >= 0.0, 1.0, u), 1.0 + u)


@triton.jit
def sigmoid_slope(x):
    return sigmoid(x) * sigmoid(-x)


@triton.jit
def chain(slope, inner):
    """slope * inner in fp32; 0 where the slope is: a saturated loss stays flat where the inner function overflows."""
    return tl.where(slope == 0.0, 0.0, (slope * inner).to(tl.float32))


@triton.jit
def score(delta, alpha, DIVERGENCE: tl.constexpr):
    """(f'(e^delta), its derivative by delta), float64."""
    if DIVERGENCE == REVERSE_KL:
        value = delta
        slope = tl.full(delta.shape, 1.0, tl.float64)
    elif DIVERGENCE == JENSEN_SHANNON:
        value = LOG_2 - softplus(-delta)
        slope = sigmoid(-delta)
    else:
        rate = 1.0 if DIVERGENCE == FORWARD_KL else alpha
        slope = tl.exp(-rate * delta)
        value = (1.0 - slope) / rate
    return value, slope


@triton.jit
def margin_formula(m, beta, number, LOSS: tl.constexpr):
    """(loss, dloss/dm) of an fp32 margin; `number` is the smoothing, or DiscoPOP's temperature."""
    if LOSS == ROBUST:
        tilt = number / (1.0 - 2.0 * number)
        loss = softplus(-m) - tl.where(number > 0.0, tilt * m, 0.0)
        slope = -sigmoid(-m) - tilt
    elif LOSS == HINGE:
        loss = tl.where(m < 1.0, 1.0 - m, m - m)
        slope = tl.where(m < 1.0, -1.0, m - m)
    elif LOSS == IPO:
        gap = (m - 0.5) / beta
        loss = gap * gap
        slope = 2.0 * gap / beta
    elif LOSS == EXO:
        log_won = tl.log(1.0 - number)
        log_lost = tl.log(number)
        loss = sigmoid(m) * (-softplus(-m) - log_won) + sigmoid(-m) * (-softplus(m) - log_lost)
        slope = sigmoid_slope(m) * (m - (log_won - log_lost))
    elif LOSS == DISCOPOP:
        k = sigmoid(m / number)
        rest = sigmoid(-m / number)
        logistic = softplus(-m)
        exponential = tl.exp(-softplus(-m / number) - m)
        loss = logistic * rest + exponential
        slope = -sigmoid(-m) * rest - logistic * k * rest / number - exponential + exponential * rest / number
    else:
        # log sigmoid(-m) = log sigmoid(m) - m. Without smoothing an infinite margin must not meet 0 * inf.
        loss = softplus(-m) + tl.where(number > 0.0, number * m, 0.0)
        slope = number - sigmoid(-m)
    return loss, slope


@triton.jit
def odds(x):
    """(x - log(1 - e^x), its derivative) for float64 x < 0."""
    rest = 1.0 - tl.exp(x)
    return x - tl.log(rest), 1.0 / rest


@triton.jit
def pair_formula(
    won, lost, won_lp, lost_lp, won_share, lost_share, beta, first, second, alpha,
    LOSS: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """(loss, dloss/dwon, dloss/dlost), fp32: won and lost are log ratios, shares 1/n of losses that take means, else
    1; `first` and `second` are the loss's numbers.
    """
    if (LOSS == NCA) | (LOSS == BCO) | (LOSS == ZERO) | (LOSS == DOWN):
        r_w = (won * beta - (first if LOSS == BCO else 0.0)).to(tl.float32)
        r_l = (lost * beta - (first if LOSS == BCO else 0.0)).to(tl.float32)
        if LOSS == NCA:
            loss = softplus(-r_w) + 0.5 * softplus(r_w) + 0.5 * softplus(r_l)
            d_won = beta * (0.5 * sigmoid(r_w) - sigmoid(-r_w))
            d_lost = 0.5 * beta * sigmoid(r_l)
        elif LOSS == BCO:
            loss = softplus(-r_w) + softplus(r_l)
            d_won = -beta * sigmoid(-r_w)
            d_lost = beta * sigmoid(r_l)
        elif LOSS == ZERO:
            loss = sigmoid(-r_w) + sigmoid(r_l)
            d_won = -beta * sigmoid_slope(r_w)
            d_lost = beta * sigmoid_slope(r_l)
        else:
            m = ((won - lost) * beta).to(tl.float32)
            loss = sigmoid(r_w) + sigmoid(-m)
            d_lost = beta * sigmoid_slope(m)
            d_won = beta * sigmoid_slope(r_w) - d_lost
    elif LOSS == SPPO:
        a = (won - 0.5 / beta).to(tl.float32)
        b = (lost + 0.5 / beta).to(tl.float32)
        loss = a * a + b * b
        d_won = 2.0 * a
        d_lost = 2.0 * b
    elif (LOSS == UNLIKELY) | (LOSS == SFT):
        weight = first if LOSS == UNLIKELY else 0.0
        d_won = -won_share.to(tl.float32)
        d_lost = weight * lost_share.to(tl.float32)
        loss = -(won_lp * won_share).to(tl.float32)
        if LOSS == UNLIKELY:
            loss += weight * (lost_lp * lost_share).to(tl.float32)
    elif LOSS == ORPO:
        x_w = won_lp * won_share
        o_w, slope_w = odds(x_w)
        o_l, slope_l = odds(lost_lp * lost_share)
        m = (o_w - o_l).to(tl.float32)
        slope = beta * sigmoid(-m)
        loss = beta * softplus(-m) - x_w.to(tl.float32)
        d_won = -((1.0 + slope * slope_w) * won_share).to(tl.float32)
        d_lost = (slope * slope_l * lost_share).to(tl.float32)
    elif LOSS == CPO:
        m = ((won_lp - lost_lp) * beta).to(tl.float32)
        loss, slope = margin_formula(m, beta, first, SIGMOID)
        loss -= second * (won_lp * won_share).to(tl.float32)
        d_won = beta * slope - second * won_share.to(tl.float32)
        d_lost = -beta * slope
    elif (LOSS == SIMPO) | (LOSS == ALPHA):
        s_w, slope_w = score(won_lp * won_share, first, ALPHA_DIVERGENCE if LOSS == ALPHA else REVERSE_KL)
        s_l, slope_l = score(lost_lp * lost_share, first, ALPHA_DIVERGENCE if LOSS == ALPHA else REVERSE_KL)
        m = ((s_w - s_l) * beta - second).to(tl.float32)
        loss, slope = margin_formula(m, beta, first if LOSS == SIMPO else 0.0, SIGMOID)
        d_won = chain(beta * slope, slope_w * won_share)
        d_lost = -chain(beta * slope, slope_l * lost_share)
    else:
        s_w, slope_w = score(won, alpha, DIVERGENCE)
        s_l, slope_l = score(lost, alpha, DIVERGENCE)
        m = ((s_w * won_share - s_l * lost_share) * beta).to(tl.float32)
        loss, slope = margin_formula(m, beta, first, LOSS)
        d_won = chain(beta * slope, slope_w * won_share)
        d_lost = -chain(beta * slope, slope_l * lost_share)
    return loss, d_won, d_lost


@triton.jit
def sum_of_losses(won, lost, won_lp, lost_lp, won_share, lost_share, beta, numbers, TERMS: tl.constexpr):
    """The weighted sum of the terms; shares are 1/n."""
    value = tl.zeros(won.shape, tl.float32)
    won_slope = tl.zeros(won.shape, tl.float32)
    lost_slope = tl.zeros(won.shape, tl.float32)
    one = tl.full(won.shape, 1.0, tl.float64)
    for t in tl.static_range(len(TERMS)):
        weight, first, second, alpha = numbers[t]
        loss, d_won, d_lost = pair_formula(
            won, lost, won_lp, lost_lp, won_share if TERMS[t] % 2 else one, lost_share if TERMS[t] % 2 else one,
            beta, first, second, alpha, TERMS[t] // 8, TERMS[t] // 2 % 4,
        )  # fmt: skip
        value += weight * loss
        won_slope += weight * d_won
        lost_slope += weight * d_lost
    return value, won_slope, lost_slope


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A `PairCall` as launches take it."""

    codes: tuple[int, ...]
    """Of each term: 8 * loss + 2 * divergence + whether it divides by lengths."""
    numbers: tuple[float, ...]
    """Four a term."""
    beta: float
    mean_rewards: bool
    reduction: str

    @classmethod
    def of(cls, call: PairCall) -> "KernelCall":
        return cls(tuple(call.codes), tuple(call.numbers), call.beta, call.mean_rewards, call.reduction)

    @property
    def term_numbers(self) -> tuple[tuple[float, ...], ...]:
        """The numbers of each term."""
        starts = range(0, len(self.numbers), NUMBERS_A_TERM)
        return tuple(tuple(self.numbers[i : i + NUMBERS_A_TERM]) for i in starts)

    @property
    def lengths(self) -> bool:
        return self.mean_rewards or any(code % 2 for code in self.codes)

    @property
    def mixed(self) -> bool:
        """Whether some terms are of log ratios and some of the policy's log-probs."""
        names = list(KERNEL_IDS)
        return len({LOSSES[names[code // 8]].reference for code in self.codes}) > 1
