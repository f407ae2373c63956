"""The losses as their papers write them: plain torch, autograd, any dtype. Calls none of our kernels.

T pairs. Every other implementation (`formulas.py`, `tri/losses.py`) is held to these.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Completions(NamedTuple):
    """One side of T pairs: log-probs of policy and reference, tokens [T]."""

    policy: Tensor
    ref: Tensor
    length: Tensor

    @property
    def ratio(self) -> Tensor:
        return self.policy - self.ref

    @property
    def mean(self) -> Tensor:
        return self.policy / self.length


def score(ratio: Tensor, options: dict[str, Any]) -> Tensor:
    """f'(pi / pi_ref) of f-DPO, 0 where they are equal."""
    u, kind = ratio.exp(), options.get("f_divergence", "reverse_kl")
    if kind == "reverse_kl":
        return ratio
    if kind == "forward_kl":
        return 1.0 - 1.0 / u
    if kind == "js":
        return torch.log(2.0 * u / (1.0 + u))
    alpha = options.get("f_alpha", 0.5)
    return (1.0 - u**-alpha) / alpha


def margin(w: Completions, y: Completions, beta: float, o: dict[str, Any], *, mean: bool = False) -> Tensor:
    s_w, s_l = score(w.ratio, o), score(y.ratio, o)
    return beta * (s_w / w.length - s_l / y.length) if mean else beta * (s_w - s_l)


def cross_entropy(m: Tensor, epsilon: float) -> Tensor:
    return -(1.0 - epsilon) * F.logsigmoid(m) - epsilon * F.logsigmoid(-m)


def sigmoid(w, y, beta, o):
    return cross_entropy(margin(w, y, beta, o), o.get("label_smoothing", 0.0))


def robust(w, y, beta, o):
    m, epsilon = margin(w, y, beta, o), o.get("label_smoothing", 0.1)
    return (-(1.0 - epsilon) * F.logsigmoid(m) + epsilon * F.logsigmoid(-m)) / (1.0 - 2.0 * epsilon)


def hinge(w, y, beta, o):
    return (1.0 - margin(w, y, beta, o)).clamp(min=0.0)


def ipo(w, y, beta, o):
    h = margin(w, y, 1.0, o, mean=o.get("token_reduction", "mean") == "mean")
    return (h - 1.0 / (2.0 * beta)) ** 2


def exo_pair(w, y, beta, o):
    m, epsilon = margin(w, y, beta, o), o.get("label_smoothing", 1e-3)
    q = torch.stack([m, torch.zeros_like(m)]).log_softmax(0)
    p = torch.tensor([math.log(1.0 - epsilon), math.log(epsilon)], dtype=m.dtype)
    return (q.exp() * (q - p[:, None])).sum(0)


def nca_pair(w, y, beta, o):
    r_w, r_l = beta * w.ratio, beta * y.ratio
    return -F.logsigmoid(r_w) - 0.5 * F.logsigmoid(-r_w) - 0.5 * F.logsigmoid(-r_l)


def bco_pair(w, y, beta, o):
    baseline = o.get("bco_baseline", 0.0)
    return -F.logsigmoid(beta * w.ratio - baseline) - F.logsigmoid(-(beta * y.ratio - baseline))


def sppo_hard(w, y, beta, o):
    return (w.ratio - 1.0 / (2.0 * beta)) ** 2 + (y.ratio + 1.0 / (2.0 * beta)) ** 2


def apo_zero(w, y, beta, o):
    return 1.0 - torch.sigmoid(beta * w.ratio) + torch.sigmoid(beta * y.ratio)


def apo_down(w, y, beta, o):
    return torch.sigmoid(beta * w.ratio) + 1.0 - torch.sigmoid(beta * (w.ratio - y.ratio))


def discopop(w, y, beta, o):
    m = margin(w, y, beta, o)
    k = torch.sigmoid(m / o.get("discopop_tau", 0.05))
    return -(1.0 - k) * F.logsigmoid(m) + k * torch.exp(-m)


def aot(w, y, beta, o):
    u, v = w.policy - y.policy, w.ref - y.ref
    return _in_place_of(u, cross_entropy(beta * (u.sort().values - v.sort().values), o.get("label_smoothing", 0.0)))


def aot_unpaired(w, y, beta, o):
    m = beta * (w.ratio.sort().values - y.ratio.sort().values)
    return _in_place_of(w.ratio, cross_entropy(m, o.get("label_smoothing", 0.0)))


def _in_place_of(values: Tensor, losses: Tensor) -> Tensor:
    """Losses of sorted values, each given to the pair whose value it was."""
    return losses[values.detach().argsort().argsort()]


def sigmoid_norm(w, y, beta, o):
    return cross_entropy(margin(w, y, beta, o, mean=True), o.get("label_smoothing", 0.0))


def simpo(w, y, beta, o):
    return cross_entropy(beta * (w.mean - y.mean) - o.get("gamma", 0.5), o.get("label_smoothing", 0.0))


def alphapo(w, y, beta, o):
    alpha = o.get("alphapo_alpha", 0.25)
    r_w, r_l = ((1.0 - side.mean.exp() ** -alpha) / alpha for side in (w, y))
    return -F.logsigmoid(beta * (r_w - r_l) - o.get("gamma", 0.5))


def orpo(w, y, beta, o):
    odds_w, odds_l = (side.mean.exp() / (1.0 - side.mean.exp()) for side in (w, y))
    return -w.mean - beta * F.logsigmoid(torch.log(odds_w / odds_l))


def cpo(w, y, beta, o):
    likelihood = w.mean if o.get("token_reduction", "mean") == "mean" else w.policy
    preference = cross_entropy(beta * (w.policy - y.policy), o.get("label_smoothing", 0.0))
    return preference - o.get("cpo_alpha", 1.0) * likelihood


def unlikelihood(w, y, beta, o):
    mean = o.get("token_reduction", "sum") == "mean"
    return -(w.mean if mean else w.policy) + o.get("unlikelihood_alpha", 1.0) * (y.mean if mean else y.policy)


def sft(w, y, beta, o):
    return -(w.mean if o.get("token_reduction", "mean") == "mean" else w.policy)


FORMULAS: dict[str, Callable[[Completions, Completions, float, dict[str, Any]], Tensor]] = {
    f.__name__: f
    for f in (
        *(sigmoid, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, discopop, aot),
        *(aot_unpaired, sigmoid_norm, simpo, alphapo, orpo, cpo, unlikelihood, sft),
    )
}


def sum_of_losses(
    loss: str, chosen: Completions, rejected: Completions, beta: float, options: dict[str, Any]
) -> Tensor:
    """[T] of "sigmoid" or "sigmoid:1,sft:0.1"."""
    parts = (part.split(":") for part in loss.split(","))
    return sum(
        (float((*weight, 1)[0]) * FORMULAS[name](chosen, rejected, beta, options) for name, *weight in parts),
        torch.zeros_like(chosen.policy),
    )
