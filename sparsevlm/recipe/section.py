"""What a recipe's sections have in common: strict fields, documentation below them, and checks between options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

Positive = Annotated[float, Field(gt=0)]
"""A number greater than 0."""

OptionPath = tuple[str | int, ...]
"""Keys and indices that lead to a value, from the section that looks at it."""

KEY = "[key]"
"""Last part of a path that means the key of a mapping's entry, not its value (pydantic's own mark)."""


CrossFault = tuple[OptionPath, "str | ErrorDetails"]
"""Where it is, and what it is: a message, or an error of pydantic that is put into words later."""


def view(raw: Any) -> dict[str, Any]:
    """Return the entries of a section that may not be validated yet; nothing for what is no section."""
    if isinstance(raw, BaseModel):
        return dict(raw)
    return raw if isinstance(raw, dict) else {}


def names(raw: Any) -> list[str]:
    """Return the names in a list or the keys of a mapping; nothing for anything else."""
    return [name for name in raw if isinstance(name, str)] if isinstance(raw, list | dict) else []


def number(raw: Any) -> float | None:
    """Return a number, None for anything else."""
    return raw if isinstance(raw, int | float) and not isinstance(raw, bool) else None


def nested_error(errors: Sequence[Any]) -> PydanticCustomError:
    """Return one error that carries several, each with its own ``loc`` below the place where it is raised."""
    reason = "; ".join(f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}" for error in errors)
    return PydanticCustomError("nested", "{reason}", {"reason": reason, "errors": list(errors)})


class Strict(BaseModel):
    """Base of all recipe sections: unknown keys are faults, docstrings below fields are their documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """Yield ``(path, message)`` for options that do not go together; a path that ends in `KEY` blames the key.

        Called with the values before validation, so that these faults are reported with all others and not only once
        those are mended: look at values through `view`, `names` and `number`, and leave wrong types to the fields.
        """
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _gather(cls, raw: Any, handler: Callable[[Any], Any]) -> Any:
        found = [
            {"loc": at, "msg": text, "type": "cross"} if isinstance(text, str) else {**text, "loc": at}
            for at, text in cls.cross_faults(view(raw))
        ]
        if not found:
            return handler(raw)
        try:
            handler(raw)
        except ValidationError as error:
            found = [*error.errors(), *found]
        raise nested_error(found)


@dataclass
class Origin:
    """Where the values of a loaded recipe stand, for faults that show only later. No part of a recipe's value."""

    tree: Any = field(default=None, compare=False)
