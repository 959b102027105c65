"""The names of options are those of the tables that have them."""

from __future__ import annotations

from kernelnorm.cli import names
from kernelnorm.experiments.bench import plan
from kernelnorm.experiments.recipes import RECIPES
from kernelnorm.models import list_models
from kernelnorm.models.published import PUBLISHED
from kernelnorm.norms import NORMS


def test_names_are_those_of_the_tables() -> None:
    assert (*RECIPES,) == names.CASES
    assert (*list_models(),) == names.MODELS
    assert names.NORMS == NORMS
    assert (*PUBLISHED,) == names.PUBLISHED
    assert (*plan.DTYPES,) == names.DTYPES
    assert (*plan.MEMORY_FORMATS,) == names.MEMORY_FORMATS
    assert names.MODES == plan.MODES
    assert names.PASSES == plan.PASSES
