"""What today's code declares: the types behind an annotation, and the fields of a class.

Nothing here runs a validator or a serializer. A validator matters in one way only: what it returns
takes the place of a field's value, and then the field may hold that type as well.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NewType,
    NotRequired,
    Required,
    Union,
    cast,
    get_args,
    get_origin,
)

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typing_extensions import ReadOnly, get_type_hints, is_typeddict

HARMLESS: set[object] = {
    pydantic.BeforeValidator,
    pydantic.Discriminator,
    pydantic.PlainSerializer,
    pydantic.SerializeAsAny,
    pydantic.Tag,
    pydantic.WrapSerializer,
}
"""What makes a schema of its own in `Annotated[T, …]`, and the value is a T all the same."""


@dataclass(frozen=True)
class Field:
    """A field that a class declares."""

    annotation: Any
    default: Any
    """`PydanticUndefined`, if it has none, or one that is made anew for each object."""


def return_type(function: Callable[..., Any]) -> Any:
    """Return the type that a function says it returns; `Any`, if it says none that is known."""
    return find_hints(undecorated(function)).get("return", Any)


def undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function in a partial object, in a method or under a decorator."""
    while isinstance(function, partial):
        function = function.func
    return cast(Callable[..., Any], inspect.unwrap(function))


def find_hints(owner: Any) -> dict[str, Any]:
    """Return the annotations of a function or class; none, if one of them cannot be resolved."""
    try:
        return get_type_hints(owner, include_extras=True)
    except Exception:  # a name that only a type checker imports, or no function at all
        return {}


def find_types(annotation: Any) -> list[Any]:
    """Return the types, of which a value has to be one: behind unions, aliases and wrappers."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        made = [
            return_type(metadata.func) if hasattr(metadata, "func") else Any
            for metadata in args[1:]
            if hasattr(metadata, "__get_pydantic_core_schema__") and type(metadata) not in HARMLESS
        ]
        args = (args[0], *made)
    elif isinstance(annotation, NewType):
        args = (annotation.__supertype__,)
    elif type(annotation).__name__ == "TypeAliasType":  # of typing, or of typing_extensions
        args = (annotation.__value__,)
    elif type(origin).__name__ == "TypeAliasType":
        args = (origin.__value__[args],)
    elif origin not in (Union, UnionType, Required, NotRequired, ReadOnly, Final):
        return [NoneType if annotation is None else annotation]
    return [each for arg in args for each in find_types(arg)]


def is_of_type(value: Any, expected: Any) -> bool:
    """Tell whether a value is of a type, whatever is inside; what cannot be told passes."""
    origin, args = get_origin(expected), get_args(expected)
    if origin is Literal:
        same_kind = [arg for arg in args if isinstance(value, bool) == isinstance(arg, bool)]
        return value in same_kind
    cls: Any = origin or expected
    if not isinstance(cls, type):
        return True
    if is_typeddict(cls):
        return isinstance(value, dict)
    if cls in (float, complex) and isinstance(value, int | float):
        return True  # as for a type checker
    if issubclass(cls, Enum) and any(value == member.value for member in cls):
        return True  # pydantic stores a member's value under `use_enum_values`
    if hasattr(cls, "__get_pydantic_core_schema__") and not is_model(cls):
        return True  # a value of EmailStr is a str, one of AwareDatetime a datetime
    generic = getattr(cls, "__pydantic_generic_metadata__", {"origin": None})
    try:
        return isinstance(value, generic["origin"] or cls)
    except TypeError:  # a protocol
        return True


def is_data(expected: Any) -> bool:
    """Tell whether a type is one of data, such as `int` or `list[str]`, and not of objects."""
    origin = get_origin(expected)
    module = getattr(origin or expected, "__module__", "")
    return origin is Literal or module in ("builtins", "collections", "collections.abc")


def is_model(cls: Any) -> bool:
    """Tell whether a class is a pydantic model that leaves its schema to pydantic."""
    schema = getattr(cls, "__get_pydantic_core_schema__", None)
    pydantics = pydantic.BaseModel.__get_pydantic_core_schema__
    return isinstance(cls, type) and getattr(schema, "__func__", 0) is pydantics.__func__  # type: ignore[attr-defined]


@lru_cache(maxsize=1000)
def find_fields(cls: Any) -> dict[str, Field]:
    """Return the fields that a class declares, if it is a model, a dataclass or a named tuple."""
    fields: dict[str, Field] = {}
    if issubclass(cls, pydantic.BaseModel):
        for name, info in cls.model_fields.items():
            fields[name] = Field(_annotate(info.annotation, info.metadata), info.default)
    elif dataclasses.is_dataclass(cls):
        hints = find_hints(cls)
        for field in dataclasses.fields(cls):
            default: Any = field.default
            if isinstance(default, FieldInfo):  # of a pydantic dataclass
                default = default.default
            default = PydanticUndefined if default is dataclasses.MISSING else default
            fields[field.name] = Field(hints.get(field.name, Any), default)
    elif issubclass(cls, tuple) and hasattr(cls, "_fields"):
        hints = find_hints(cls)
        for name in cls._fields:
            fields[name] = Field(hints.get(name, Any), PydanticUndefined)
    # Nobody checks what providers' adapters and scripts put into Pydantic AI's own objects.
    if cls.__module__.partition(".")[0] == "pydantic_ai":
        return {name: Field(Any, field.default) for name, field in fields.items()}
    return {
        name: Field(_annotate(field.annotation, _find_validators(cls, name)), field.default)
        for name, field in fields.items()
    }


def _find_validators(cls: Any, name: str) -> list[Any]:
    """Return the methods of a class whose result takes the place of a field's valid value."""
    decorators = getattr(cls, "__pydantic_decorators__", None)
    return [
        pydantic.AfterValidator(each.func)
        for each in (decorators.field_validators.values() if decorators else ())
        if each.info.mode != "before" and {name, "*"} & {*each.info.fields}
    ]


def _annotate(annotation: Any, metadata: list[Any]) -> Any:
    return Annotated[annotation, *metadata] if metadata else annotation
