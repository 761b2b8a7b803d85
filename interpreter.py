"""The paper's interpretation tool: `python interpreter.py -p IMAGE -o DIR`. The same as `iared2 interpret`."""

import sys

from iared2.cli import main

if __name__ == "__main__":
    sys.exit(main(["interpret", *sys.argv[1:]]))
