"""Run ordinary ``@triton.jit`` kernels on CPU tensors, with bf16 that rounds like torch.

    with interpret():
        kernel[grid](...)

Triton's stock interpreter must be chosen by an environment variable before the first import, truncates fp32 -> bf16 and
does arithmetic on raw bf16 bits. Here it is switched on for a block and off again (compiling works before and after),
bf16 is widened before every operation and rounded to nearest even after it, and the functions of `triton.language`
are patched once per block rather than once per call. CPU tensors are used where they lie, so that views with huge
strides cost nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

Builder, Handle, BF16 = stock.InterpreterBuilder, stock.TensorHandle, tl.bfloat16


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bit patterns (uint16), round to nearest even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _is_bf16(handle) -> bool:
    return isinstance(handle, Handle) and not isinstance(handle.dtype, tl.pointer_type) and handle.dtype.scalar == BF16


def _widen(handle):
    return Handle(from_bf16_bits(handle.data), tl.float32) if _is_bf16(handle) else handle


def _binary_op(self, left, right, op, stock_op=Builder.binary_op):
    if not (_is_bf16(left) or _is_bf16(right)):
        return stock_op(self, left, right, op)
    out = op(_widen(left).data, _widen(right).data)
    return Handle(out, tl.int1) if out.dtype == bool else Handle(to_bf16_bits(out), BF16)


def _unary_op(self, arg, op, stock_op=Builder.unary_op):
    return Handle(to_bf16_bits(op(from_bf16_bits(arg.data))), BF16) if _is_bf16(arg) else stock_op(self, arg, op)


def _cast_impl(self, src, dst_type, stock_op=Builder.cast_impl):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == BF16:
        return _widen(src) if target == tl.float32 else stock_op(self, _widen(src), dst_type)
    if target == BF16:
        return Handle(to_bf16_bits(src.data.astype(np.float32)), BF16)
    return stock_op(self, src, dst_type)


def _fp_to_fp(self, src, dst_type, rounding, stock_op=Builder.create_fp_to_fp):
    nearest = rounding == stock._ir.ROUNDING_MODE.RTNE
    if src.dtype.scalar == tl.float32 and dst_type.scalar == BF16 and nearest:
        return Handle(to_bf16_bits(src.data), BF16)
    return stock_op(self, src, dst_type, rounding)


def _dot(self, a, b, acc, precision, imprecise, stock_op=Builder.create_dot):
    return stock_op(self, _widen(a), _widen(b), acc, precision, imprecise)


def _fma(self, x, y, z, stock_op=Builder.create_fma):
    if not _is_bf16(z):
        return stock_op(self, x, y, z)
    return Handle(to_bf16_bits(_widen(x).data * _widen(y).data + _widen(z).data), BF16)


def _reduce_sum(self, tensor, stock_op=stock.ReduceOps.sum):
    if tensor.dtype != BF16:
        return stock_op(self, tensor)
    total = np.sum(from_bf16_bits(tensor.handle.data), axis=self.axis, keepdims=self.keep_dims)
    bits = to_bf16_bits(np.atleast_1d(np.asarray(total)))
    return self.to_tensor(bits if np.ndim(total) else bits[0], BF16)


_PATCHES = [
    (Builder, "binary_op", _binary_op),
    (Builder, "unary_op", _unary_op),
    (Builder, "cast_impl", _cast_impl),
    (Builder, "create_fp_to_fp", _fp_to_fp),
    (Builder, "create_dot", _dot),
    (Builder, "create_fma", _fma),
    (stock.ReduceOps, "sum", _reduce_sum),
]


class _LanguageUser:
    """Stands for a kernel's module: the patcher looks only at its globals."""

    __globals__: ClassVar = {"tl": tl, "core": tl.core}


class _AlreadyPatched:
    def restore(self) -> None:
        pass


_interpreted: dict = {}


def _interpreted_function(fn):
    if fn not in _interpreted:
        _interpreted[fn] = stock.InterpretedFunction(fn)
    return _interpreted[fn]


def _run(self, *args, grid, warmup, **kwargs):
    return _interpreted_function(self.fn).run(*args, grid=grid, warmup=warmup, **kwargs)


def _call(self, *args, **kwargs):
    return _interpreted_function(self.fn).rewrite()(*args, **kwargs)


@contextlib.contextmanager
def interpret(*, bf16: bool = True, debug: bool = False) -> Iterator[None]:
    """Interpret every kernel launched inside the block.

    bf16: apply the bf16 corrections. debug: `tl.device_assert` and int32 overflow raise.
    """
    saved = []

    def put(owner, name, value):
        saved.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    scope = None
    try:
        put(JITFunction, "run", _run)
        put(JITFunction, "__call__", _call)
        put(stock.InterpretedFunction, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))
        put(stock.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (list(args), kwargs))
        put(stock.GridExecutor, "_restore_args_dev", lambda self, *args: None)
        for owner, name, function in _PATCHES if bf16 else []:
            put(owner, name, function)
        options = stock.InterpreterOptions(debug=debug, sanitize_overflow=debug)
        put(stock.interpreter_builder, "options", options)
        with knobs.runtime.scope(), np.errstate(all="ignore"):
            knobs.runtime.interpret = True
            scope = stock._patch_lang(_LanguageUser)
            put(stock, "_patch_lang", lambda fn: _AlreadyPatched())
            yield
    finally:
        if scope is not None:
            scope.restore()
        for owner, name, value in reversed(saved):
            setattr(owner, name, value)
