"""Jinja for strangers' templates: nothing outside is reached, and no render takes for ever.

Jinja's own sandbox keeps templates from the machine, but not from its time and memory: two nested
loops or `"a" * 10**10` are enough. Here each render has a budget of work, counted and not clocked,
so that an answer never depends on how fast a machine was. A unit is about a node of the template
evaluated, an item looked at, or 16 characters read or written.

Where it is paid: bodies of loops, macros and blocks pay for themselves by a statement put at their
heads, operators, filters and calls through Jinja's hooks, printed text as it comes. A list or dict
is paid for when it is made, with all that is in it and as often as it is in it. So whatever can be
printed or compared later has been paid for, or is part of the row.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import meta, nodes, pass_context
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg

from batchllm.errors import one_line
from batchllm.text import sandbox_prices as prices
from batchllm.text.sandbox_meter import ADD, CHARGE, CONCAT, MADE, METHOD, METHODS, READ, Meter
from batchllm.text.sandbox_work import DICT_VIEWS, MAX_WORK, Budget, deep, shallow

MAX_NODES = 20_000
_REASON_CHARS = 300
_DICT_ATTRIBUTES = frozenset(dir(dict))
_NO_ITERATORS = {str, int, bool, float, type(None), list, dict, tuple}
_ITERATORS = (Iterator, *DICT_VIEWS)
_COMPARING_TESTS = {
    *("in", "eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt"),
    *("greaterthan", ">", "ge", ">="),
}


class _LimitedContext(Context):
    """A render's variables, and what work it has left; `render` and `derived` set that."""

    budget: Budget

    def derived(self, locals: dict[str, Any] | None = None) -> Context:  # noqa: A002
        context = super().derived(locals)
        assert isinstance(context, _LimitedContext)
        context.budget = self.budget
        return context


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates have a budget a render; takes Jinja's options."""

    context_class = _LimitedContext
    intercepted_binops = frozenset({"*", "**", "%", "/", "//", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals.pop("lipsum")
        self.globals["namespace"] = _Namespace
        for name, function in list(self.filters.items()):
            self.limit_filter(name, function)
        for name in _COMPARING_TESTS:
            test: Any = self.tests[name]
            self.tests[name] = _limited_test(test)
        self.filters |= {CHARGE: _charge, READ: _read, MADE: _made, ADD: _add, CONCAT: _concat}
        self.filters |= {METHOD + name: _method(name) for name in METHODS}

    def compiled(self, source: str) -> jinja2.Template:
        """Compile a template.

        Raises:
            ValueError: it is not valid, or too large; the message says why, in a line.
        """
        with _compiling():
            return self.from_string(source)

    def undeclared(self, source: str) -> set[str]:
        """The names that a template reads and does not set; raises what `compiled` does."""
        with _compiling():
            return meta.find_undeclared_variables(self.parse(source))

    def limit_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Make `function` the filter of this name, paid for by what it is given."""
        self.filters[name] = function if name in prices.FREE else _limited(name, function)

    def getattr(self, obj: Any, attribute: str) -> Any:  # noqa: ANN401
        # What templates do most: an item of a dict that is no attribute of dicts.
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        assert isinstance(context, _LimitedContext)
        if operator == "%" and type(left) is int and type(right) is int:
            return left % right
        if operator == "+":
            return _add(context, left, right)
        context.budget.spend(prices.binary(operator, left, right, context.budget))
        return self.binop_table[operator](left, right)

    def call(  # the underscores keep keyword arguments of any name out of the way, as in Jinja
        __self,  # noqa: N805
        __context: Context,
        __obj: Any,  # noqa: ANN401
        *args: Any,
        **kwargs: Any,
    ) -> Any:  # noqa: ANN401
        assert isinstance(__context, _LimitedContext)
        budget = __context.budget
        if type(__obj) is Macro:  # its body pays, but for what it makes of its arguments
            if __obj.catch_varargs or __obj.catch_kwargs:
                budget.spend(deep([args, kwargs], budget).units)
            return super().call(__context, __obj, *args, **kwargs)
        args = tuple([_listed(budget, value) for value in args])
        if args or kwargs:
            budget.spend(deep([args, kwargs], budget).units)
        written = getattr(__obj, "__wrapped__", __obj)  # of `str.format` there is a safe copy
        if isinstance(written, BuiltinMethodType):
            price = prices.method(written.__name__, written.__self__, args, kwargs, budget)
            budget.spend(price)
        return _paid(budget, super().call(__context, __obj, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        count = 0
        for node in tree.find_all(nodes.Node):
            count += 1
            if isinstance(node, nodes.Const):
                prices.check_number(node.value)
        if count > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES:,} parts")
        return tree

    def _generate(
        self,
        source: nodes.Template,
        name: str | None,
        filename: str | None,
        defer_init: bool = False,
    ) -> str:
        Meter().visit(source).set_environment(self)
        return super()._generate(source, name, filename, defer_init)


@contextmanager
def _compiling() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, on the code that Jinja makes of a template
            yield
        return
    except jinja2.TemplateSyntaxError as error:
        reason = f"{error.message} (line {error.lineno})"
    except RecursionError:
        reason = "it is nested too deeply"
    except Exception as error:  # Jinja works constants out, and Python refuses, in many ways
        reason = str(error) or type(error).__name__
    raise ValueError(one_line(" ".join(reason.split()), _REASON_CHARS))


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Render within a budget.

    Raises:
        ValueError: the template fails; the message says why, in a line.
    """
    try:
        context = template.new_context(variables)
        assert isinstance(context, _LimitedContext)
        budget = context.budget = Budget(MAX_WORK)
        pieces = []
        for piece in template.root_render_func(context):
            budget.left -= len(piece) >> 4
            if budget.left < 0:
                budget.spend(0)
            pieces.append(piece)
        return "".join(pieces)
    except Exception as error:  # a template can fail in any way that Python can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(one_line(reason, _REASON_CHARS)) from None


class _Namespace(Namespace):
    """Jinja's, but printing one does not print what is in it, which can be itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


@pass_context
def _charge(context: _LimitedContext, cost: int) -> bool:
    budget = context.budget
    budget.left -= cost
    if budget.left < 0:
        budget.spend(0)
    return True


@pass_context
def _read(context: _LimitedContext, value: Any) -> Any:  # noqa: ANN401
    budget = context.budget
    budget.spend(len(value) >> 4 if type(value) is str else deep(value, budget).units)
    return value


@pass_context
def _made(context: _LimitedContext, value: Any) -> Any:  # noqa: ANN401
    context.budget.spend(deep(value, context.budget).units)
    return value


@pass_context
def _add(context: _LimitedContext, *parts: Any) -> Any:  # noqa: ANN401
    for part in parts:
        if type(part) is not str:
            break
    else:
        context.budget.spend(1 + (sum(map(len, parts)) >> 4))
        return "".join(parts)
    total = parts[0]
    for part in parts[1:]:
        if not isinstance(part, int):
            context.budget.spend(deep([total, part], context.budget).units)
        total = total + part
        prices.check_number(total)
    return total


@pass_context
def _concat(context: _LimitedContext, *parts: object) -> str:
    texts = [part if type(part) is str else str(_made(context, part)) for part in parts]
    context.budget.spend(1 + (sum(map(len, texts)) >> 4))
    return "".join(texts)


def _method(name: str) -> Callable[..., Any]:
    """A method of texts with constant arguments; on anything else, whatever Jinja does."""
    of_text = getattr(str, name)

    @pass_context
    def method(context: _LimitedContext, value: Any, *args: Any) -> Any:  # noqa: ANN401
        if type(value) is str:
            context.budget.spend(1 + (len(value) >> (1 if name == "split" else 4)))
            return of_text(value, *args)
        environment = context.environment
        assert isinstance(environment, LimitedEnvironment)
        return environment.call(context, environment.getattr(value, name), *args)

    return method


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its work."""
    passed = _PassArg.from_obj(function)
    is_plain = name in prices.LINEAR and passed is None

    @pass_context
    def limited(context: _LimitedContext, value: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        budget = context.budget
        if is_plain and not args and not kwargs:
            result = function(value)
            if type(result) is str:
                budget.spend(1 + (len(result) >> 4))
                return result
        else:
            value = _listed(budget, value)
            args = tuple([_listed(budget, argument) for argument in args])
            budget.spend(prices.filtering(name, value, [*args, *kwargs.values()], budget))
            first: tuple[object, ...] = ()
            if passed is _PassArg.context:
                first = (context,)
            elif passed is _PassArg.eval_context:
                first = (context.eval_ctx,)
            elif passed is _PassArg.environment:
                first = (context.environment,)
            result = function(*first, value, *args, **kwargs)
        if name in prices.REPEATING:
            result = _made(context, _listed(budget, result))
        return _paid(budget, result)

    return limited


def _limited_test(function: Callable[..., Any]) -> Callable[..., bool]:
    @pass_context
    def limited(context: _LimitedContext, value: object, *args: object) -> Any:  # noqa: ANN401
        for read in (value, *args):
            _read(context, read)
        return function(value, *args)

    return limited


def _listed(budget: Budget, value: Any) -> Any:  # noqa: ANN401
    """What an iterator would give, as a list, so that it can be looked at before it is used."""
    if type(value) in _NO_ITERATORS or not isinstance(value, _ITERATORS):
        return value
    items = []
    for item in value:
        budget.spend(1)
        items.append(item)
    return items


def _paid(budget: Budget, value: Any) -> Any:  # noqa: ANN401
    """A result of a call or filter, when it has been paid for."""
    if type(value) is str:
        budget.spend(1 + (len(value) >> 4))
    else:
        prices.check_number(value)
        budget.spend(shallow(value))
    return value
