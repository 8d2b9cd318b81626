# PYTHON_ARGCOMPLETE_OK
"""`python -m polar_fx`."""

import sys

from .cli import main

sys.exit(main())
