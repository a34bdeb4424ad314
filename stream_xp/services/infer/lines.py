"""Lines of JSON in, answers out; what is wrong with a line is its answer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from msgspec import inspect

from stream_xp.services.infer.answers import answer
from stream_xp.services.infer.questions import ANY_QUESTION, Question

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stream_xp.services.infer.answers import Answer

_DECODER = msgspec.json.Decoder(ANY_QUESTION)
_TYPES: Final[Any] = inspect.type_info(ANY_QUESTION)
_AT = re.compile(r"^(?P<message>.*) - at `\$\.?(?P<path>[^`]*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]+)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>[^`]+)`$")


_STRUCTS: Final = {str(kind.tag): kind for kind in _TYPES.types}
METHODS: Final = tuple(_STRUCTS)


def answer_lines(lines: Iterable[bytes]) -> Iterator[Answer]:
    """Give the answer to each line, in order; blank lines are passed over.

    An answer to a line that is wrong is {"line": its number from 1, "error": the field and the rule}.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _answered(line)
        except ValueError as error:
            yield {"line": number, "error": str(error)}
        except ArithmeticError as error:
            yield {"line": number, "error": f"the numbers are out of range: {error}"}


def _answered(line: bytes) -> Answer:
    question = _question(line)
    # A number that overflows on the way is no answer.
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        return answer(question)


def _question(line: bytes) -> Question:
    try:
        question: Question = _DECODER.decode(line)
    except msgspec.ValidationError as error:
        raise ValueError(_fault(str(error), line)) from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"no JSON object: {error}") from error
    return question


def _fault(text: str, line: bytes) -> str:
    # The rule with its field first, as in the messages of the functions that answer.
    found = _AT.match(text)
    path, message = (found["path"], found["message"]) if found else ("", text)
    if path == "method" or text.endswith("required field `method`"):
        return f"method: must be one of {', '.join(METHODS)}"
    for pattern, rule in ((_MISSING, "required field is missing"), (_UNKNOWN, "unknown field")):
        if named := pattern.match(message):
            path, message = ".".join(filter(None, (path, named["name"]))), rule
    if message.startswith("Invalid enum value"):
        message = f"must be one of {_choices(path, line)}"
    if not path:
        return f"no JSON object: {message}" if message.startswith("Expected") else message
    # A rule between the fields of a part names one of them itself.
    return f"{path}{'.' if re.match(r'[a-z_.]+: ', message) else ': '}{message[:1].lower()}{message[1:]}"


def _choices(field: str, line: bytes) -> str:
    fields: dict[str, Any] = msgspec.json.decode(line)
    kind = next(f.type for f in _STRUCTS[fields["method"]].fields if f.encode_name == field)
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    values = [v for k in kinds if isinstance(k, inspect.LiteralType) for v in k.values]
    return ", ".join(map(str, values))
