"""What tests need from Debian, installed where it is missing and can be had; else they skip and say why."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def need_root(why: str) -> None:
    if os.geteuid() != 0:
        pytest.skip(f"skipped, because {why} needs root")


def need(commands: str, *packages: str) -> None:
    """Install `packages` unless all of `commands`, by blanks, are there."""
    missing = [command for command in commands.split() if shutil.which(command) is None]
    if not missing:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=300"]
    for words in ([*apt, "update"], [*apt, "install", "-y", "--no-install-recommends", *packages]):
        if shutil.which("apt-get") is None or subprocess.run(words, capture_output=True, env=environment).returncode:
            pytest.skip(f"skipped, because {' '.join(missing)} ({' '.join(packages)}) cannot be installed here")
