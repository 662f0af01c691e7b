"""``python -m trimtab``: see cli.py."""

import sys

from .cli import main

sys.exit(main())
