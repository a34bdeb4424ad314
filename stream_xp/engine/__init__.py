"""The pure engine: a fold over columns of records, and decisions from exact statistics."""
