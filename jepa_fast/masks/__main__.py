import sys

from jepa_fast.masks.report import main

sys.exit(main())
