"""The ten mutations are still those of lines that exist; in the slow lane each is caught."""

import pytest

from tests.support import mutations
from tests.support.paths import PACKAGE, ROOT


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_a_mutation_has_its_line_and_its_tests(name):
    mutation = mutations.MUTATIONS[name]
    text = (PACKAGE / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert all((ROOT / "tests" / file).exists() for file in mutation.tests)


@pytest.mark.slow
def test_the_fast_lane_catches_every_mutation(capsys):
    assert mutations.main([]) == 0, capsys.readouterr().out
