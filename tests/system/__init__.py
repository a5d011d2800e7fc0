"""Tests that need root or system packages: `make test-system`."""
