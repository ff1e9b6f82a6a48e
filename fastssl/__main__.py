"""`python -m fastssl` is `fastssl`."""

import sys

from fastssl.cli import main

sys.exit(main())
