"""Float64 truth and error bounds for the kernels on logits. N rows, V vocabulary."""

import torch

ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place, relative, that storing a gradient in the logits' dtype costs."""
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}


def scores(logits, *, logit_scale=1.0, temperature=1.0, softcap=None):
    z = logits * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logps_and_gradient(logits, targets, upstream, dtype, ignore_index=-100, **scaling):
    """(log-probs, dL/dlogits, dL/dz scale) by torch in `dtype`, from the values that `logits` holds."""
    x = logits.detach().to(dtype).requires_grad_()
    keep = targets != ignore_index
    logps = torch.log_softmax(scores(x, **scaling), -1).gather(-1, targets.where(keep, 0)[..., None])[..., 0]
    logps = torch.where(keep, logps, 0.0)
    logps.backward(upstream.to(dtype).view(logps.shape))
    assert x.grad is not None
    return logps.detach().double(), x.grad.double()


def ulp(values: torch.Tensor) -> torch.Tensor:
    """Distance to the next fp32 number, in float64."""
    values = values.float().abs()
    return (torch.nextafter(values, torch.full_like(values, torch.inf)) - values).double()


def assert_as_good_as_torch(logps, gradient, logits, targets, upstream, **scaling):
    """Error against float64, row by row: at most torch's own in fp32 plus 2 ulp for log-probs, 1e-6 |g| for gradients.

    An ulp is that of the log-prob or of 1, whichever is larger: a log-prob near 0 is the log of a sum near 1, which
    fp32 holds to an ulp of 1, and torch's own error is none in some rows, by luck.
    """
    truth, true_gradient = logps_and_gradient(logits, targets, upstream, torch.float64, **scaling)
    torchs, torchs_gradient = logps_and_gradient(logits, targets, upstream, torch.float32, **scaling)
    finite = torch.isfinite(truth)
    ours = logps.double().view(truth.shape)
    assert torch.equal(ours[~finite], truth[~finite])
    if finite.any():
        allowed = (torchs - truth)[finite].abs() + 2 * ulp(truth[finite].abs().clamp(min=1.0))
        assert ((ours - truth)[finite].abs() <= allowed).all()
    g = upstream.double().abs().view(truth.shape)[..., None]
    slope = scaling.get("logit_scale", 1.0) / scaling.get("temperature", 1.0)
    error = (gradient.double() - true_gradient).abs()
    rounding = ROUNDING[gradient.dtype] * true_gradient.abs() + SMALLEST[gradient.dtype]
    torch_error = (torchs_gradient - true_gradient).abs().amax(-1, keepdim=True)
    assert (error - rounding <= torch_error + 1e-6 * g * max(1.0, abs(slope))).all()
