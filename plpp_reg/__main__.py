"""``python -m plpp_reg …``: the same program as ``plpp …``."""

import sys

from plpp_reg.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
