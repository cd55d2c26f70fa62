"""The idempotency key of a call: the same in every process, and no key of what could differ."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from conftest import PROJECT
from pydantic import BaseModel, ConfigDict, Field

from durable import idempotency_key


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Size(Enum):
    RED = "red"


class Word(StrEnum):
    LOW = "low"


class Number(IntEnum):
    ONE = 1


@dataclass
class Refund:
    order: str
    tags: frozenset[str]


@dataclass
class Charge:
    order: str
    tags: frozenset[str]


class Order(BaseModel):
    model_config = ConfigDict(extra="allow")
    amounts: dict[date, set[Decimal]]
    refund: Refund = Field(exclude=True)


LETTERS = frozenset("abcdefghij")
DAY = date(2026, 1, 31)
VALUES: dict[str, Any] = {
    "set": set(LETTERS),
    "frozenset": LETTERS,
    "nested": {frozenset({letter}) for letter in LETTERS},
    "mixed": {1, "1", None, (1, LETTERS), b"1", DAY},
    "tuple": (1, LETTERS),
    "bytes": b"\x00\xff",
    "date": DAY,
    "datetime": datetime(2026, 1, 31, 12, tzinfo=UTC),
    "time": time(12),
    "timedelta": timedelta(days=1),
    "decimal": Decimal("1.10"),
    "uuid": UUID(int=1),
    "enums": {Color.RED, Color.BLUE, Size.RED},
    "path": Path("/tmp"),
    "keys": {DAY: 1, 2: 3, (1, 2): Color.RED, None: LETTERS},
    "dataclass": Refund("a", LETTERS),
    "model": Order(
        amounts={DAY: {Decimal(1), Decimal(2)}},
        refund=Refund("a", LETTERS),
        more=LETTERS,  # type: ignore[call-arg]
    ),
    "infinite": [float("nan"), float("inf")],
}


def keys() -> dict[str, str]:
    return {name: idempotency_key("tool", value=value) for name, value in VALUES.items()}


def test_a_key_is_the_same_in_every_process_and_another_for_another_value() -> None:
    for seed in ("0", "1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", "import json, test_keys; print(json.dumps(test_keys.keys()))"],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'tests'}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert json.loads(printed) == keys()
    different = [*VALUES.values(), Charge("a", LETTERS), Color.RED, Size.RED, sorted(LETTERS)]
    # A set and a frozenset are equal, and so are their keys.
    assert len({idempotency_key("tool", value=value) for value in different}) == len(different) - 1


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        "Søn \ud83d",
        -0.0,
        10**30,
        [1, [2.5, {"b": None, "a": ["x"]}]],
        {"b": 1, "a": 2},
        (1, 2),
        Word.LOW,
        Number.ONE,
        float("inf"),
        DAY,
        Decimal("1.10"),
        UUID(int=1),
        Color.RED,
        Path("/tmp"),
    ],
)
def test_json_values_and_what_was_stable_have_the_keys_that_they_have_always_had(
    value: object,
) -> None:
    text = json.dumps({"b": value, "a": 1}, sort_keys=True, default=str)
    expected = f"None:tool:{sha256(text.encode()).hexdigest()[:16]}"
    assert idempotency_key("tool", b=value, a=1) == expected


@pytest.mark.parametrize(
    "value", [object(), [object()], {"a": {1: {object()}}}, Refund, len, iter([]), 1j, range(2)]
)
def test_what_has_no_stable_text_is_refused_with_the_arguments_name(value: object) -> None:
    with pytest.raises(TypeError, match=r"idempotency_key\(\) cannot use the argument 'customer'"):
        idempotency_key("tool", customer=value, to="a")
