"""A template's tree with charges put in where Jinja has no hook to count its work by."""

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from batchllm.text.sandbox_work import shallow

# Filters by names that no template can spell.
CHARGE, READ, MADE, ADD, CONCAT, METHOD = "charge()", "read()", "made()", "+", "~", "."
# Methods of texts that are quick to price: what they give is no longer than what they are given.
METHODS = ("startswith", "endswith", "strip", "lstrip", "rstrip", "split")


class Meter(NodeTransformer):
    """Rewrites a template's tree in place."""

    _buffered = 0  # how many buffers printed text goes through, here

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        cost = _cost(node)
        self.generic_visit(node)
        node.body.insert(0, _statement(cost, node.lineno))
        if node.test is not None:
            node.test = nodes.And(_charged(cost, node.lineno), node.test, lineno=node.lineno)
        return node

    def _visit_body(self, node: Any) -> nodes.Node:  # noqa: ANN401
        cost = _cost(node)
        self._visit_buffered(node)
        node.body.insert(0, _statement(cost, node.lineno))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _visit_body  # noqa: N815

    def _visit_buffered(self, node: nodes.Node) -> nodes.Node:
        self._buffered += 1
        self.generic_visit(node)
        self._buffered -= 1
        return node

    visit_AssignBlock = visit_FilterBlock = _visit_buffered  # noqa: N815

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if self._buffered:
            node.nodes = [
                part if isinstance(part, nodes.TemplateData) else _filter(READ, [part], node.lineno)
                for part in node.nodes
            ]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        parts: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            parts.append(left.right)
            left = left.left
        return _filter(ADD, [self.visit(part) for part in (left, *reversed(parts))], node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        return _filter(CONCAT, [self.visit(part) for part in node.nodes], node.lineno)

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        method = node.node
        if (
            isinstance(method, nodes.Getattr)
            and method.attr in METHODS
            and all(isinstance(value, nodes.Const) for value in node.args)
            and not (node.kwargs or node.dyn_args or node.dyn_kwargs)
        ):
            return _filter(METHOD + method.attr, [method.node, *node.args], node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filter(READ, [node], node.lineno)
        if not isinstance(node.arg, nodes.Const | nodes.Name):
            node.arg = _filter(READ, [node.arg], node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        searches = any(operand.op in ("in", "notin") for operand in node.ops)
        # Against a constant, at most the constant is read.
        if searches or not any(isinstance(side, nodes.Const) for side in sides):
            node.expr = _read(node.expr)
            for operand in node.ops:
                operand.expr = _read(operand.expr)
        return node

    def _visit_made(self, node: Any) -> nodes.Node:  # noqa: ANN401
        self.generic_visit(node)
        if isinstance(node, nodes.Tuple) and node.ctx != "load":
            return node
        return _filter(MADE, [node], node.lineno)

    visit_List = visit_Tuple = visit_Dict = _visit_made  # noqa: N815


def _read(node: nodes.Expr) -> nodes.Expr:
    # What is true or false already has nothing to read.
    atoms = (nodes.Const, nodes.Compare, nodes.Not, nodes.Test)
    return node if isinstance(node, atoms) else _filter(READ, [node], node.lineno)


def _cost(node: nodes.Node) -> int:
    """The work of evaluating what is in a node once."""
    cost = 1
    for inner in node.find_all(nodes.Node):
        cost += 1
        if isinstance(inner, nodes.TemplateData):
            cost += len(inner.data) >> 4
        elif isinstance(inner, nodes.Const):
            cost += shallow(inner.value)
    return cost


def _statement(cost: int, lineno: int) -> nodes.Node:
    return nodes.ExprStmt(_charged(cost, lineno), lineno=lineno)


def _charged(cost: int, lineno: int) -> nodes.Expr:
    return _filter(CHARGE, [nodes.Const(cost, lineno=lineno)], lineno)


def _filter(name: str, values: list[nodes.Expr], lineno: int) -> nodes.Expr:
    return nodes.Filter(values[0], name, values[1:], [], None, None, lineno=lineno)
