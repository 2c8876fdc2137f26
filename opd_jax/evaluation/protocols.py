r"""Prompt and sampling settings of the papers, as presets: `configs/evaluate.py:NAME` sets the fields.

Every value can be overridden on the command line, and results.json records the values that were used.
"found", "second-hand" and "unknown" grade the certainty of a value.
"""

import dataclasses

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
# The exact system turn of LUFFY's valid.all.parquet.
LUFFY_SYSTEM = (
    "Your task is to follow a systematic, thorough reasoning process before providing the final solution. "
    "This involves analyzing, summarizing, exploring, reassessing, and refining your thought process through "
    "multiple iterations. Structure your response into two sections: Thought and Solution. In the Thought "
    'section, present your reasoning using the format: "<think>\n {thoughts} </think>\n". Each thought '
    "should include detailed analysis, brainstorming, verification, and refinement of ideas. After "
    '"</think>\n," in the Solution section, provide the final, logical, and accurate answer, clearly '
    "derived from the exploration in the Thought section. If applicable, include the answer in \\boxed{} for "
    "closed-form results like multiple choices or mathematical solutions."
)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A preset.

    Attributes:
      name, source: its name, and the source of its values.
      temperature, top_p, max_response_tokens: sampling settings.
      samples: samples per problem; 0 = that of the benchmark's entry (32 for AIME and AMC).
      prompt_template: text of the user turn. system_prompt: text of the system turn, "none" for no turn.
      fallbacks: how to extract an answer without a box (extract.FALLBACKS).
    """

    name: str
    source: str
    temperature: float
    top_p: float
    max_response_tokens: int
    samples: int
    prompt_template: str
    system_prompt: str
    fallbacks: tuple[str, ...] = ()


PROTOCOLS = {
    entry.name: entry
    for entry in (
        Protocol(
            "luffy",
            "LUFFY (2504.14945) and so, by its copied rows, 2604.08527: temperature 0.6, top-p 1.0, "
            "8192 tokens, its system prompt (found in its code and data); the metric after 2604.08527, "
            '5.1: "we report avg@32"; the student\'s own chat template opens <think>',
            0.6, 1.0, 8192, 0, "{problem}", LUFFY_SYSTEM, ("after_think",),
        ),
        Protocol(
            "qwen2.5-math",
            "Qwen2.5-Math, evaluation/sh/eval.sh: --temperature 0 --n_sampling 1 --top_p 1, prompt type "
            "qwen25-math-cot; 2048 tokens: eval.sh does not set --max_tokens_per_call, whose default in "
            "evaluation/math_eval.py is 2048; without a box the last number (evaluation/parser.py)",
            0.0, 1.0, 2048, 1, "{problem}", BOXED, ("last_number",),
        ),
        Protocol(
            "boxed",
            "the instruction behind the question and no system turn (2604.13016, 5.2: \"{Question} Please "
            'reason step by step, and put your final answer within \\boxed{}."); temperature 0.6 '
            "(second-hand) and avg@32 of 2604.08527; 8192 tokens (unknown; LUFFY)",
            0.6, 1.0, 8192, 0, "{problem}\n" + BOXED, "none",
        ),
        Protocol(
            "opd",
            '2604.13016, 3.1: "we sample 16 solutions per problem with temperature 0.7 and top-p 0.95, '
            'using a maximum validation response length of 31,744 tokens. We report average accuracy over '
            '16 samples (avg@16)"; template of 5.2 and A.1',
            0.7, 0.95, 31_744, 16, "{problem} " + BOXED, "none",
        ),
        Protocol(
            "dapo",
            "2604.13016, 5.2, \"Original DAPO Template\"; otherwise like opd; answers stand in a last line",
            0.7, 0.95, 31_744, 16,
            "Solve the following math problem step by step. The last line of your response should be of "
            "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
            '{problem}\n\nRemember to put your answer on its own line after "Answer:".',
            "none", ("answer_line",),
        ),
        Protocol(
            "plain", "the problem as it stands, for the embedded models", 1.0, 1.0, 160, 1,
            "{problem}", "",
        ),
    )
}  # fmt: skip


def name_of(**fields: object) -> str:
    """Return the name of the preset that has exactly these values, "own" if none has."""
    for name, entry in PROTOCOLS.items():
        if all(getattr(entry, field) == value for field, value in fields.items()):
            return name
    return "own"
