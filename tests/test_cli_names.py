"""The names of options are those of the tables that have them."""

from __future__ import annotations

from kernelnorm.cli import names
from kernelnorm.experiments.recipes import RECIPES
from kernelnorm.models import list_models
from kernelnorm.models.published import PUBLISHED
from kernelnorm.norms import NORMS


def test_names_are_those_of_the_tables() -> None:
    assert (*RECIPES,) == names.CASES
    assert (*list_models(),) == names.MODELS
    assert names.NORMS == NORMS
    assert (*PUBLISHED,) == names.PUBLISHED
