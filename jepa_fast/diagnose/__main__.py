import sys

from jepa_fast.diagnose import main

sys.exit(main())
