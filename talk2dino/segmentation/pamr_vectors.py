"""What the compiled PAMR computes with: a block of 4 columns by 4n classes, held in registers.

Numba has no vector type, and its optimiser gives up on loops that read many arrays and write one
that could overlap them. So a block is a type of its own here, n vectors of 16 numbers, each 4
classes of 4 columns, with the few operations that are needed. The argument `groups` is any tuple
of n integers: its length alone counts, since lengths of tuples are known when compiling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

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


def add_weighted(shift: int) -> Any:
    """Make `add(total, weights, first, scores, place)`: one neighbour of 4 columns.

    `total + weight * score`, rounded once where the processor can; weights of the columns are the
    4 numbers from `first` on, scores those of the block at `place`, `shift` (0..3) columns further:
    then a part comes from the block behind it.
    """
    lanes = [4 * (lane // 4) + lane % 4 + shift for lane in range(16)]
    lanes = [lane if lane // 4 == old // 4 else lane + 12 for old, lane in enumerate(lanes)]

    @operation
    def add(typing: Any, total: Any, weights: Any, first: Any, scores: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, *rest = arguments
            weight = _load(builder, _address(context, builder, weights, *rest[:2]), 0, FOUR)
            weight = _select(builder, weight, weight, [lane % 4 for lane in range(16)])
            start = _address(context, builder, scores, *rest[2:])
            result = ir.Constant(structure(total.groups), ir.Undefined)
            for group in range(total.groups):
                value = _load(builder, start, 16 * group, SIXTEEN)
                if shift:
                    behind = _load(builder, start, 16 * (group + total.groups), SIXTEEN)
                    value = _select(builder, value, behind, lanes)
                product = builder.fmul(weight, value, flags=("contract",))
                old = builder.extract_value(sums, group)
                new = builder.fadd(product, old, flags=("contract",))
                result = builder.insert_value(result, new, group)
            return result

        return total(total, weights, types.intp, scores, types.intp), generate

    return add


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
def power_of_two(typing: Any, exponent: Any) -> Any:
    """`2 ** exponent` for a float32 that holds a whole number of -126..127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = builder.fptosi(arguments[0], INT)
        bits = builder.shl(builder.add(whole, INT(127)), INT(23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32), generate
