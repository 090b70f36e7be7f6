"""Triton's interpreter, mended and made faster: a fixture for a file whose kernels run in it, or are compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

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
    check, broadcast, constant = (
        getattr(TritonSemantic, name)
        for name in ("binary_op_type_checking_impl", "broadcast_impl_value", "scalar_constant")
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


class Operation(NamedTuple):
    """What an operator is to NumPy, and whether its operands are turned. kind: "number", "bits" of integers, or
    "comparison"."""

    compute: Any
    kind: str = "number"
    turned: bool = False


OPERATIONS = {
    "__add__": Operation(np.add),
    "__radd__": Operation(np.add, turned=True),
    "__sub__": Operation(np.subtract),
    "__rsub__": Operation(np.subtract, turned=True),
    "__mul__": Operation(np.multiply),
    "__rmul__": Operation(np.multiply, turned=True),
    "__and__": Operation(np.bitwise_and, "bits"),
    "__or__": Operation(np.bitwise_or, "bits"),
    "__xor__": Operation(np.bitwise_xor, "bits"),
    "__lshift__": Operation(np.left_shift, "bits"),
    "__rshift__": Operation(np.right_shift, "bits"),
    "__lt__": Operation(np.less, "comparison"),
    "__le__": Operation(np.less_equal, "comparison"),
    "__gt__": Operation(np.greater, "comparison"),
    "__ge__": Operation(np.greater_equal, "comparison"),
    "__eq__": Operation(np.equal, "comparison"),
    "__ne__": Operation(np.not_equal, "comparison"),
}
INTEGERS = {tl.int8, tl.uint8, tl.int16, tl.uint16, tl.int32, tl.uint32, tl.int64, tl.uint64}
CONVERTED = dict.fromkeys((tl.int1, *INTEGERS), INTEGERS | {tl.float16, tl.float32}) | {
    tl.float16: {tl.float32},
    tl.float32: INTEGERS | {tl.float16},
}
"""By what is converted: into what NumPy converts it as Triton's interpreter does."""


@contextmanager
def operators_at_once() -> Iterator[None]:
    """An operator asks a dozen functions before NumPy computes it, and they spread the smaller operand, which NumPy
    does by itself. Values of one type, and numbers beside them, go to NumPy at once, and so do choices, places along
    new dimensions, and conversions. Whatever else there is goes the long way."""
    semantic, handle = TritonSemantic(interpreter.interpreter_builder), interpreter.TensorHandle
    put, check, convert, choose, make = (
        interpreter._patch_attr,
        TritonSemantic.binary_op_type_checking_impl,
        TritonSemantic.cast,
        TritonSemantic.where,
        TritonSemantic.to_tensor,
    )
    blocks: dict[Any, Any] = {}
    numbers: dict[Any, Any] = {}

    def computed(data: Any, dtype: Any, *operands: Any) -> Any:
        """The tensor that has what NumPy made of the operands."""
        kind = dtype
        for one in operands:
            if one.type.is_block():
                kind = one.type
                if kind.element_ty is dtype and one.handle.data.shape == data.shape:
                    break
        else:
            if kind is not dtype:
                key = dtype.name, data.shape
                if key not in blocks:
                    blocks[key] = tl.block_type(dtype, list(data.shape))
                kind = blocks[key]
        return tl.tensor(handle(data, dtype), kind)

    def number_beside(value: Any, number: Any) -> Any:
        """The number in the type of the value, or None where what comes out has another."""
        key = value.type.name, type(number), number or str(number)  # 0.0 and -0.0 are the same key
        if key not in numbers:
            operand, found = check(semantic, value, number)
            numbers[key] = found if operand is value else None
        return numbers[key]

    def operator(operation: Operation, the_long_way: Any) -> Any:
        compute, compares, bits = operation.compute, operation.kind == "comparison", operation.kind == "bits"

        def run(self: Any, other: Any, **named: Any) -> Any:
            dtype, right = self.dtype, other.value if type(other) is tl.constexpr else other
            fits = dtype.is_int() if bits else not dtype.is_ptr() and dtype is not tl.int1
            if compares:
                right = to_tensor(semantic, right)
            elif fits and type(right) in (int, float):
                right = number_beside(self, right)
            if type(right) is not tl.tensor:
                return the_long_way(self, other, **named)
            if fits and right.dtype is dtype:
                left, right = (right, self) if operation.turned else (self, right)
                found = compute(left.handle.data, right.handle.data)
                return computed(found, tl.int1 if compares else dtype, left, right)
            if compute is np.add and dtype.is_ptr() and right.dtype in (tl.int32, tl.int64):
                step = max(1, dtype.element_ty.primitive_bitwidth // 8)
                found = self.handle.data + step * right.handle.data.astype(np.uint64)
                return computed(found, dtype, self, right)
            return the_long_way(self, other, **named)

        return run

    def indexed(the_long_way: Any) -> Any:
        def run(self: Any, places: Any, **named: Any) -> Any:
            if type(places) is tuple and self.type.is_block() and all(one in (None, slice(None)) for one in places):
                return computed(self.handle.data[places], self.dtype, self)
            return the_long_way(self, places, **named)

        return run

    def put_quickly(holder: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        put(holder, name, member, builder, scope)
        if holder is tl.tensor and name in OPERATIONS:
            scope.set_attr(holder, name, operator(OPERATIONS[name], vars(holder)[name]))
        elif holder is tl.tensor and name == "__getitem__":
            scope.set_attr(holder, name, indexed(vars(holder)[name]))

    def to_tensor(self: Any, value: Any, check_type: bool = True) -> Any:
        return value if type(value) is tl.tensor else make(self, value, check_type)

    def cast(self: Any, value: Any, to: Any, *rounding: Any, **named: Any) -> Any:
        if value.dtype is to:
            return value
        if to in CONVERTED.get(value.dtype, ()) and not any(rounding) and not named:
            return computed(value.handle.data.astype(interpreter._get_np_dtype(to)), to, value)
        return convert(self, value, to, *rounding, **named)

    def where(self: Any, condition: Any, x: Any, y: Any) -> Any:
        left, right = x, y
        if type(y) in (int, float):
            if type(x) is type(y):
                left, right = to_tensor(semantic, x), to_tensor(semantic, y)
            elif type(x) is tl.tensor and not x.dtype.is_ptr() and x.dtype is not tl.int1:
                right = number_beside(x, y)
        if condition.dtype is tl.int1 and type(left) is type(right) is tl.tensor and left.dtype is right.dtype:
            chosen = np.where(condition.handle.data, left.handle.data, right.handle.data)
            return computed(chosen, left.dtype, condition, left, right)
        return choose(self, condition, x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_attr", put_quickly)
        patch.setattr(TritonSemantic, "to_tensor", to_tensor)
        patch.setattr(TritonSemantic, "cast", cast)
        patch.setattr(TritonSemantic, "where", where)
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
                operators_at_once,
            ):
                stack.enter_context(part())
        yield


@pytest.fixture(autouse=True, scope="session")
def in_quick_interpreter() -> Iterator[None]:
    with quick_interpreter():
        yield
