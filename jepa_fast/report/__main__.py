import sys

from jepa_fast.report import main

sys.exit(main())
