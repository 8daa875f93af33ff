"""Where in a compiled graph a layer has the form that kernels stand for: each place, or why it has another form."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from kvcompile.graph import ops
from kvcompile.graph.fused import parts
from kvcompile.graph.fused.parts import Unfit
from kvcompile.kernels.layers import AfterAttention, BeforeAttention, Linear, Norm, Part

Angle = tuple[fx.Node, "int | None"]  # a node, or one item of what it gives


@dataclass
class Heads:
    """One projection cut into heads: its nodes up to where it is `plain`, and, where it is rotated, `turned`."""

    part: Part
    head_dim: int
    plain: fx.Node
    turned: fx.Node | None = None
    angles: tuple[Angle, Angle] | None = None
    others: list[fx.Node] = field(default_factory=list)  # who reads `plain` beside the rotation


@dataclass
class BeforePlace:
    """Norm and projections of `states`."""

    layer: BeforeAttention
    states: fx.Node
    norm: fx.Node
    heads: list[Heads]
    angles: tuple[Angle, Angle] | None


@dataclass
class AfterPlace:
    """Output projection of `attended` to the second residual sum, `end`."""

    layer: AfterAttention
    attended: fx.Node
    states: fx.Node
    end: fx.Node


class Matcher:
    """Looks at one graph, whose modules have weights in `dtype`; `modules` are those that the places stand for."""

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype) -> None:
        self.graph, self.dtype = graph, dtype
        self.modules: set[str] = set()

    def before(self, attend: fx.Node) -> BeforePlace:
        """What makes the queries of an `attend` node. Raises Unfit."""
        projection = _up_to_linear(attend.args[0])
        normed = projection.args[0]
        if not isinstance(normed, fx.Node) or normed.op != "call_module":
            raise Unfit("no norm before the projections")
        norm = parts.norm(self._module(normed), self.dtype)
        heads = [each for user in normed.users for each in self._heads(user)]
        angles = {head.angles for head in heads if head.angles is not None}
        kinds = {head.part.norm.kind for head in heads if head.part.norm is not None}
        if len(heads) > 3 or len(angles) > 1 or len(kinds) > 1 or len({head.head_dim for head in heads}) > 1:
            raise Unfit("projections of several forms")
        layer = BeforeAttention(norm, tuple(head.part for head in heads), heads[0].head_dim)
        return BeforePlace(layer, _node(normed.args[0]), normed, heads, next(iter(angles), None))

    def after(self, attend: fx.Node) -> AfterPlace:
        """What follows an `attend` node. Raises Unfit."""
        output = _only_user(attend)
        while output.op != "call_module":
            output = _only_user(output)
        linear = parts.linear(self._module(output), self.dtype)
        first, output_norm, factor = self._scaled(output)
        states = _other(first, _last(output, output_norm, factor))
        normed = [user for user in first.users if user.op == "call_module"]
        if len(normed) != 1 or len(first.users) != 2:
            raise Unfit("its blocks are not attention, residual, norm, MLP, residual")
        norm, mlp = self._norm(normed[0]), _only_user(normed[0])
        if mlp.op != "call_module" or mlp.args != (normed[0],):
            raise Unfit("its MLP is not one module")
        end, down_norm, again = self._scaled(mlp)
        if _other(end, _last(mlp, down_norm, again)) is not first or factor != again:
            raise Unfit("its blocks are not attention, residual, norm, MLP, residual")
        block = parts.mlp(self._module(mlp), self.dtype)
        self.modules |= {f"{mlp.target}.{name}" for name in block.names}
        layer = AfterAttention(
            output=linear,
            norm=norm,
            up=block.up,
            down=block.down,
            activation=block.activation,
            gate=block.gate,
            output_norm=None if output_norm is None else self._norm(output_norm),
            down_norm=None if down_norm is None else self._norm(down_norm),
            factor=1.0 if factor is None else factor,
        )
        return AfterPlace(layer, _node(output.args[0]), states, end)

    def _heads(self, projection: fx.Node) -> list[Heads]:
        """One projection, or all that one makes side by side, and what is done to the heads. Raises Unfit."""
        if projection.op != "call_module":
            raise Unfit("the normed states feed more than projections")
        linear = parts.linear(self._module(projection), self.dtype)
        pieces = _pieces(projection, linear.weight.shape[0])
        return [self._piece(parts.rows_of(linear, first, count), cut) for first, count, cut in pieces]

    def _piece(self, linear: Linear, cut: fx.Node) -> Heads:
        """What is done to heads that one projection makes, beginning with the node that cuts them. Raises Unfit."""
        sizes: Any = cut.args[2] if cut.target is torch.unflatten and cut.args[1] == -1 else (0, 0)
        plain, head_dim = _only_user(cut), int(sizes[1])
        if plain.target != "transpose" or plain.args[1:] != (1, 2) or head_dim < 1 or linear.weight.shape[0] % head_dim:
            raise Unfit("its projections are not cut into heads as they come")
        norm, plain = self._head_norm(plain)
        turned, angles = _rotation(plain)
        others = [user for user in plain.users if not _rotates(user, turned)]
        return Heads(Part(linear, norm, turned is not None), head_dim, plain, turned, angles, others)

    def _head_norm(self, heads: fx.Node) -> tuple[Norm | None, fx.Node]:
        """The norm of each head and its node, if that is the next thing done."""
        users = list(heads.users)
        if len(users) == 1 and users[0].op == "call_module" and users[0].args == (heads,):
            try:
                return self._norm(users[0]), users[0]
            except Unfit:
                pass  # something else: it stays a node, and what is made here ends before it
        return None, heads

    def _norm(self, node: fx.Node) -> Norm:
        return parts.norm(self._module(node), self.dtype)

    def _scaled(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None, float | None]:
        """The residual sum behind a node, and the norm and factor between. Raises Unfit."""
        norm, factor, user = None, None, _only_user(node)
        if user.op == "call_module" and user.args == (node,):
            norm, user = user, _only_user(user)
        if user.target is operator.mul and isinstance(user.args[1], float):
            factor, user = user.args[1], _only_user(user)
        if user.target is not operator.add:
            raise Unfit("its blocks are not attention, residual, norm, MLP, residual")
        return user, norm, factor

    def _module(self, node: fx.Node) -> nn.Module:
        self.modules.add(str(node.target))
        return self.graph.get_submodule(str(node.target))


def _node(argument: object) -> fx.Node:
    if not isinstance(argument, fx.Node):
        raise Unfit("an argument that is no node")
    return argument


def _pieces(projection: fx.Node, features: int) -> list[tuple[int, int, fx.Node]]:
    """First row, number of rows, and the node that cuts them into heads, of each part of a projection. Raises Unfit."""
    cut = _only_user(projection)
    split = _only_user(cut) if len(cut.users) == 1 else cut
    if split.target is not torch.functional.split:
        return [(0, features, cut)]
    sizes: Any = split.args[1]
    if cut.args[1:] != (-1, (sum(sizes), -1)) or split.kwargs.get("dim") != 2 or features % sum(sizes):
        raise Unfit("its projections are not cut into heads as they come")
    each, pieces = features // sum(sizes), []
    for item in split.users:
        flat = _only_user(item)
        if item.target is not operator.getitem or flat.target != "flatten" or flat.args[1:] != (2,):
            raise Unfit("its projections are not cut into heads as they come")
        place: Any = item.args[1]
        pieces.append((each * sum(sizes[:place]), each * sizes[place], _only_user(flat)))
    return pieces


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise Unfit("something else reads what is between its parts")
    return next(iter(node.users))


def _up_to_linear(node: object) -> fx.Node:
    """The module whose output a chain of one-argument steps has made into queries."""
    node = _node(node)
    while node.op != "call_module" or not isinstance(node.args[0], fx.Node) or node.args[0].op != "call_module":
        if not node.args:
            raise Unfit("queries of another form")
        node = _node(node.args[0])
    return node


def _last(node: fx.Node, norm: fx.Node | None, factor: float | None) -> fx.Node:
    """What enters a residual sum of a node that was normed and multiplied, or not."""
    last = norm or node
    return last if factor is None else _only_user(last)


def _other(total: fx.Node, one: fx.Node) -> fx.Node:
    """The other term of a sum."""
    terms = [x for x in total.args if x is not one]
    if len(terms) != 1:
        raise Unfit("a sum of something else than a residual")
    return _node(terms[0])


def _rotation(plain: fx.Node) -> tuple[fx.Node | None, tuple[Angle, Angle] | None]:
    """The node that is `plain` rotated, in its dtype, and the angles; None where it is not."""
    for user in plain.users:
        if user.target is ops.rope and user.args[0] is plain:
            return user, (_angle(user.args[1]), _angle(user.args[2]))
        if user.target is ops.wide:
            rope = _only_user(user)
            back = _only_user(rope)
            if rope.target is ops.rope and back.target == "type_as" and back.args[1] is plain:
                return back, (_angle(rope.args[1]), _angle(rope.args[2]))
    return None, None


def _rotates(user: fx.Node, turned: fx.Node | None) -> bool:
    return user is turned or (turned is not None and user.target is ops.wide)


def _angle(argument: object) -> Angle:
    node = _node(argument)
    if node.target is operator.getitem and isinstance(node.args[1], int):
        return _node(node.args[0]), node.args[1]
    return node, None
