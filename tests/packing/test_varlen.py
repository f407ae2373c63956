"""The variable-length backend on the CPU: a reference function in plain torch drives its tables and windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dpo.attention
from dpo.attention import eager_segments, flash_segments
from dpo.errors import UserError
from dpo.model import prepare
from dpo.packing import pack
from dpo.varlen import default_varlen, gather_keys, torch_varlen, varlen_segments
from tests.packing.helpers import (
    MODELS,
    gradient_error,
    gradients,
    make_groups,
    make_model,
    packed_logps,
    plain_logps,
)


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window: tuple[int, int],
    softcap: float | None,
) -> Tensor:
    """What flash-attn documents: causal, aligned at the bottom right; query i sees keys within [i + k - q - left, i + k
    - q + right]."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == query.shape[0]
    assert cu_seqlens_k[-1] == key.shape[0]
    assert (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()) == (max_q, max_k)
    outputs = []
    offsets_q, offsets_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:], strict=False):
        repeat = query.shape[1] // key.shape[1]
        k, v = (x[k0:k1].repeat_interleave(repeat, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        diagonal = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        keys = torch.arange(k1 - k0)[None, :]
        left, right = window
        visible = keys <= diagonal + right
        if left >= 0:
            visible &= keys >= diagonal - left
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def heads(groups, seed: int = 0):
    segments = pack(groups).segments
    assert segments is not None
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, segments.q_stop[-1], count, 8) for count in (4, 2, 2)]
    return segments, [
        torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for shape in shapes
    ]


def value_and_gradients(function, tensors):
    out = function(*tensors)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 1000])
@pytest.mark.parametrize("completions", [(2, 2), (4, 1, 3)])
def test_backends_agree(completions, window, softcap):
    segments, tensors = heads(make_groups(completions))
    varlen = value_and_gradients(
        lambda q, k, v: varlen_segments(q, k, v, segments, reference_varlen, 0.3, window, softcap), tensors
    )
    eager = value_and_gradients(lambda q, k, v: eager_segments(q, k, v, segments, 0.3, window, softcap), tensors)
    for found, expected in zip(eager, varlen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if softcap is None:
        flash = value_and_gradients(lambda q, k, v: flash_segments(q, k, v, segments, 0.3, window), tensors)
        for found, expected in zip(flash, varlen, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_models_through_the_varlen_tables(name, monkeypatch):
    def through_varlen(query, key, value, segments, scale, window=None, softcap=None):
        return varlen_segments(query, key, value, segments, reference_varlen, scale, window, softcap)

    model = make_model(name, exact=True)
    groups = make_groups((2, 4, 3))
    expected = plain_logps(model, groups)
    expected_gradients = gradients(model, expected)
    monkeypatch.setattr(dpo.attention, "flash_segments", through_varlen)
    monkeypatch.setattr(dpo.attention, "eager_segments", through_varlen)
    for layout in ("shared", "packed"):
        prepare(model, layout)
        logps, _ = packed_logps(model, groups, layout)
        assert (logps - expected).abs().max() < 1e-10
        assert gradient_error(gradients(model, logps), expected_gradients) < 1e-10


def test_gather_backward_sums_copies_in_fp32():
    segments = pack(make_groups((6, 1, 2))).segments
    assert segments is not None
    rows = torch.randn(segments.q_stop[-1], 2, 4).bfloat16().requires_grad_()
    gathered = gather_keys(rows, segments)
    assert torch.equal(gathered, rows[segments.key_index])
    upstream = torch.randn(gathered.shape).bfloat16()
    (found,) = torch.autograd.grad(gathered, rows, upstream)
    exact = torch.zeros(rows.shape, dtype=torch.float64).index_add(0, segments.key_index, upstream.double())
    # one rounding to bf16 at the end, and no other
    assert torch.equal(found, exact.bfloat16())


def test_soft_capping_without_flash_attn_is_refused():
    if default_varlen(None) is not torch_varlen:
        pytest.skip("flash-attn is installed")
    with pytest.raises(UserError, match="soft-capping on CUDA needs flash-attn"):
        default_varlen(30.0)


def test_torch_function_still_has_the_arguments_we_pass():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(names)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7])
def test_cuda_varlen_against_the_reference(window):
    segments, tensors = heads(make_groups((2, 4, 3)))
    tensors = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in tensors]
    segments = segments.map(lambda tensor: tensor.cuda())
    found = value_and_gradients(
        lambda q, k, v: varlen_segments(q, k, v, segments, default_varlen(None), 0.3, window), tensors
    )
    wide = [x.detach().double().cpu().requires_grad_() for x in tensors]
    expected = value_and_gradients(
        lambda q, k, v: eager_segments(q, k, v, segments.map(lambda t: t.cpu()), 0.3, window, None), wide
    )
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double().cpu(), e, rtol=3e-2, atol=3e-2)
