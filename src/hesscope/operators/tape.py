"""A straight-line program of tensor operations in one input: what a recorded linear map is made of.

Much like a graph of `torch.fx`, which takes ten times longer to build: thousands of operations are recorded for every
network, and the recording is part of what the user waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, fx, nn

Kind = tuple[Any, ...]


def kind_of(tensor: Tensor) -> Kind:
    """What must agree for one tensor to stand in another's place: shape, dtype, device, layout."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the program: its input (no operation), a constant, or the result of an operation.

    Attributes:
        kind: see `kind_of`; None for what is not a tensor.
        operation: what makes it, an overload of ATen or `operator.getitem`; args, kwargs: with Values in place of
            tensors.
        constant: its tensor, if it is one.
        users: the values made from it, each as often as it takes it.
        in_place: whether it has been rewritten to write to a temporary of its own.
        sources: the values it is made from, each as often as it takes them.
    """

    kind: Kind | None
    operation: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    constant: Tensor | None = None
    users: list[Value] = field(default_factory=list)
    in_place: bool = False
    sources: tuple[Value, ...] = ()

    def __post_init__(self) -> None:
        self.take(self.operation, self.args, self.kwargs)

    def take(self, operation: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Be the result of this operation on these arguments."""
        self.operation, self.args, self.kwargs = operation, args, kwargs
        self.sources = tuple(values_in((args, tuple(kwargs.values())) if kwargs else args))

    @property
    def writes(self) -> bool:
        """Whether its operation writes to an argument."""
        return _facts(self.operation)[0]

    @property
    def is_view(self) -> bool:
        """Whether it may share its memory with what it is made from."""
        return _facts(self.operation)[1]


@cache
def _facts(operation: Callable[..., Any] | None) -> tuple[bool, bool]:
    """Whether an operation writes to an argument, and whether its result may share memory with one."""
    schema = getattr(operation, "_schema", None)
    if schema is None:
        return False, True
    return bool(schema.is_mutable), any(result.alias_info is not None for result in schema.returns)


def values_in(arguments: Any) -> Iterator[Value]:
    """All values of nested arguments."""
    if isinstance(arguments, Value):
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from values_in(argument)


def _exchanged(argument: Any, value: Value, other: Value) -> Any:
    """The nested argument with `other` in place of `value`."""
    if isinstance(argument, (list, tuple)):
        return [_exchanged(each, value, other) for each in argument]
    return other if argument is value else argument


