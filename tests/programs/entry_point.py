"""`zinf`, as pip writes it."""

import sys

from zinf_cli.cli import main

sys.exit(main())  # type: ignore[func-returns-value]
