import sys

from jepa_fast.export import main

sys.exit(main())
