"""Reads an experiment's YAML file and reports every fault at once, each with its line.

`msgspec` stops at the first fault. So the YAML nodes, which know their lines, are walked side by side with
the types of `domain.experiment`: each field is checked by itself, whatever is wrong with its neighbours.
The rules across fields then run with stand-ins for what could not be read, and count where no stand-in
heals them.
"""

from stream_xp.services.spec_file.faults import FieldPath, SpecFault, SpecFaults
from stream_xp.services.spec_file.fields import Fields, read_fields
from stream_xp.services.spec_file.located import LocatedSpec, load_located, load_spec, parse_spec
from stream_xp.services.spec_file.nodes import MAX_FILE_BYTES

__all__ = [
    "MAX_FILE_BYTES",
    "FieldPath",
    "Fields",
    "LocatedSpec",
    "SpecFault",
    "SpecFaults",
    "load_located",
    "load_spec",
    "parse_spec",
    "read_fields",
]
