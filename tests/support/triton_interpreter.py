"""Triton's interpreter, mended and made faster: fixtures for a file whose kernels run in it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import triton.language as tl
import triton.runtime.interpreter as interpreter


@pytest.fixture(autouse=True)
def interpreter_mended(monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.fixture(autouse=True)
def interpreter_in_place_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every function that a kernel calls, the interpreter looks through the whole language again, to put in place
    what has been there since the kernel's first call from that module: much of its time."""
    put, launch, ready = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()

    def put_once(function: Any) -> Any:
        names = id(function.__globals__)
        if names in ready:
            return None
        ready.add(names)
        return put(function)

    def launched(*args: Any, **options: Any) -> None:
        ready.clear()
        launch(*args, **options)

    monkeypatch.setattr(interpreter, "_patch_lang", put_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)


@pytest.fixture(autouse=True, scope="session")
def types_of_tensors_once() -> Any:
    """The interpreter makes the type and the shape of every value anew, of many small Python objects that nobody
    changes, and NumPy's dtype of it by a table made anew: half of its time. Here those of one name are made once."""
    make_type, dtype_of = tl.block_type.__init__, interpreter._get_np_dtype
    types: dict[Any, tuple[Any, int, str]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if isinstance(shape, tl.tuple) else shape
        key = (element_ty.name, *(getattr(size, "value", size) for size in sizes))
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = (self.shape, self.numel, self.name)
        self.element_ty = element_ty
        self.shape, self.numel, self.name = types[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in shapes:
            sizes = type.shape if type.is_block() else ()
            shapes[type.name] = tl.constexpr(math.prod(sizes)), tl.tuple([tl.constexpr(size) for size in sizes])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[type.name]

    def np_dtype(of: Any) -> Any:
        if of.name not in dtypes:
            dtypes[of.name] = dtype_of(of)
        return dtypes[of.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tl.block_type, "__init__", block_type)
        patch.setattr(tl.tensor, "__init__", tensor)
        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        yield
