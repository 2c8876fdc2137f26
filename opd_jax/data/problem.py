"""What a problem is, wherever it comes from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem: `prompt` text, `solution` (golden) text, `answer`, and a stable `id`.

    `solution` and `answer` are "" where the source has none; `system` is the text of a system turn
    that the source prescribes for this problem, "" where it prescribes none.
    """

    id: str
    prompt: str
    solution: str
    answer: str
    system: str = ""
