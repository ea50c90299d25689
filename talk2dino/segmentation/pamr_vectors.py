"""What the compiled PAMR computes with: blocks of n vectors of 16 numbers, held in registers.

Numba has no vector type, and its optimiser gives up on loops that read many arrays and write one
that could overlap them. So a block is a type of its own here, with the few operations that are
needed: one vector of 16 columns with its arithmetic for the affinity, and n vectors of 4 classes of
4 columns for the iterations. The argument `groups` is any tuple of n integers: its length alone
counts, since lengths of tuples are known when compiling.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

INT = ir.IntType(32)
FOUR = ir.VectorType(ir.FloatType(), 4)
SIXTEEN = ir.VectorType(ir.FloatType(), 16)  # two registers where a register holds 8


def operation(function: Callable[..., Any]) -> Any:
    """Make a function of the types, which returns signature and code, known to Numba."""
    return intrinsic(function)


class Block(types.Type):
    """4 columns of `4 * groups` classes, float32."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        super().__init__(name=f"Block({groups})")


def structure(groups: int) -> ir.Type:
    """The vectors of a block."""
    return ir.LiteralStructType([SIXTEEN] * groups)


@register_model(Block)
class BlockModel(models.PrimitiveModel):
    """A structure of vectors, which the optimiser takes apart."""

    def __init__(self, manager: Any, block: Block) -> None:
        super().__init__(manager, block, structure(block.groups))


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Of a flat index into a contiguous array's memory."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _load(builder: Any, address: Any, numbers: int, kind: Any) -> Any:
    """The vector that starts so many numbers after an address."""
    place = builder.gep(address, [INT(numbers)])
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=4)


