"""`python -m proxy` is the command `ibid`."""

import sys

from proxy.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
