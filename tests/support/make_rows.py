"""A large file to measure prepare_data with: python -m tests.support.make_rows 1000000 > rows.jsonl."""

import json
import random
import sys
from collections.abc import Iterator

SENTENCE = (
    "find the sum of all positive integers n such that a triangle with sides and area is prime let be "
    "real number function sequence circle point line angle square root value how many"
)
WORDS = SENTENCE.split()


def lines(count: int) -> Iterator[str]:
    """JSONL rows of about 1.5 kB; every tenth problem was there before, every seventh has no answer."""
    draw = random.Random(0)
    for index in range(count):
        source = random.Random(index // 2 if index % 10 == 1 else index)
        problem = f"Problem {' '.join(source.choices(WORDS, k=45))} {source.randrange(10**9)}?"
        steps = [" ".join(draw.choices(WORDS, k=12)) + "." for _ in range(16)]
        answer = "" if index % 7 == 0 else str(draw.randrange(1000))
        yield (
            json.dumps({"problem": problem, "solution": "\n".join(steps), "answer": answer}) + "\n"
        )


if __name__ == "__main__":
    sys.stdout.writelines(lines(int(sys.argv[1])))
