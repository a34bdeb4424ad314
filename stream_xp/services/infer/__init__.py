"""The calculator behind `stream-xp infer`: one question per line in, one answer per line out."""

from stream_xp.services.infer.answers import answer
from stream_xp.services.infer.lines import METHODS, answer_lines

__all__ = ["METHODS", "answer", "answer_lines"]
