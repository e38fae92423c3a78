"""`python -m trilithon.cli` is `trilithon`."""

import sys

from trilithon.cli import main

sys.exit(main())
