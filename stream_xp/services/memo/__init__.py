"""The decision record: what was planned and seen, what was decided by whom, and what the effect is worth."""

from stream_xp.services.memo.build import conclusions, memo
from stream_xp.services.memo.markdown import markdown
from stream_xp.services.memo.record import Memo
from stream_xp.services.memo.topics import read_facts

__all__ = ["Memo", "conclusions", "markdown", "memo", "read_facts"]
