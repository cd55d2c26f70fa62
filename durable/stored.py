"""Whether what a run has stored still fits today's types.

Unpickling does not validate: an object that older code has stored may lack a field of today's
class, or hold a value of another type, and only its use would fail. So the stored value is walked,
and each object in it is compared with today's class:

- For each field that the class declares, the object has a value.
- That value is of the declared type, or it is the field's default.

The same code must never refuse what it has stored itself. So the object is looked at as it is:
nothing is dumped, converted or validated, and no alias, serializer, validator or constraint such as
`Field(ge=0)` decides. What is not declared or cannot be compared passes: the attributes of a plain
class, a type variable, a class that makes its own pydantic schema.
"""

import base64
import pickletools
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NotRequired, Required, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typing_extensions import Unpack, is_typeddict

from durable.declared import (
    Field,
    find_fields,
    find_hints,
    find_types,
    is_data,
    is_model,
    is_of_type,
)
from durable.errors import UnreadableError


def read_stored(
    run_id: str,
    name: str,
    value: object,
    expected: Any,
    *,
    to_start_anew: str = "start a new run",
    enforced: bool = True,
) -> Any:
    """Return a stored value, which is not changed; raise `UnreadableError` if it does not fit.

    Args:
        run_id: Whose value it is, for the error.
        name: What it is, for the error.
        value: As DBOS returns it.
        expected: The type that today's code declares; `Any`, if it declares none.
        to_start_anew: What a person does to get a new run of the same question, for the error.
        enforced: Whether a value of another type could not have been stored. A tool's result could:
            it goes to the model as JSON, and nobody compares it with the tool's return annotation.
    """
    way_out = f"Go back to the code that stored it, or {to_start_anew}."
    if is_pickle(value):  # DBOS returns the raw text in place of what it cannot unpickle
        raise UnreadableError(
            f"the {name} that run {run_id} has stored can no longer be unpickled: a class or module"
            f" that it is made of is gone, or was renamed.\n{way_out}"
        )
    try:
        _check(value, expected, _Place(enforced=enforced))
    except _MisfitError as misfit:
        raise UnreadableError(
            f"the {name} that run {run_id} has stored no longer fits: {misfit}.\n{way_out}"
        ) from None
    except Exception:
        return value  # it cannot be compared: nested too deeply, or a class's own code raises
    return value


def is_pickle(value: object) -> bool:
    """Tell whether a text is a whole pickle in which a class is named, without unpickling it."""
    if not isinstance(value, str):
        return False
    try:
        operations = list(pickletools.genops(base64.b64decode(value, validate=True)))
    except ValueError:
        return False
    return any(operation.name in ("GLOBAL", "STACK_GLOBAL") for operation, _, _ in operations)


@dataclass(frozen=True)
class _Place:
    """Where in the stored value the walk is."""

    path: tuple[object, ...] = ()
    around: frozenset[int] = frozenset()
    """The IDs of the objects around, because an object may hold itself."""
    enforced: bool = True

    def at(self, key: object) -> "_Place":
        return replace(self, path=(*self.path, key))


class _MisfitError(Exception):
    def __init__(self, place: _Place, problem: str) -> None:
        super().__init__(f"{'.'.join(map(str, place.path)) or 'its type'}: {problem}")
        self.depth = len(place.path)


def _check(value: Any, expected: Any, place: _Place) -> None:
    """Raise `_MisfitError` if a value, or one inside it, is not what today's code declares."""
    if id(value) in place.around:
        return None
    types = find_types(expected)
    fitting = [each for each in types if is_of_type(value, each)]
    if not fitting:
        if place.enforced or not _may_differ(value, types):
            names = " or ".join(getattr(each, "__name__", str(each)) for each in types)
            raise _MisfitError(place, f"{type(value).__name__} is stored, today's type is {names}")
        fitting = [Any]
    misfits = []
    for each in fitting:
        try:
            return _check_inside(value, each, replace(place, around=place.around | {id(value)}))
        except _MisfitError as misfit:
            misfits.append(misfit)
    raise max(misfits, key=lambda misfit: misfit.depth)


def _may_differ(value: object, types: list[Any]) -> bool:
    """Tell whether a tool may have returned this value, although it declares these types.

    Data may be returned in place of other data or of an object: with `-> Weather`, a dict or None.
    But a text in place of an object may also be what DBOS could not unpickle.
    """
    return all(map(is_data, types)) or (is_data(type(value)) and not isinstance(value, str))


def _check_inside(value: Any, expected: Any, place: _Place) -> None:
    """Check the fields of an object, or the elements of a collection."""
    cls = get_origin(expected) or expected
    args = get_args(expected) if is_data(expected) else ()  # others' may mean anything
    own: Any = type(value)
    fields = find_fields(own)
    if is_typeddict(cls):
        _check_keys(value, cls, place)
    elif fields:
        if is_model(cls) and not isinstance(value, cls):
            fields = find_fields(cls)  # a plain Page, where Page[Item] is declared
        _check_fields(value, fields, replace(place, enforced=True))
    elif isinstance(value, Mapping) and (args or isinstance(value, dict)):
        key_type, element_type = (*args, Any, Any)[:2]
        for key, element in value.items():
            _check(key, key_type, place.at(f"key {key!r}"))
            _check(element, element_type, place.at(key))
    elif cls is tuple and args and args[-1] is not Ellipsis:
        _check_elements(value, args, place)
    elif isinstance(value, list | tuple | set | frozenset | deque) or (
        args and isinstance(value, Collection) and not isinstance(value, str | bytes)
    ):
        for number, element in enumerate(value):
            _check(element, args[0] if args else Any, place.at(number))


def _check_fields(value: Any, fields: dict[str, Field], place: _Place) -> None:
    """Check an object's fields, which a model or a dataclass has in its class."""
    held = getattr(value, "__dict__", {})  # to read a deprecated field as an attribute would warn
    missing = [
        name
        for name in fields
        if name not in held and (isinstance(value, BaseModel) or not hasattr(value, name))
    ]
    if missing:  # told is one without a default, if there is such a field
        name = min(missing, key=lambda name: fields[name].default is not PydanticUndefined)
        raise _MisfitError(place.at(name), "Field required")
    for name, field in fields.items():
        element = held[name] if name in held else getattr(value, name)
        default = type(element) is type(field.default) and element == field.default
        if not (default and is_data(type(element))):  # nobody validates a default
            _check(element, field.annotation, place.at(name))
    for name, element in (getattr(value, "__pydantic_extra__", None) or {}).items():
        _check(element, Any, place.at(name))


def _check_keys(value: Any, cls: Any, place: _Place) -> None:
    for key, hint in find_hints(cls).items():
        # Under `from __future__ import annotations`, this set holds the NotRequired keys as well.
        wrapper, keys = get_origin(hint), cls.__required_keys__
        needed = wrapper is Required or (key in keys and wrapper is not NotRequired)
        if key in value:
            _check(value[key], hint, place.at(key))
        elif needed and place.enforced:
            raise _MisfitError(place.at(key), "Field required")


def _check_elements(value: tuple[Any, ...], args: tuple[Any, ...], place: _Place) -> None:
    if any(get_origin(arg) is Unpack or getattr(arg, "__unpacked__", False) for arg in args):
        args = (Any,) * len(value)
    if len(value) != len(args) and place.enforced:
        raise _MisfitError(place, f"{len(value)} elements are stored, today's type has {len(args)}")
    for number, (element, arg) in enumerate(zip(value, args, strict=False)):
        _check(element, arg, place.at(number))
