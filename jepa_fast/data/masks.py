"""The earlier name of `python -m jepa_fast.masks --report`, which still works."""

import sys

from jepa_fast.masks.report import main

if __name__ == "__main__":
    sys.exit(main())
