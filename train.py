"""The same program as `plpp train`, under the name that Dassl-based repositories use."""

import sys

from plpp_reg.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
