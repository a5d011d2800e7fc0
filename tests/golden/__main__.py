"""Write the golden losses anew: `python -m tests.golden`, when a change of the numbers is meant."""

import sys

import pytest

sys.exit(pytest.main(["tests/test_loop.py", "-k", "golden", "--write-golden"]))
