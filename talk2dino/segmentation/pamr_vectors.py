"""What the compiled PAMR computes with: a row of `8 * n` numbers, held in vector registers.

Numba has no vector type, and its optimiser gives up on loops that read many arrays and write one
that could overlap them. So a row is a type of its own here, with the few operations that are
needed. The argument `groups` of the first two is any tuple of n integers: its length alone counts,
since lengths of tuples are known when compiling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

INT = ir.IntType(32)


def operation(function: Callable[..., Any]) -> Any:
    """Make a function of the types, which returns signature and code, known to Numba."""
    return intrinsic(function)


class Row(types.Type):
    """`8 * groups` numbers of float32."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        super().__init__(name=f"Row({groups})")


def parts(groups: int) -> list[ir.Type]:
    """Vectors of 16 (two registers where a register holds 8), and one of 8 if `groups` is odd."""
    lanes = [16] * (groups // 2) + [8] * (groups % 2)
    return [ir.VectorType(ir.FloatType(), count) for count in lanes]


@register_model(Row)
class RowModel(models.PrimitiveModel):
    """A structure of vectors, which the optimiser takes apart."""

    def __init__(self, manager: Any, row: Row) -> None:
        super().__init__(manager, row, ir.LiteralStructType(parts(row.groups)))


def _pack(builder: Any, values: list[Any]) -> Any:
    row = ir.Constant(ir.LiteralStructType([value.type for value in values]), ir.Undefined)
    for place, value in enumerate(values):
        row = builder.insert_value(row, value, place)
    return row


def _unpack(builder: Any, row: Any) -> list[Any]:
    return [builder.extract_value(row, place) for place in range(len(row.type.elements))]


def _pointers(context: Any, builder: Any, array_type: Any, array: Any, index: Any, row: Row) -> Any:
    """Addresses of a row's vectors, from a flat index into the array's memory."""
    data = context.make_array(array_type)(context, builder, array).data
    for vector in parts(row.groups):
        address = builder.gep(data, [index])
        yield builder.bitcast(address, vector.as_pointer())
        index = builder.add(index, index.type(vector.count))


@operation
def zeros(typing: Any, groups: Any) -> Any:
    """A row of zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.LiteralStructType(parts(groups.count)), None)

    return Row(groups.count)(groups), generate


@operation
def load(typing: Any, groups: Any, array: Any, index: Any) -> Any:
    """The row that starts at a flat index of a contiguous array."""
    row = Row(groups.count)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, data, place = arguments
        pointers = _pointers(context, builder, array, data, place, row)
        return _pack(builder, [builder.load(pointer, align=4) for pointer in pointers])

    return row(groups, array, types.intp), generate


@operation
def store(typing: Any, array: Any, index: Any, row: Any) -> Any:
    """Write the row from a flat index of a contiguous array on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, place, values = arguments
        pointers = _pointers(context, builder, array, data, place, row)
        for pointer, value in zip(pointers, _unpack(builder, values), strict=True):
            builder.store(value, pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, row), generate


@operation
def add_scaled(typing: Any, total: Any, scale: Any, row: Any) -> Any:
    """`total + scale * row`, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, factor, values = arguments
        result = []
        for old, value in zip(_unpack(builder, sums), _unpack(builder, values), strict=True):
            undefined = ir.Constant(value.type, ir.Undefined)
            first = builder.insert_element(undefined, factor, INT(0))
            places = ir.Constant(ir.VectorType(INT, value.type.count), None)
            product = builder.fmul(
                builder.shuffle_vector(first, undefined, places), value, flags=("contract",)
            )
            result.append(builder.fadd(product, old, flags=("contract",)))
        return _pack(builder, result)

    return row(total, types.float32, row), generate


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
