"""`python -m stream_xp` is `stream-xp`."""

from stream_xp.cli import main

if __name__ == "__main__":
    main(prog_name="stream-xp")
