"""``python -m compactattn.eval``: as ``python -m compactattn eval``."""

import sys

from .cli import main

sys.exit(main())