class Tape:
    """The program: operations in the order in which they run; `result` is one of their values."""

    def __init__(self) -> None:
        self.input = Value(None)
        self.values: list[Value] = []
        self.result = self.input

    def add(
        self, kind: Kind | None, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Value:
        """Append an operation."""
        value = Value(kind, operation, args, kwargs)
        for source in value.sources:
            source.users.append(value)
        self.values.append(value)
        return value

    @property
    def constants(self) -> dict[int, Value]:
        """The constants that are used, by identity."""
        return {id(source): source for value in self.values for source in value.sources if source.constant is not None}

    def with_constants(self, changed: Callable[[Tensor], Tensor]) -> Tape:
        """The same program with `changed` of every constant in its place."""
        other = Tape()
        other.input.kind = self.input.kind
        copies: dict[int, Value] = {id(self.input): other.input}

        def copied(argument: Any) -> Any:
            if isinstance(argument, (list, tuple)):
                return [copied(each) for each in argument]  # noqa: F821 (it is deleted at the end)
            if isinstance(argument, Value) and argument.constant is not None and id(argument) not in copies:
                copies[id(argument)] = Value(argument.kind, constant=changed(argument.constant))
            return copies[id(argument)] if isinstance(argument, Value) else argument

        for value in self.values:
            kwargs = {name: copied(argument) for name, argument in value.kwargs.items()}
            assert value.operation is not None
            copies[id(value)] = other.add(value.kind, value.operation, tuple(map(copied, value.args)), kwargs)
        other.result = copies[id(self.result)]
        del copied  # a cycle: it refers to itself, and to all constants
        return other

    def precedes(self, value: Value, other: Value) -> bool:
        """Whether `value` is known where `other` is made."""
        return value.operation is None or self.values.index(value) < self.values.index(other)

    def change(
        self, value: Value, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Put another operation in place of a value's own."""
        for source in value.sources:
            source.users.remove(value)
        value.take(operation, args, kwargs)
        for source in value.sources:
            source.users.append(value)

    def substitute(self, value: Value, other: Value) -> None:
        """Let everybody who takes `value` take `other`; `value` is of no use any more."""
        for user in dict.fromkeys(value.users):
            kwargs = {name: _exchanged(argument, value, other) for name, argument in user.kwargs.items()}
            user.take(user.operation, tuple(_exchanged(argument, value, other) for argument in user.args), kwargs)
        other.users += value.users
        value.users = []
        if self.result is value:
            self.result = other

    def drop_unused(self) -> None:
        """Take out every operation whose result nobody needs, unless it writes to a tensor."""
        kept = []
        for value in reversed(self.values):
            if value.users or value.writes or value is self.result:
                kept.append(value)
            else:
                for source in value.sources:
                    source.users.remove(value)
        self.values = kept[::-1]

    def program(self, instead: Mapping[Any, Callable[..., Any]] | None = None) -> Callable[[Tensor], Tensor]:
        """The tape as a Python function, which forgets each temporary after its last use.

        `instead`: operations to be replaced by others; those that write stay, unless they were made `in_place`.
        """
        names: dict[int, str] = {id(self.input): "v"}
        scope: dict[str, Any] = {}
        operations: dict[Any, str] = {}
        last = {id(source): value for value in self.values for source in value.sources}

        def written(argument: Any) -> str:
            if isinstance(argument, Value):
                if argument.constant is not None and id(argument) not in names:
                    names[id(argument)] = f"c{len(names)}"
                    scope[names[id(argument)]] = argument.constant
                return names[id(argument)]
            if isinstance(argument, (list, tuple)):
                return "[" + ", ".join(map(written, argument)) + "]"  # noqa: F821 (it is deleted at the end)
            if type(argument) in (int, bool, str, type(None)):
                return repr(argument)
            name = f"k{len(scope)}"  # dtypes, devices, floats (inf and nan have no literal)
            scope[name] = argument
            return name

        lines = []
        for number, value in enumerate(self.values):
            replaced = instead is not None and (value.in_place or not value.writes)
            operation = instead.get(value.operation, value.operation) if replaced and instead else value.operation
            if operation not in operations:
                operations[operation] = f"f{len(operations)}"
                scope[operations[operation]] = operation
            given = [*map(written, value.args), *(f"{key}={written(each)}" for key, each in value.kwargs.items())]
            names[id(value)] = f"x{number}"
            gone = {
                names[id(source)]
                for source in value.sources
                if source.operation is not None and last[id(source)] is value and source is not self.result
            }
            lines.append(f"    x{number} = {operations[operation]}({', '.join(given)})")
            if gone:
                lines.append(f"    del {', '.join(sorted(gone))}")
        source = "\n".join(["def program(v):", *lines, f"    return {names[id(self.result)]}"])
        exec(compile(source, "<recorded linear map>", "exec"), scope)  # our own text: names of operations and numbers
        program: Callable[[Tensor], Tensor] = scope.pop("program")
        del written  # a cycle: it refers to itself, and to all constants
        return program

    def forget_users(self) -> None:
        """End the rewriting: without users there are no cycles, and constants are freed with the tape at once."""
        for value in (*self.values, *self.constants.values(), self.input):
            value.users.clear()

    def to_fx(self) -> fx.GraphModule:
        """The tape as a graph of torch.fx, for the compiler."""
        graph, root = fx.Graph(), nn.Module()
        nodes: dict[int, Any] = {id(self.input): graph.placeholder("v")}

        def node(argument: Any) -> Any:
            if isinstance(argument, (list, tuple)):
                return [node(each) for each in argument]  # noqa: F821 (it is deleted at the end)
            if not isinstance(argument, Value):
                return argument
            if id(argument) not in nodes:
                name = f"constant_{len(nodes)}"
                root.register_buffer(name, argument.constant)
                nodes[id(argument)] = graph.get_attr(name)
            return nodes[id(argument)]

        for value in self.values:
            kwargs = {name: node(argument) for name, argument in value.kwargs.items()}
            nodes[id(value)] = graph.call_function(value.operation, tuple(map(node, value.args)), kwargs)  # type: ignore[arg-type]
        graph.output(nodes[id(self.result)])
        del node  # as above
        return fx.GraphModule(root, graph)
