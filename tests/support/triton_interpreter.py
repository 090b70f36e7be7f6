"""Triton's interpreter, mended and made faster: a fixture for a file whose kernels run in it, or are compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic

from lowmem_bagel.kernels import triton_language


@contextmanager
def mended() -> Iterator[None]:
    """Triton 3.6's interpreter takes loop bounds by int(array of one), which NumPy 2.4 refuses, and rounds twice in a
    fused multiply-add."""
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        with np.errstate(all="ignore"):
            found = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(found.astype(x.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
        yield


@contextmanager
def in_place_once() -> Iterator[None]:
    """For every launch, and for every function that a kernel calls, the interpreter looks through the whole language
    again, to put in place what the first kernel from that module has put there: much of its time."""
    put, in_place = interpreter._patch_lang, dict[int, Any]()
    stays = SimpleNamespace(restore=lambda: None)

    def put_once(function: Any) -> Any:
        names = id(function.__globals__)
        if names not in in_place:
            in_place[names] = put(function)
        return stays

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", put_once)
        yield
    for scope in reversed(in_place.values()):
        scope.restore()


@contextmanager
def types_of_tensors_once() -> Iterator[None]:
    """The interpreter makes the type and the shape of every value anew, of many small Python objects that nobody
    changes, and NumPy's dtype of it by a table made anew: half of its time. Here those of one name are made once."""
    make_type, dtype_of = tl.block_type.__init__, interpreter._get_np_dtype
    types: dict[Any, tuple[Any, int, str]] = {}
    shapes_of_types: dict[Any, Any] = {}
    shapes: dict[str, tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}
    others: dict[tuple[str, str], Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if isinstance(shape, tl.tuple) else shape
        key = (element_ty.name, *(getattr(size, "value", size) for size in sizes))
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = (shapes_of_types.setdefault(key[1:], self.shape), self.numel, self.name)
        self.element_ty = element_ty
        self.shape, self.numel, self.name = types[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in shapes:
            sizes = type.shape if type.is_block() else ()
            shapes[type.name] = tl.constexpr(math.prod(sizes)), tl.tuple([tl.constexpr(size) for size in sizes])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[type.name]

    def with_element_type(self: Any, scalar: Any) -> Any:
        key = self.name, scalar.name
        if key not in others:
            others[key] = tl.block_type(scalar, self.shape)
        return others[key]

    def np_dtype(of: Any) -> Any:
        if of.name not in dtypes:
            dtypes[of.name] = dtype_of(of)
        return dtypes[of.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tl.block_type, "__init__", block_type)
        patch.setattr(tl.block_type, "with_element_ty", with_element_type)
        patch.setattr(tl.tensor, "__init__", tensor)
        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        yield


@contextmanager
def operands_alike_as_they_are() -> Iterator[None]:
    """Most operations have operands of one type, or a number that was there before; all are asked again what type the
    result has and how far each reaches. And every sum of integers is computed once more, to see whether it overflows,
    which without `debug` is told to nobody."""
    check, broadcast, constant, convert = (
        getattr(TritonSemantic, name)
        for name in ("binary_op_type_checking_impl", "broadcast_impl_value", "scalar_constant", "cast")
    )
    constants: dict[Any, Any] = {}
    beside: dict[Any, Any] = {}
    plain = {tl.tensor, int, float, bool, str, type(None), tl.dtype}

    def checked(self: Any, lhs: Any, rhs: Any, *rules: bool, **named: bool) -> Any:
        left, right = type(lhs), type(rhs)
        if left is right is tl.tensor:
            if lhs.dtype is rhs.dtype and not lhs.dtype.is_ptr() and not any(rules[3:]) and not named:
                return self.broadcast_impl_value(lhs, rhs)
        elif right in (int, float) and left is tl.tensor and not named:
            key = lhs.type.name, str(rhs), rules
            if key not in beside:
                operand, number = check(self, lhs, rhs, *rules)
                if operand is not lhs:
                    return operand, number
                number.handle.data.flags.writeable = False
                beside[key] = number
            return lhs, beside[key]
        return check(self, lhs, rhs, *rules, **named)

    def cast(self: Any, value: Any, to: Any, *rounding: Any, **named: Any) -> Any:
        return value if value.dtype is to else convert(self, value, to, *rounding, **named)

    def spread(self: Any, scalar: Any, like: Any) -> Any:
        kind = like.with_element_ty(scalar.dtype)
        return self.tensor(self.builder.create_splat(kind, scalar.handle), kind)

    def alike(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if not left.is_block():
            return (spread(self, lhs, right), rhs) if right.is_block() else (lhs, rhs)
        if not right.is_block():
            return lhs, spread(self, rhs, left)
        return (lhs, rhs) if left.shape is right.shape else broadcast(self, lhs, rhs)

    def number(self: Any, value: Any, dtype: Any) -> Any:
        key = str(value), dtype.name
        if key not in constants:
            constants[key] = constant(self, value, dtype)
        return constants[key]

    def unwrapped(value: Any) -> Any:
        kind = type(value)
        if kind is tl.constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    builder, unwrap = interpreter.interpreter_builder, tl.core._unwrap_if_constexpr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        patch.setattr(TritonSemantic, "binary_op_type_checking_impl", checked)
        patch.setattr(TritonSemantic, "broadcast_impl_value", alike)
        patch.setattr(TritonSemantic, "scalar_constant", number)
        patch.setattr(TritonSemantic, "cast", cast)
        patch.setattr(tl.core, "_unwrap_if_constexpr", unwrapped)
        yield


@contextmanager
def called_without_detours() -> Iterator[None]:
    """Every operation of the language goes through a wrapper that looks whether it is inside a kernel, and one of the
    interpreter's that copies its arguments by name; types are compared by names, even one with itself."""
    same = tl.dtype.__eq__

    def put(holder: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        semantic, operation = TritonSemantic(builder), getattr(member, "__wrapped__", member)

        def run(*args: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return operation(*args, **named)

        scope.set_attr(holder, name, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_attr", put)
        patch.setattr(tl.dtype, "__eq__", lambda self, other: self is other or same(self, other))
        yield


@contextmanager
def views_without_detours() -> Iterator[None]:
    """NumPy's ways to repeat a value and to add a dimension look at their arguments for longer than most operations
    compute; and whether an array's items fit its type is asked of every value that there is."""
    handle = interpreter.TensorHandle

    def repeated(self: Any, arg: Any, shape: Any) -> Any:
        data, sizes = arg.data, tuple(shape)
        if not data.flags.c_contiguous:
            return handle(np.broadcast_to(data, sizes), arg.dtype.scalar)
        strides = tuple(
            stride if size == have else 0 for size, have, stride in zip(sizes, data.shape, data.strides, strict=True)
        )
        return handle(np.ndarray(sizes, data.dtype, data, strides=strides), arg.dtype.scalar)

    def splat(self: Any, kind: Any, arg: Any) -> Any:
        dtype, data = interpreter._get_np_dtype(arg.dtype), arg.data
        if data.dtype != dtype:
            data = data.astype(dtype)
        return handle(np.ndarray(tuple(kind.shape), dtype, data, strides=(0,) * len(kind.shape)), arg.dtype.scalar)

    def expanded(self: Any, arg: Any, axis: int) -> Any:
        place = axis if axis >= 0 else axis + arg.data.ndim + 1
        return handle(arg.data[(slice(None),) * place + (None,)], arg.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_broadcast", repeated)
        patch.setattr(interpreter.InterpreterBuilder, "create_splat", splat)
        patch.setattr(interpreter.InterpreterBuilder, "create_expand_dims", expanded)
        patch.setattr(handle, "__post_init__", lambda self: None)
        yield


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """All of it where kernels are interpreted. Where they are compiled nothing is touched: the language is the same
    module there, and values of one kernel that are kept belong to a compilation that is over."""
    with ExitStack() as stack:
        if triton_language.interpreted():
            for part in (
                mended,
                called_without_detours,
                in_place_once,
                types_of_tensors_once,
                operands_alike_as_they_are,
                views_without_detours,
            ):
                stack.enter_context(part())
        yield


@pytest.fixture(autouse=True, scope="session")
def in_quick_interpreter() -> Iterator[None]:
    with quick_interpreter():
        yield
