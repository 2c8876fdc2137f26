"""Files that prepare_data reads."""

import pytest

from tests.support.prepared import ROWS, write
from tests.tools.prepare_data.test_decontaminate import LONG


@pytest.fixture
def train(tmp_path) -> str:
    return write(tmp_path / "raw.jsonl", ROWS)


@pytest.fixture
def bench(tmp_path) -> str:
    return write(
        tmp_path / "bench.jsonl", [{"question": "other"}, {"question": LONG, "id": "rooks"}]
    )
