"""Tests beside other libraries: make test-zoo installs them and runs these."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("timm") else ["test_*.py"]
