"""The command line: arguments to calls.

The experiments are imported where they are used, so that help and mistakes answer at once.
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
from jsonargparse import ArgumentParser, Namespace

from kernelnorm import __version__
from kernelnorm.norms import NORMS
