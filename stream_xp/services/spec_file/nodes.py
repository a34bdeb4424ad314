"""The text of a file to YAML nodes, which know their lines."""

from __future__ import annotations

from typing import Any

import yaml

from stream_xp.services.spec_file.faults import SpecFault, refusal, shown

MAX_FILE_BYTES = 1_048_576
"""Longest spec file that is read."""

_MAX_DEPTH = 20
_MAX_NODES = 10_000

TAG = "tag:yaml.org,2002:"
REFUSED = "!refused"


def text_of(raw: bytes, file: str) -> str:
    """The bytes as text; raises SpecFaults where they are too many or no UTF-8."""
    if len(raw) > MAX_FILE_BYTES:
        raise refusal(file, f"is longer than {MAX_FILE_BYTES} bytes, the most that is read")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise refusal(file, "is not UTF-8 from here on", line=line, column=column) from error


class _Composer(yaml.SafeLoader):
    """SafeLoader that refuses aliases, depth and mass, each of which can make a small file enormous."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.aliases: list[yaml.Mark] = []
        self.depth = self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            mark: Any = event.start_mark
            self.aliases.append(mark)
            return yaml.ScalarNode(REFUSED, "", mark, mark)
        self.depth += 1
        self.nodes += 1
        if self.depth > _MAX_DEPTH or self.nodes > _MAX_NODES:
            limit = f"{_MAX_DEPTH} levels" if self.depth > _MAX_DEPTH else f"{_MAX_NODES} values"
            raise yaml.MarkedYAMLError(
                problem=f"more than {limit}, no spec is so large", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def compose(text: str, file: str) -> tuple[yaml.Node, list[SpecFault]]:
    """Return the document's root, and the faults of form that do not keep the rest from being read."""
    try:
        composer = _Composer(text)
        root, faults = _documents(composer)
    except yaml.MarkedYAMLError as error:
        line, column = position(error.problem_mark or error.context_mark)
        raise refusal(
            file, f"is not YAML: {error.problem or error.context}", line=line, column=column
        ) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        raise refusal(file, "has a character that YAML does not allow", line=line, column=column) from error
    if root is None:
        raise refusal(file, "is empty")
    aliases = (position(mark) for mark in composer.aliases)
    return root, [
        *faults,
        *(SpecFault(*at, "", "aliases (*name) are not allowed, write it out") for at in aliases),
    ]


def _documents(composer: _Composer) -> tuple[yaml.Node | None, list[SpecFault]]:
    root = composer.get_node() if composer.check_node() else None
    if not composer.check_node():
        return root, []
    event: Any = composer.peek_event()  # type: ignore[no-untyped-call]
    at = position(event.start_mark)
    return root, [SpecFault(*at, "", "a second document starts here, a file holds one experiment")]


def position(mark: yaml.Mark | None) -> tuple[int, int]:
    """Line and column, from 1."""
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)


_TAG_NAMES = {
    "bool": "the boolean",
    "float": "the number",
    "int": "the number",
    "null": "nothing",
    "str": "the text",
    "timestamp": "the date",
}


def mismatch(expected: str, node: yaml.Node) -> ValueError:
    """What to raise where a node is of another kind than expected."""
    return ValueError(f"expected {expected}, got {described(node)}")


def described(node: yaml.Node) -> str:
    """What a node is, for messages."""
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "fields"
    name = _TAG_NAMES.get(node.tag.removeprefix(TAG), f"a value tagged {shown(node.tag)}:")
    return name if node.tag == f"{TAG}null" else f"{name} {shown(node.value)!r}"
