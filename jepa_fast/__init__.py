"""jepa-fast: train I-JEPA and TS-JEPA, and know while it runs which phase you are in."""

__version__ = "0.1.0"