def _select(builder: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    """Lanes of two vectors, counted through."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT, 16), lanes))


@operation
def zeros(typing: Any, groups: Any) -> Any:
    """A block of zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(structure(groups.count), None)

    return Block(groups.count)(groups), generate


@operation
def store(typing: Any, array: Any, index: Any, block: Any) -> Any:
    """Write the block from a flat index of a contiguous array on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = _address(context, builder, array, *arguments[:2])
        for group in range(block.groups):
            address = builder.bitcast(builder.gep(start, [INT(16 * group)]), SIXTEEN.as_pointer())
            builder.store(builder.extract_value(arguments[2], group), address, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, block), generate


def _add_neighbours(
    context: Any, builder: Any, signature: Any, arguments: Any, shifts: Sequence[int]
) -> Any:
    """Add weight times score for every shift, rounded once each where the processor can."""
    total_type, weights_type, _, scores_type, *_ = signature.args
    sums, weights, first, scores, place, *_ = arguments
    width = 16 * total_type.groups  # of a block of all classes
    start = _address(context, builder, weights_type, weights, first)
    fours = [_load(builder, start, 4 * n, FOUR) for n in range(len(shifts))]
    columns = [_select(builder, four, four, [lane % 4 for lane in range(16)]) for four in fours]
    start = _address(context, builder, scores_type, scores, place)
    needed = sorted({block for shift in shifts for block in (shift // 4, -(-shift // 4))})
    result = ir.Constant(structure(total_type.groups), ir.Undefined)
    for group in range(total_type.groups):
        blocks = {
            block: _load(builder, start, block * width + 16 * group, SIXTEEN) for block in needed
        }
        new = builder.extract_value(sums, group)
        for weight, shift in zip(columns, shifts, strict=True):
            value = blocks[shift // 4]
            if shift % 4:
                value = _select(builder, value, blocks[shift // 4 + 1], _further(shift % 4))
            product = builder.fmul(weight, value, flags=("contract",))
            new = builder.fadd(product, new, flags=("contract",))
        result = builder.insert_value(result, new, group)
    return result


def _further(columns: int) -> list[int]:
    """Lanes 4 columns wide, so many columns on: the last come from a second vector."""
    inside = [4 * (lane // 4) + lane % 4 + columns for lane in range(16)]
    return [one if one // 4 == lane // 4 else one + 12 for lane, one in enumerate(inside)]


def add_weighted(*shifts: int) -> Any:
    """Make `add(total, weights, first, scores, place)`: neighbours in a row of 4 columns.

    Adds weight times score for every shift: columns from the block at `place` to the neighbour's.
    The weights of the 4 columns are 4 numbers from `first` on, those of the next shift follow. Each
    block that a neighbour lies in is loaded once for all shifts.
    """

    @operation
    def add(typing: Any, total: Any, weights: Any, first: Any, scores: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _add_neighbours(context, builder, signature, arguments, shifts)

        return total(total, weights, types.intp, scores, types.intp), generate

    return add


def around(distances: Sequence[int]) -> list[int]:
    """Shifts to both sides of a pixel in its own row."""
    return [shift for distance in distances for shift in (-distance, distance)]


@operation
def add_around(
    typing: Any, total: Any, weights: Any, first: Any, scores: Any, place: Any, near: Any
) -> Any:
    """Like the functions of `add_weighted`, with `around` those distances 1..4 as shifts.

    The length of the tuple `near` has bit d - 1 for distance d.
    """
    shifts = around([distance for distance in range(1, 5) if near.count >> (distance - 1) & 1])

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _add_neighbours(context, builder, signature, arguments, shifts)

    return total(total, weights, types.intp, scores, types.intp, near), generate


@operation
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Ask for a line of memory; an address beyond the array does no harm."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        kind = ir.FunctionType(ir.VoidType(), [address.type, INT, INT, INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [address, INT(0), INT(2), INT(1)])  # to read, second cache, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@operation
def load(typing: Any, array: Any, index: Any) -> Any:
    """16 numbers from a flat index of a contiguous array on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _one(
            builder, _load(builder, _address(context, builder, array, *arguments), 0, SIXTEEN)
        )

    return Block(1)(array, types.intp), generate


@operation
def store_fours(typing: Any, array: Any, index: Any, stride: Any, block: Any) -> Any:
    """Write 4 numbers to a flat index, the next 4 so many numbers further, and so on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, step, vector = arguments[1], arguments[2], _vector(builder, arguments[3])
        for four in range(0, 16, 4):
            lanes = ir.Constant(ir.VectorType(INT, 4), list(range(four, four + 4)))
            address = _address(context, builder, array, arguments[0], place)
            address = builder.bitcast(address, FOUR.as_pointer())
            builder.store(builder.shuffle_vector(vector, vector, lanes), address, align=4)
            place = builder.add(place, step)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, block), generate


@operation
def filled(typing: Any, number: Any) -> Any:
    """A vector of 16 times a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        empty = ir.Constant(SIXTEEN, ir.Undefined)
        first = builder.insert_element(empty, arguments[0], INT(0))
        return _one(builder, _select(builder, first, first, [0] * 16))

    return Block(1)(types.float32), generate


def _vector(builder: Any, block: Any) -> Any:
    return builder.extract_value(block, 0)


def _one(builder: Any, vector: Any) -> Any:
    return builder.insert_value(ir.Constant(structure(1), ir.Undefined), vector, 0)


def _elementwise(arity: int, compute: Callable[..., Any]) -> Any:
    """A function of vectors of 16 numbers from `compute(builder, *vectors)`."""

    def typed(typing: Any, *blocks: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vectors = [_vector(builder, block) for block in arguments]
            return _one(builder, compute(builder, *vectors))

        return Block(1)(*blocks), generate

    if arity == 1:
        return operation(lambda typing, a: typed(typing, a))
    return operation(lambda typing, a, b: typed(typing, a, b))


def _called(name: str) -> Callable[..., Any]:
    """A function of the compiler's own, for vectors."""

    def compute(builder: Any, *vectors: Any) -> Any:
        kind = ir.FunctionType(SIXTEEN, [SIXTEEN] * len(vectors))
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v16f32")
        return builder.call(function, vectors)

    return compute


def _power_of_two(builder: Any, exponent: Any) -> Any:
    whole = ir.VectorType(INT, 16)
    bits = builder.add(builder.fptosi(exponent, whole), ir.Constant(whole, [127] * 16))
    return builder.bitcast(builder.shl(bits, ir.Constant(whole, [23] * 16)), SIXTEEN)


absolute, root, nearest = (_elementwise(1, _called(name)) for name in ("fabs", "sqrt", "rint"))
largest = _elementwise(2, _called("maxnum"))
power_of_two = _elementwise(1, _power_of_two)  # of whole numbers -126..127


def _arithmetic(symbol: Any, name: str) -> None:
    """Let `symbol` stand between vectors, or a vector and a number."""
    flags = () if name == "fdiv" else ("contract",)
    compute = _elementwise(2, lambda builder, a, b: getattr(builder, name)(a, b, flags=flags))

    def of_vectors(a: Any, b: Any) -> Any:
        return compute(a, b)

    def with_number(a: Any, b: Any) -> Any:
        return compute(a, filled(np.float32(b)))

    def of_number(a: Any, b: Any) -> Any:
        return compute(filled(np.float32(a)), b)

    def choose(a: Any, b: Any) -> Any:
        if not isinstance(a, Block):
            return of_number if isinstance(b, Block) else None
        return of_vectors if isinstance(b, Block) else with_number

    overload(symbol)(choose)


for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_symbol, _name)
