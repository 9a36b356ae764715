"""Arithmetic of axis permutations: element i is the axis of the operand that becomes axis i of the transpose."""

from __future__ import annotations

Permutation = tuple[int, ...]
Shape = tuple[int, ...]


def identity(rank: int) -> Permutation:
    """The permutation that moves nothing."""
    return tuple(range(rank))


def permute(shape: Shape, permutation: Permutation) -> Shape:
    """The shape of a transpose."""
    return tuple(shape[axis] for axis in permutation)


def compose(first: Permutation, second: Permutation) -> Permutation:
    """The permutation of a transpose by ``first``, then by ``second``."""
    return permute(first, second)


def inverted(permutation: Permutation) -> Permutation:
    """The permutation that undoes this one."""
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def keeps_order(shape: Shape, permutation: Permutation) -> bool:
    """Whether a transpose moves axes of size one only, so that the elements stay where they are."""
    moved = [axis for axis in permutation if shape[axis] != 1]
    return moved == sorted(moved)


def is_channels_first(permutation: Permutation) -> bool:
    """Whether the base is the channels-last form of a channels-first value."""
    rank = len(permutation)
    return rank >= 3 and permutation == (0, rank - 1, *range(1, rank - 1))


def without_leading_ones(shape: Shape) -> Shape:
    """The shortest shape that broadcasts the same against a full-rank operand; at least one axis remains."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
