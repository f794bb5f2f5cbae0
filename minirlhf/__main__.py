"""`minirlhf COMMAND ...`, or `python -m minirlhf COMMAND ...`: see `minirlhf.commands`."""

import sys

from minirlhf.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
