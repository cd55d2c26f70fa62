"""What the same code has stored is never refused, and what older code has stored is.

Here are the units: single values, read as if DBOS had just unpickled them. What comes of it when a
process is killed is in test_odd_tools.py.
"""

import base64
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum, StrEnum
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Protocol,
    TypeVar,
)
from uuid import UUID, uuid4

import odd_future
import pytest
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    HttpUrl,
    IPvAnyAddress,
    PlainSerializer,
    PositiveInt,
    RootModel,
    SecretStr,
    Tag,
    WrapValidator,
    computed_field,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_ai import ToolReturn
from pydantic_ai import messages as ai
from typing_extensions import TypeAliasType, TypedDict

from durable import UnreadableError, read_stored

T = TypeVar("T")


class Item(BaseModel):
    name: str
    count: int = 1


class Special(Item):
    extra: str


class Aliased(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(alias="companyName")
    other: int = Field(validation_alias="in", serialization_alias="out")


class Excluded(BaseModel):
    name: str
    secret: str = Field(exclude=True)


class Serialized(BaseModel):
    day: date
    amount: Annotated[Decimal, PlainSerializer(str)]

    @field_serializer("day")
    def write_day(self, day: date) -> str:
        return f"{day:%d.%m.%Y}"


class SerializedWhole(BaseModel):
    name: str

    @model_serializer
    def write(self) -> str:
        return self.name


class Computed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int

    @computed_field
    def area(self) -> int:
        return self.width**2


class Before(BaseModel):
    """Its validators take what a service sends, and not what they have made of it."""

    tags: Annotated[list[str], BeforeValidator(lambda text: text.split(","))]
    degrees: float

    @field_validator("degrees", mode="before")
    @classmethod
    def read(cls, text: Any) -> float:
        return float(text.removesuffix(" C"))

    @model_validator(mode="before")
    @classmethod
    def unwrap(cls, payload: Any) -> Any:
        return payload["data"]


def as_text(number: int) -> str:
    return f"{number} C"


class After(BaseModel):
    """Its validators put a value of another type in the place of a valid one."""

    degrees: Annotated[int, AfterValidator(as_text)]
    wind: Annotated[int, WrapValidator(lambda value, handler: str(handler(value)))]
    rain: int

    @field_validator("rain")
    @classmethod
    def write(cls, value: int) -> str:
        return f"{value} mm"


class Checked(BaseModel):
    degrees: int = Field(ge=-273)

    @field_validator("degrees")
    @classmethod
    def warm(cls, value: int) -> int:
        assert value > 0
        return value


class Color(Enum):
    RED = "red"


class EnumValue(BaseModel):
    model_config = ConfigDict(use_enum_values=True)
    color: Color


class Plain:
    """A class that pydantic cannot check."""

    def __init__(self) -> None:
        self.anything = [object()]


class Holder(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    plain: Plain
    function: Callable[[int], str] | None = None


class Wrong(BaseModel):
    """Its default is none of its type, which pydantic does not validate."""

    name: str = None  # type: ignore[assignment]
    items: list[int] = Field(default=())  # type: ignore[arg-type]


class Standard(BaseModel):
    address: IPvAnyAddress
    when: AwareDatetime
    url: HttpUrl
    secret: SecretStr
    number: PositiveInt
    path: Path
    identifier: UUID


class Page(BaseModel, Generic[T]):
    items: list[T]


class Tree(RootModel[list["Tree"]]):
    pass


class Extra(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Old(BaseModel):
    legacy: int = Field(deprecated="no longer used")


@dataclass
class Point:
    x: float
    y: float = 0.0
    tags: list[str] = field(default_factory=list)
    item: Item | None = None


@dataclass(slots=True)
class Slotted:
    x: int


@pydantic_dataclass
class Validated:
    name: str = Field(alias="companyName")
    lie: int = Field(default=None)  # type: ignore[assignment]


@dataclass
class Box(Generic[T]):
    content: T


@dataclass
class Ring:
    next: "Ring | None" = None


class Pair(NamedTuple):
    left: int
    right: Item


class Row(TypedDict):
    name: str
    item: NotRequired[Item]


class Named(Protocol):
    name: str


UserId = NewType("UserId", int)
Alias = TypeAliasType("Alias", list[Item])
Many = TypeAliasType("Many", dict[str, list[T]], type_params=(T,))
Tagged = Annotated[
    Annotated[Item, Tag("item")] | Annotated[Point, Tag("point")], Field(description="either")
]


def ring() -> Ring:
    first = Ring()
    first.next = Ring(first)
    return first


ITEM = Item(name="anvil")
WHOLE = Standard(
    address=IPv4Address("127.0.0.1"),
    when=datetime(2026, 1, 1, tzinfo=UTC),
    url=HttpUrl("https://example.com"),
    secret=SecretStr("x"),
    number=1,
    path=Path("/tmp"),
    identifier=uuid4(),
)
ACCEPTED: list[tuple[object, Any]] = [
    (Aliased(companyName="Acme", **{"in": 1}), Aliased),
    (Excluded(name="Acme", secret="x"), Excluded),
    (Serialized(day=date(2026, 1, 1), amount=Decimal(1)), Serialized),
    (SerializedWhole(name="Acme"), SerializedWhole),
    (Computed(width=2), Computed),
    (Before.model_validate({"data": {"tags": "a,b", "degrees": "3 C"}}), Before),
    (After(degrees=1, wind=2, rain=3), After),
    (Checked.model_construct(degrees=-300), Checked),
    (EnumValue(color=Color.RED), EnumValue),
    (Plain(), Plain),
    (Holder(plain=Plain(), function=str), Holder),
    (Wrong(), Wrong),
    (WHOLE, Standard),
    (Page[Item](items=[ITEM]), Page[Item]),
    (Page(items=[ITEM]), Page[Item]),
    (Page[Any](items=[ITEM]), Page[Item]),
    (Tree([Tree([])]), Tree),
    (Extra(name="a", more=ITEM), Extra),  # type: ignore[call-arg]
    (Old.model_construct(legacy=1), Old),
    (Special(name="a", extra="b"), Item),
    (Point(1, 2, ["a"], ITEM), Point),
    (Slotted(1), Slotted),
    (Validated(companyName="Acme"), Validated),
    (Box(ITEM), Box[Item]),
    (ring(), Ring),
    (Pair(1, ITEM), Pair),
    ({"name": "a"}, Row),
    ({"name": "a", "item": ITEM}, Row),
    (ITEM, Named),
    (7, UserId),
    ([ITEM], Alias),
    ({"a": [ITEM]}, Many[Item]),
    (ITEM, Tagged),
    (3, float),
    (Color.RED, Color),
    ("b", Literal["a", "b"]),
    (None, None),
    (None, Item | None),
    ((1, "a"), tuple[int, str]),
    ((1, 2, 3), tuple[int, ...]),
    ((), tuple[()]),
    ({1: [ITEM]}, dict[int, list[Item]]),
    (OrderedDict(a=1), Mapping[str, int]),
    (defaultdict(int, a=1), defaultdict[str, int]),
    (Counter("aab"), Counter[str]),
    ({"a"}, set[str]),
    (frozenset({1}), frozenset[int]),
    (deque([1]), deque[int]),
    ((1, 2), Sequence[int]),
    ([1, 2], Iterable[int]),
    (len, Callable[[Any], int]),
    (Item, type[Item]),
    (1, Final[int]),
    (ITEM, T),
    (ITEM, "Gone"),
    (ITEM, [Item, Point]),  # as Pydantic AI's output types may be given
    (odd_future.Answer(companyName="Acme", parts=[odd_future.Part(1)]), odd_future.Answer),
    (ToolReturn(return_value=ITEM, content=["a"]), ToolReturn),
    (ToolReturn(return_value=ITEM), ToolReturn[Item]),
    ("text", Any),
    ("QUJDRA==", str),
]


@pytest.mark.parametrize(("value", "expected"), ACCEPTED)
@pytest.mark.parametrize("enforced", [True, False])
def test_what_the_same_code_has_stored_is_returned_as_it_is(
    value: object, expected: Any, enforced: bool
) -> None:
    assert read_stored("run", "step", value, expected, enforced=enforced) is value


def lacking(value: Any, *names: str) -> Any:
    """Return an object as an older class has made it, which did not have these fields."""
    old = pickle.loads(pickle.dumps(value))
    for name in names:
        object.__delattr__(old, name)
    return old


def holding(value: Any, **fields: object) -> Any:
    """Return an object as an older class has made it, whose fields had other types."""
    old = pickle.loads(pickle.dumps(value))
    for name, element in fields.items():
        object.__setattr__(old, name, element)
    return old


NAMELESS = lacking(ITEM, "name")
REFUSED: list[tuple[object, Any, str]] = [
    (NAMELESS, Item, "name: Field required"),
    (lacking(ITEM, "count"), Item, "count: Field required"),
    (lacking(ITEM, "count", "name"), Item, "name: Field required"),
    (holding(ITEM, count="3"), Item, "count: str is stored, today's type is int"),
    (holding(ITEM, name=3), Item, "name: int is stored, today's type is str"),
    (lacking(Special(name="a", extra="b"), "extra"), Item, "extra: Field required"),
    ([ITEM, NAMELESS], list[Item], "1.name: Field required"),
    ([NAMELESS], list, "0.name: Field required"),
    ({"a": NAMELESS}, dict[str, Item], "a.name: Field required"),
    ({"a": {"b": [NAMELESS]}}, Any, "a.b.0.name: Field required"),
    ((1, NAMELESS), tuple[int, Item], "1.name: Field required"),
    ((NAMELESS,), tuple[Item, ...], "0.name: Field required"),
    ([NAMELESS], Sequence[Item], "0.name: Field required"),
    ({"a": NAMELESS}, Mapping[str, Item], "a.name: Field required"),
    (NAMELESS, Item | None, "name: Field required"),
    (NAMELESS, Point | Item | str, "name: Field required"),
    (NAMELESS, Tagged, "name: Field required"),
    (NAMELESS, Any, "name: Field required"),
    (NAMELESS, T, "name: Field required"),
    ([NAMELESS], Alias, "0.name: Field required"),
    ({"a": [NAMELESS]}, Many[Item], "a.0.name: Field required"),
    (Point(1, item=NAMELESS), Point, "item.name: Field required"),
    (lacking(Point(1), "tags"), Point, "tags: Field required"),
    (Point("1"), Point, "x: str is stored"),  # type: ignore[arg-type]
    (Point(1, tags=[1]), Point, "tags.0: int is stored"),  # type: ignore[list-item]
    (lacking(Slotted(1), "x"), Slotted, "x: Field required"),
    (Slotted("1"), Slotted, "x: str is stored"),  # type: ignore[arg-type]
    (holding(Validated(companyName="a"), name=1), Validated, "name: int"),
    (Box(NAMELESS), Box[Item], "content.name: Field required"),
    (Pair(1, NAMELESS), Pair, "right.name: Field required"),
    (Pair("1", ITEM), Pair, "left: str is stored"),  # type: ignore[arg-type]
    (Page.model_construct(items=[NAMELESS]), Page[Item], "items.0.name: Field required"),
    (Page(items=[Point(1)]), Page[Item], "items.0: Point is stored"),
    ({"name": "a", "item": NAMELESS}, Row, "item.name: Field required"),
    (Holder.model_construct(plain=ITEM, function=None), Holder, "plain: Item is stored"),
    (lacking(Aliased(companyName="a", **{"in": 1}), "name"), Aliased, "name: Field required"),
    (lacking(Excluded(name="a", secret="b"), "secret"), Excluded, "secret: Field required"),
    (Serialized.model_construct(day="1.1.2026", amount=Decimal(1)), Serialized, "day: str"),
    (Before.model_construct(tags=["a"], degrees="3 C"), Before, "degrees: str is stored"),
    (Checked.model_construct(degrees="3"), Checked, "degrees: str is stored"),
    (After.model_construct(degrees=[], wind="2", rain="3"), After, "degrees: list is stored"),
    (EnumValue.model_construct(color="blue"), EnumValue, "color: str is stored"),
    (Extra(name="a", more=NAMELESS), Extra, "more.name: Field required"),  # type: ignore[call-arg]
    (odd_future.Answer.model_construct(name=1, parts=[]), odd_future.Answer, "name: int is stored"),
    (
        odd_future.Answer(companyName="a", parts=[lacking(odd_future.Part(1), "number")]),
        odd_future.Answer,
        "parts.0.number: Field required",
    ),
    (ToolReturn(return_value=NAMELESS), ToolReturn, "return_value.name: Field required"),
    ("of an older type", Item, "its type: str is stored, today's type is Item"),
    ("of an older type", Item | None, "its type: str is stored, today's type is Item or None"),
    ("red", Plain, "its type: str is stored"),
    (Point(1), Item, "its type: Point is stored, today's type is Item"),
    (ITEM, Plain, "its type: Item is stored, today's type is Plain"),
    ([Point(1)], list[Item], "0: Point is stored, today's type is Item"),
]


@pytest.mark.parametrize(("value", "expected", "told"), REFUSED)
@pytest.mark.parametrize("enforced", [True, False])
def test_what_older_code_has_stored_is_refused_with_its_place(
    value: object, expected: Any, told: str, enforced: bool
) -> None:
    with pytest.raises(UnreadableError) as caught:
        read_stored("run-1", "step", value, expected, enforced=enforced)
    assert f"the step that run run-1 has stored no longer fits: {told}" in str(caught.value)
    assert "Go back to the code that stored it, or start a new run." in str(caught.value)


DIFFERENT: list[tuple[object, Any]] = [
    (3, str),
    ("3", int),
    (None, Item),
    ({"name": "a"}, Item),
    ("unknown city", dict[str, Item]),
    ({"a": None, "b": 1}, dict[str, str]),
    ((1, 2, 3), tuple[int, int]),
    ({}, Row),
    ("c", Literal["a"]),
    (Decimal(1), str),
    (ITEM, dict[str, Any]),
]


@pytest.mark.parametrize(("value", "expected"), DIFFERENT)
def test_data_may_differ_from_a_tools_annotation_but_not_from_an_output_type(
    value: object, expected: Any
) -> None:
    """Nobody holds a tool to its annotation, so the same code may have stored this."""
    assert read_stored("run", "step", value, expected, enforced=False) is value
    with pytest.raises(UnreadableError, match="no longer fits"):
        read_stored("run", "report", value, expected)


@pytest.mark.parametrize("expected", [Item, str, Any, Item | None, list[ai.ModelMessage]])
@pytest.mark.parametrize(
    "gone", [b"cmodule_that_is_gone\nClass\n.", pickle.dumps(ITEM), pickle.dumps([Color.RED])]
)
def test_what_cannot_be_unpickled_is_refused_whatever_is_expected(
    gone: bytes, expected: Any
) -> None:
    raw = base64.b64encode(gone).decode()
    with pytest.raises(UnreadableError, match="can no longer be unpickled") as caught:
        read_stored("run", "step", raw, expected, enforced=False)
    assert "a class or module that it is made of is gone" in str(caught.value)
    assert "Go back to the code that stored it, or start a new run." in str(caught.value)


def messages() -> list[ai.ModelMessage]:
    """A history, whose parts hold what no annotation of Pydantic AI's promises."""
    return [
        ai.ModelRequest(parts=[ai.SystemPromptPart("Hi"), ai.UserPromptPart(["a", "b"])]),
        ai.ModelResponse(
            parts=(ai.TextPart("a"), ai.ThinkingPart("b"), ai.ToolCallPart("t", {"a": 1})),
            finish_reason="odd",  # type: ignore[arg-type]
        ),
        ai.ModelRequest(
            parts=[
                ai.ToolReturnPart("t", ITEM, "id"),
                ai.RetryFeedbackPart("no", retry=ai.RetryInfo(cause="no_output")),
            ]
        ),
    ]


def test_a_history_is_accepted_unless_a_message_or_a_result_in_it_lacks_a_field() -> None:
    history = messages()
    assert read_stored("run", "history", history, list[ai.ModelMessage]) is history
    part: Any = history[1].parts[2]
    del part.__dict__["tool_call_id"]
    with pytest.raises(UnreadableError, match=r"1\.parts\.2\.tool_call_id: Field required"):
        read_stored("run", "history", history, list[ai.ModelMessage])
    history = messages()
    part = history[2].parts[0]
    part.content = NAMELESS
    with pytest.raises(UnreadableError, match=r"2\.parts\.0\.content\.name: Field required"):
        read_stored("run", "history", history, list[ai.ModelMessage])


def test_a_class_whose_own_code_raises_is_not_compared() -> None:
    class Strange(dict[str, int]):
        def items(self) -> Any:
            raise ValueError

    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in (Strange(a=1), deep):
        assert read_stored("run", "step", value, Any) is value


def test_a_stored_enum_and_string_enum_are_their_own_values() -> None:
    class Level(StrEnum):
        LOW = "low"

    assert read_stored("run", "step", Level.LOW, Literal["low"]) is Level.LOW
    assert read_stored("run", "step", partial(int, "1"), Callable[[], int]) is not None
