"""The programs: the only place where adapters meet."""
