"""The arithmetic of every pairwise loss in float64, each with its gradient worked by hand.

T pairs. delta is a completion's log ratio of policy to reference, lp its log-prob under the policy, n its tokens. With
softplus(x) = log(1 + e^x): -log sigmoid(m) = softplus(-m), whose derivative is -sigmoid(-m).
Order: pieces, losses of a margin, losses of each side, losses that couple the batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Options = Mapping[str, Any]
"""Values of the options that a loss uses."""


class Side(NamedTuple):
    """The chosen or the rejected completions of T pairs, float64 [T] each."""

    delta: Tensor
    """Log ratio, policy less reference; the policy's log-prob where there is no reference."""
    ref: Tensor
    """The reference's log-prob, or zero."""
    logp: Tensor
    """The policy's log-prob."""
    length: Tensor
    """Number of tokens, at least 1."""


Terms = tuple[Tensor, Tensor, Tensor]
"""loss [T], and its derivatives by the log-prob of the chosen and of the rejected completion [T]."""

Formula = Callable[[Side, Side, float, Options], Terms]
Shape = Callable[[Tensor, float, Options], tuple[Tensor, Tensor]]
"""(margin [T], beta, options) -> loss [T], dloss/dmargin [T]."""


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) with full relative accuracy (torch's turns linear at 20)."""
    return -F.logsigmoid(-x)


def sigmoid_slope(x: Tensor) -> Tensor:
    """sigmoid'(x) = sigmoid(x) sigmoid(-x)."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def chain(slope: Tensor, inner: Tensor) -> Tensor:
    """slope * inner, 0 where the slope is 0: a saturated loss stays flat where the inner function overflows."""
    return torch.where(slope == 0, 0.0, slope * inner)


def divergence_score(delta: Tensor, kind: str, alpha: float) -> tuple[Tensor, Tensor]:
    """f'(u) at u = e^delta, which takes the place of log u in a reward, and its derivative by delta.

    reverse KL log u; forward KL 1 - 1/u; Jensen-Shannon log(2u / (1 + u)); alpha (1 - u^-alpha) / alpha
    (Wang et al. 2023, arXiv:2309.16240, table 1, each with the constant that makes f'(1) = 0).
    """
    if kind == "reverse_kl":
        return delta, torch.ones_like(delta)
    if kind == "js":
        return F.logsigmoid(delta) + math.log(2.0), torch.sigmoid(-delta)
    rate = 1.0 if kind == "forward_kl" else alpha
    return -torch.expm1(-rate * delta) / rate, torch.exp(-rate * delta)


def token_mean(value: Tensor, length: Tensor, options: Options) -> Tensor:
    return value / length if options["token_reduction"] == "mean" else value


# Losses of a margin m = beta (s_w - s_l), s the score of a completion: dL/ds_w = beta dL/dm = -dL/ds_l.


def margin_loss(shape: Shape, *, mean: bool = False) -> Formula:
    """A loss of the margin between log ratios, or f-divergence scores; over lengths where it is a mean by definition or
    by `token_reduction`.
    """

    def formula(won: Side, lost: Side, beta: float, options: Options) -> Terms:
        kind, alpha = options["f_divergence"], options["f_alpha"]
        (s_w, ds_w), (s_l, ds_l) = (divergence_score(side.delta, kind, alpha) for side in (won, lost))
        if mean or options.get("token_reduction") == "mean":
            s_w, ds_w, s_l, ds_l = s_w / won.length, ds_w / won.length, s_l / lost.length, ds_l / lost.length
        loss, slope = shape(beta * (s_w - s_l), beta, options)
        return loss, chain(beta * slope, ds_w), -chain(beta * slope, ds_l)

    return formula


def sigmoid_shape(m: Tensor, beta: float, options: Options) -> tuple[Tensor, Tensor]:
    """-(1-e) log sigmoid(m) - e log sigmoid(-m) = softplus(-m) + e m; dL/dm = e - sigmoid(-m)."""
    epsilon = options["label_smoothing"]
    loss, slope = softplus(-m), -torch.sigmoid(-m)
    return (loss + epsilon * m, slope + epsilon) if epsilon else (loss, slope)


def robust_shape(m: Tensor, beta: float, options: Options) -> tuple[Tensor, Tensor]:
    """[-(1-e) log sigmoid(m) + e log sigmoid(-m)] / (1-2e) = softplus(-m) - m e / (1-2e)."""
    epsilon = options["label_smoothing"]
    tilt = epsilon / (1.0 - 2.0 * epsilon)
    loss, slope = softplus(-m), -torch.sigmoid(-m)
    return (loss - tilt * m, slope - tilt) if epsilon else (loss, slope)


def hinge_shape(m: Tensor, beta: float, options: Options) -> tuple[Tensor, Tensor]:
    """max(0, 1 - m); dL/dm = -1 where m < 1."""
    return torch.relu(1.0 - m), -(m < 1.0).to(m.dtype)


def ipo_shape(m: Tensor, beta: float, options: Options) -> tuple[Tensor, Tensor]:
    """(h - 1/(2 beta))^2 with h = m / beta; dL/dm = 2 (h - 1/(2 beta)) / beta."""
    gap = (m - 0.5) / beta
    return gap * gap, 2.0 * gap / beta


def exo_shape(m: Tensor, beta: float, options: Options) -> tuple[Tensor, Tensor]:
    """KL(q || p), q = (sigmoid(m), sigmoid(-m)), p = (1-e, e); dL/dm = sigmoid'(m) (m - log((1-e)/e))."""
    epsilon = options["label_smoothing"]
    log_won, log_lost = math.log1p(-epsilon), math.log(epsilon)
    won = torch.sigmoid(m) * (F.logsigmoid(m) - log_won)
    lost = torch.sigmoid(-m) * (F.logsigmoid(-m) - log_lost)
    return won + lost, sigmoid_slope(m) * (m - (log_won - log_lost))


def discopop_shape(m: Tensor, beta: float, options: Options) -> tuple[Tensor, Tensor]:
    """softplus(-m) (1-k) + e^-m k, k = sigmoid(m / tau), dk/dm = k (1-k) / tau; e^-m k as one exponential."""
    tau = options["discopop_tau"]
    k, rest = torch.sigmoid(m / tau), torch.sigmoid(-m / tau)
    logistic, exponential = softplus(-m), torch.exp(F.logsigmoid(m / tau) - m)
    slope = -torch.sigmoid(-m) * rest - logistic * k * rest / tau - exponential + exponential * rest / tau
    return logistic * rest + exponential, slope


# Losses of each side's reward r = beta delta.


def nca_pair(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """-log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l)."""
    r_w, r_l = beta * won.delta, beta * lost.delta
    loss = softplus(-r_w) + 0.5 * softplus(r_w) + 0.5 * softplus(r_l)
    d_won = 0.5 * torch.sigmoid(r_w) - torch.sigmoid(-r_w)
    return loss, beta * d_won, 0.5 * beta * torch.sigmoid(r_l)


def bco_pair(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """-log sigmoid(r_w - b) - log sigmoid(-(r_l - b)); the baseline b is a constant."""
    r_w, r_l = beta * won.delta - options["bco_baseline"], beta * lost.delta - options["bco_baseline"]
    return softplus(-r_w) + softplus(r_l), -beta * torch.sigmoid(-r_w), beta * torch.sigmoid(r_l)


def sppo_hard(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """(delta_w - 1/(2 beta))^2 + (delta_l + 1/(2 beta))^2."""
    a, b = won.delta - 0.5 / beta, lost.delta + 0.5 / beta
    return a * a + b * b, 2.0 * a, 2.0 * b


def apo_zero(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """1 - sigmoid(r_w) + sigmoid(r_l)."""
    r_w, r_l = beta * won.delta, beta * lost.delta
    return torch.sigmoid(-r_w) + torch.sigmoid(r_l), -beta * sigmoid_slope(r_w), beta * sigmoid_slope(r_l)


def apo_down(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l)."""
    r_w, m = beta * won.delta, beta * (won.delta - lost.delta)
    apart = beta * sigmoid_slope(m)
    return torch.sigmoid(r_w) + torch.sigmoid(-m), beta * sigmoid_slope(r_w) - apart, apart


# Losses of the policy's own log-probs.


def simpo(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """The sigmoid loss of m = beta (lp_w/n_w - lp_l/n_l) - gamma."""
    m = beta * (won.logp / won.length - lost.logp / lost.length) - options["gamma"]
    loss, slope = sigmoid_shape(m, beta, options)
    return loss, beta * slope / won.length, -beta * slope / lost.length


def alphapo(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """The sigmoid loss of m = beta (s_w - s_l) - gamma, s = (1 - p^-alpha) / alpha, p = e^(lp/n)."""
    sides = (divergence_score(side.logp / side.length, "alpha", options["alphapo_alpha"]) for side in (won, lost))
    (s_w, ds_w), (s_l, ds_l) = sides
    loss, slope = sigmoid_shape(beta * (s_w - s_l) - options["gamma"], beta, {"label_smoothing": 0.0})
    return loss, chain(beta * slope, ds_w / won.length), -chain(beta * slope, ds_l / lost.length)


def orpo(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """-x_w - beta log sigmoid(o(x_w) - o(x_l)), x = lp/n, o(x) = x - log(1 - e^x); do/dx = 1 / (1 - e^x)."""
    x_w, x_l = won.logp / won.length, lost.logp / lost.length
    m = x_w - log1mexp(x_w) - x_l + log1mexp(x_l)
    slope = beta * torch.sigmoid(-m)
    d_won, d_lost = -1.0 + slope / torch.expm1(x_w), -slope / torch.expm1(x_l)
    return beta * softplus(-m) - x_w, d_won / won.length, d_lost / lost.length


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0."""
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def cpo(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """The sigmoid loss of m = beta (lp_w - lp_l), plus cpo_alpha times the negative log-likelihood of the chosen."""
    loss, slope = sigmoid_shape(beta * (won.logp - lost.logp), beta, options)
    likelihood = options["cpo_alpha"] * token_mean(torch.ones_like(won.logp), won.length, options)
    return loss - likelihood * won.logp, beta * slope - likelihood, -beta * slope


def unlikelihood(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """-lp_w + alpha lp_l."""
    up, down = (token_mean(torch.ones_like(side.logp), side.length, options) for side in (won, lost))
    down = options["unlikelihood_alpha"] * down
    return down * lost.logp - up * won.logp, -up, down


def sft(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """-lp_w."""
    up = token_mean(torch.ones_like(won.logp), won.length, options)
    return -up * won.logp, -up, torch.zeros_like(up)


# Losses that sort the batch: its k-th smallest value is compared with the k-th smallest of the other side. The order is
# a constant of the gradient.


def aot(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """Margins of the policy against margins of the reference: m_k = beta (u_(k) - v_(k))."""
    ref = won.ref - lost.ref
    policy = (won.delta + won.ref) - (lost.delta + lost.ref)
    place, other = policy.argsort(stable=True), ref.argsort(stable=True)
    loss, slope = sigmoid_shape(beta * (policy[place] - ref[other]), beta, options)
    d_won = torch.empty_like(slope).index_copy_(0, place, beta * slope)
    return torch.empty_like(loss).index_copy_(0, place, loss), d_won, -d_won


def aot_unpaired(won: Side, lost: Side, beta: float, options: Options) -> Terms:
    """Log ratios of the chosen against those of the rejected: m_k = beta (delta_w(k) - delta_l(k))."""
    place, other = won.delta.argsort(stable=True), lost.delta.argsort(stable=True)
    loss, slope = sigmoid_shape(beta * (won.delta[place] - lost.delta[other]), beta, options)
    d_won = torch.empty_like(slope).index_copy_(0, place, beta * slope)
    d_lost = torch.empty_like(slope).index_copy_(0, other, -beta * slope)
    return torch.empty_like(loss).index_copy_(0, place, loss), d_won, d_lost
