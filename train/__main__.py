"""`python -m train` is `colossus train`."""

import sys

from train.cli import main

if __name__ == "__main__":  # ranks import this module under another name
    sys.exit(main(["train", *sys.argv[1:]]))
