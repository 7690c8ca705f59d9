"""Shapes that the cache computes equal those of torch, and unusual arguments are passed on to torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from gflow_pl.channels import shape_cache
from gflow_pl.channels.shape_cache import ShapeCache

ATEN = torch.ops.aten
META = torch.device("meta")


def meta_tensor(*shape, dtype=torch.float32, last=False):
    x = torch.empty(shape, dtype=dtype, device=META)
    return x.to(memory_format=torch.channels_last) if last else x


def properties(out):
    parts = out if isinstance(out, (tuple, list)) else [out]
    return [(tuple(x.shape), x.stride(), x.dtype, x.device.type) for x in parts]


IMAGES = [
    meta_tensor(2, 6, 5, 7),
    meta_tensor(2, 6, 5, 7, dtype=torch.float64),
    meta_tensor(2, 6, 5, 7, last=True),
    meta_tensor(2, 6, 7),
]
UNARY = [getattr(ATEN, name).default for name in shape_cache._UNARY]
ARITHMETIC = [getattr(ATEN, name).Tensor for name in ("add", "sub", "mul", "div")]
ROWS = meta_tensor(3, 5, 4)
CALLS = [
    *((op, (x,)) for op, x in itertools.product(UNARY, IMAGES)),
    *((op, (x, x)) for op, x in itertools.product(ARITHMETIC, IMAGES)),
    *(
        (op, (a, b))
        for op in ARITHMETIC
        for a, b in itertools.permutations([meta_tensor(2, 6, 5, 7), meta_tensor(2, 6, 1, 1)], 2)
    ),
    *((op, (meta_tensor(2, 1, 3), meta_tensor(1, 6, 1))) for op in ARITHMETIC),
    *((op, (x, 2.0)) for op, x in itertools.product(ARITHMETIC, IMAGES)),
    *((op, (meta_tensor(2, 3, dtype=torch.int64), 2)) for op in ARITHMETIC),
    *((op, (meta_tensor(2, 3), meta_tensor(3))) for op in ARITHMETIC),
    *((op, (meta_tensor(2, 3), meta_tensor(2, 3, dtype=torch.float64))) for op in ARITHMETIC),
    *(
        (ATEN.convolution.default, (x, w, bias, [s, s], [p, p], [d, d], False, [0, 0], groups))
        for x in IMAGES[:1] + IMAGES[2:3]
        for w, bias, groups in (
            (meta_tensor(4, 6, 3, 3), meta_tensor(4), 1),
            (meta_tensor(6, 1, 1, 1), None, 6),
            (meta_tensor(9, 2, 2, 3), None, 3),
        )
        for s, p, d in ((1, 0, 1), (2, 1, 1), (1, 2, 2))
    ),
    (ATEN.convolution.default, (IMAGES[3], meta_tensor(4, 6, 3), None, [2], [1], [1], False, [0], 1)),
    (ATEN.convolution.default, (IMAGES[0], meta_tensor(6, 4, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1)),
    *(
        (
            ATEN.native_batch_norm.default,
            (x, meta_tensor(6), meta_tensor(6), meta_tensor(6), meta_tensor(6), training, 0.1, 1e-5),
        )
        for x in IMAGES[:1]
        for training in (True,)
    ),
    (ATEN.native_layer_norm.default, (ROWS, [4], meta_tensor(4), meta_tensor(4), 1e-5)),
    (ATEN.native_layer_norm.default, (ROWS, [5, 4], None, None, 1e-5)),
    *((ATEN.mean.dim, (IMAGES[0], dims, keep)) for dims in ([2, 3], [-1], [1]) for keep in (False, True)),
    (ATEN.mean.default, (IMAGES[0],)),
    (ATEN.add.Tensor, (IMAGES[0], 1j)),
    (ATEN.addmm.default, (meta_tensor(4), meta_tensor(3, 5), meta_tensor(5, 4))),
    (ATEN.mm.default, (meta_tensor(3, 5), meta_tensor(5, 4))),
    (ATEN.cat.default, ([meta_tensor(2, 3), meta_tensor(2, 4)], 1)),
    (ATEN.max_pool2d_with_indices.default, (IMAGES[0], [2, 2])),
]


@pytest.mark.parametrize(("op", "args"), CALLS, ids=[f"{op.name()}-{i}" for i, (op, _) in enumerate(CALLS)])
def test_shapes_equal_those_of_torch(op, args) -> None:
    cache = ShapeCache()
    expected = properties(op(*args))
    assert properties(cache.compute(op, args, {})) == expected
    assert properties(cache.compute(op, args, {})) == expected  # the second time from the cache


def test_every_call_returns_a_new_tensor() -> None:
    cache = ShapeCache()
    first, second = (cache.compute(ATEN.add.Tensor, (meta_tensor(2, 3), meta_tensor(2, 3)), {}) for _ in range(2))
    assert first is not second
    first.unsqueeze_(0)
    assert second.shape == (2, 3)


def test_every_shape_function_is_tested() -> None:
    covered = {name for name in shape_cache._SHAPE_FUNCTIONS if not name.startswith("aten::_native_batch_norm")}
    computed = {
        op._schema.name
        for op, args in CALLS
        if op._schema.name in covered and shape_cache._SHAPE_FUNCTIONS[op._schema.name](*args) is not None
    }
    assert computed == covered


def test_keyword_names_are_part_of_the_key() -> None:
    cache, edges = ShapeCache(), meta_tensor(4)
    first = cache.compute(ATEN.bucketize.Tensor, (meta_tensor(3), edges), {"out_int32": True})
    second = cache.compute(ATEN.bucketize.Tensor, (meta_tensor(3), edges), {"right": True})
    assert (first.dtype, second.dtype) == (torch.int32, torch.int64)


BAD = [
    (
        ATEN.convolution.default,
        (meta_tensor(2, 6, 5, 5), meta_tensor(4, 5, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    ),
    (
        ATEN.convolution.default,
        (meta_tensor(2, 6, 2, 2), meta_tensor(4, 6, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    ),
    (ATEN.addmm.default, (meta_tensor(4), meta_tensor(3, 5), meta_tensor(6, 4))),
    (ATEN.mm.default, (meta_tensor(3, 5), meta_tensor(6, 4))),
    (ATEN.add.Tensor, (meta_tensor(2, 3), meta_tensor(2, 4))),
    (ATEN.native_layer_norm.default, (ROWS, [5], meta_tensor(5), meta_tensor(5), 1e-5)),
    (ATEN.add_.Tensor, (meta_tensor(2, 3), meta_tensor(2, 4))),
    (ATEN.div_.Scalar, (meta_tensor(2, dtype=torch.int64), 2)),
    (ATEN.add_.Tensor, (meta_tensor(2, dtype=torch.int64), meta_tensor(2))),
]


@pytest.mark.parametrize(("op", "args"), BAD, ids=[f"{op.name()}-{i}" for i, (op, _) in enumerate(BAD)])
def test_arguments_that_do_not_fit_raise_as_in_torch(op, args) -> None:
    try:
        op(*args)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            ShapeCache().compute(op, args, {})
    else:  # torch 2.11 accepts an in-place division of integers on the meta device
        assert op == ATEN.div_.Scalar
        ShapeCache().compute(op, args, {})


@pytest.mark.parametrize("name", [*shape_cache._IN_PLACE])
def test_in_place_operators_return_their_first_argument(name) -> None:
    op = getattr(ATEN, name.removeprefix("aten::"))
    x = meta_tensor(2, 3)
    arithmetic = name in ("aten::add_", "aten::sub_", "aten::mul_")
    out = ShapeCache().compute(
        op.Tensor if arithmetic else op.default, (x, meta_tensor(2, 3)) if arithmetic else (x,), {}
    )
    assert out is x
