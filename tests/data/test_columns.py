"""Which column is what: the shapes that people publish, named columns, and what an error says."""

import decimal
import json

import pytest

from opd_jax.data import cells
from opd_jax.data.columns import (
    UNFINISHED,
    WRONG,
    Columns,
    Counts,
    count,
    describe,
    reach,
    read_problem,
)
from opd_jax.data.files import RowError
from opd_jax.data.problem import Problem

CHAT = [{"role": "system", "content": "think"}, {"content": "1+1?", "role": "user"}]


def read(row: dict, **changes: object) -> Problem:
    return taken(row, **changes)[0]


def taken(row: dict, *, columns: Columns = Columns(), **needs: bool) -> tuple[Problem, Columns]:  # noqa: B008
    return read_problem(row, path="d/rows.jsonl", number=3, columns=columns, **needs)


def refused(row: dict, **changes: object) -> RowError:
    with pytest.raises(RowError) as error:
        read(row, **changes)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("d/rows.jsonl, line 3: ")
    return error.value


def test_plain():
    row = {"problem": "1+1?", "solution": "It is 2.", "answer": "2", "id": "x", "other": None}
    assert taken(row) == (
        Problem(id="x", prompt="1+1?", solution="It is 2.", answer="2"),
        Columns("problem", "solution", "answer", "id"),
    )


def test_without_id_the_file_and_line_are_it():
    assert read({"question": "1+1?"}) == Problem("rows-3", "1+1?", "", "")
    assert read({"question": "1+1?", "id": 7}).id == "7"
    assert read({"question": "1+1?", "extra_info": {"index": 0}}).id == "0"


def test_gsm8k_by_hand():
    answer = "She has 48/2 = <<48/2=24>>24.\nIt is 1,000*<<3*4=12>>2.\n#### 2,024"
    problem, columns = taken({"question": "How many?", "answer": answer})
    assert problem.solution == "She has 48/2 = 24.\nIt is 1,000*2.\n\\boxed{2024}"
    assert problem.answer == "2024"
    assert (columns.solution, columns.answer) == ("answer", "answer")
    assert read({"question": "?", "answer": "x\n#### -3.5"}).answer == "-3.5"
    assert read({"question": "?", "answer": "x\n#### $10"}).answer == "10"


def test_gsm8k_in_named_columns():
    row = {"q": "?", "a": "x <<1+1=2>>\n#### 2"}
    named = Columns(problem="q", solution="a", answer="a")
    assert read(row, columns=named) == Problem("rows-3", "?", "x\n\\boxed{2}", "2")


def test_a_heading_is_not_a_gsm8k_answer():
    row = {"problem": "?", "solution": "#### Part 1\nIt is \\boxed{2}.\n#### The end"}
    assert read(row).solution == row["solution"]
    assert read(row).answer == "2"


def test_verl_chat():
    row = {"prompt": CHAT, "reward_model": {"ground_truth": "2", "style": "rule"}}
    assert taken(row) == (
        Problem("rows-3", "1+1?", "", "2", system="think"),
        Columns("prompt", "", "reward_model.ground_truth", ""),
    )
    row["target"] = [{"role": "assistant", "content": "<think>\nhm</think> 2"}]  # LUFFY
    assert read(row, need_solution=True).solution == "<think>\nhm</think> 2"


def test_the_last_user_turn_is_the_problem():
    turns = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "last"},
    ]
    assert read({"prompt": turns}).prompt == "last"
    assert read({"messages": turns}).solution == ""  # nobody answered it


def test_messages_hold_the_solution_too():
    turns = [*CHAT, {"role": "assistant", "content": "so \\boxed{2}"}]
    assert read({"messages": turns}) == Problem("rows-3", "1+1?", "so \\boxed{2}", "2", "think")
    shared = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2!"}]
    assert read({"conversations": shared}).solution == "2!"


def openr1(finished: list | None, correct: list | None) -> dict:
    row = {
        "problem": "?", "solution": "a human's", "answer": "2", "uuid": "u",
        "generations": ["one", "two", "three"], "messages": [*CHAT, {"role": "assistant", "content": "m"}],
    }  # fmt: skip
    if finished is not None:
        row |= {"is_reasoning_complete": finished}
    if correct is not None:
        row |= {"correctness_math_verify": correct}
    return row


@pytest.mark.parametrize(
    ("finished", "correct", "solution"),
    [
        ([True, True, True], [True, True, True], "one"),
        ([False, True, True], [True, False, True], "three"),
        ([True, True, True], [None, True, False], "two"),
        ([True, True, True], None, "one"),
        (None, [False, True, True], "two"),
        (None, None, "one"),
        ([False, True, False], [True, False, True], ""),  # not the human's, and not `messages`
        ([True], [True, True, True], ""),
    ],
)
def test_openr1_takes_the_first_finished_and_correct_generation(finished, correct, solution):
    problem = read(openr1(finished, correct))
    assert problem.solution == solution
    assert (problem.id, problem.answer) == ("u", "2")


def test_openr1_says_what_the_generations_lack():
    assert refused(openr1([False] * 3, [True] * 3), need_solution=True).reason == UNFINISHED
    assert refused(openr1([True] * 3, [False] * 3), need_solution=True).reason == WRONG
    assert refused(openr1([True], [True] * 3), need_solution=True).reason == "no solution"
    error = refused(openr1([True, False, True], [False, True, None]), need_solution=True)
    assert "column 'generations' has no finished generation with correctness_math_ver" in str(error)


def test_olympiad_lists():
    row = {"question": "?", "solution": ["first way", "second"], "final_answer": ["$2$", 3.0]}
    assert read(row) == Problem("rows-3", "?", "first way", "$2$, 3")


def test_the_last_box_is_the_answer_where_no_column_is():
    solution = "\\boxed{1} then \\boxed{\\frac{1}{2}}"
    problem, columns = taken({"problem": "?", "solution": solution})
    assert problem.answer == "\\frac{1}{2}"
    assert columns.answer == "solution"
    assert read({"problem": "?", "solution": solution + " \\boxed{3"}).answer == ""  # cut off
    assert read({"problem": "?", "solution": "\\boxed{ }"}).answer == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (142, "142"), (142.0, "142"), (-0.5, "-0.5"), (0, "0"), (1e20, "1" + "0" * 20), (" 7 ", "7"),
        (decimal.Decimal("2.50"), "2.50"), (decimal.Decimal("4.0"), "4"),
    ],
)  # fmt: skip
def test_numbers_become_text(value, text):
    assert read({"problem": "?", "answer": value}).answer == text


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), {}, [], None, "", "  ", b"x"])
def test_what_is_not_an_answer(value):
    row = {"problem": "?", "answer": value}
    assert read(row).answer == ""
    assert refused(row, need_answer=True).reason == "no answer"


def test_dotted_paths():
    row = {"a": {"b": [{"c": 1}, {"c": 2}]}, "x.y": 3, "x": {"y": 4}}
    assert reach(row, "a.b.1.c") == 2
    assert reach(row, "a.b.-1.c") == 2
    assert reach(row, "x.y") == 3
    row |= {"question": "?", "answer": 0}
    assert read(row, columns=Columns(answer="a.b.0.c", id="x.y")).answer == "1"
    for column in ("a.c", "a.b.2", "a.b.c", "a.b.0.c.d", "none", ""):
        assert reach(row, column) is not None
    error = refused(row, columns=Columns(answer="a.b.2.c"))  # named, so it must be there
    assert "no answer (column 'a.b.2.c' is not there)" in str(error)


def test_a_named_column_wins_over_the_names_people_use():
    row = {"problem": "no", "q": "yes", "solution": "no", "s": "yes"}
    problem = read(row, columns=Columns(problem="q", solution="s"))
    assert (problem.prompt, problem.solution) == ("yes", "yes")


def test_empty_columns_are_passed_over():
    row = {"problem": "", "question": None, "query": "?", "solution": " ", "output": "2"}
    assert taken(row) == (Problem("rows-3", "?", "2", ""), Columns("query", "output", "", ""))


@pytest.mark.parametrize(
    ("row", "needs", "says"),
    [
        ({"text": "?", "reply": 1}, {}, "no problem (none of problem, question, prompt, query, "
         "instruction, messages, conversations is there); it has reply, text; "
         "set --config.data.columns.problem=COLUMN"),
        ({}, {}, "it has no columns"),
        ({"problem": 5}, {}, "no problem (column 'problem' is int); it has problem"),
        ({"problem": "\ud800"}, {}, "column 'problem' is not valid Unicode"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, {}, "'prompt' has no user turn"),
        ({"prompt": ["a"]}, {}, "is a list, but not of chat turns"),
        ({"prompt": [{"role": "user"}]}, {}, "has a chat turn without role and content"),
        ({"problem": "?"}, {"need_answer": True}, "no answer (none of answer, final_answer, "
         "reward_model.ground_truth, ground_truth, expected_answer, gold_answer is there); "
         "it has problem; set --config.data.columns.answer=COLUMN"),
        ({"problem": "?", "answer": {"x": 1}}, {"need_answer": True}, "'answer' is an object"),
        ({"problem": "?", "solution": 4}, {"need_solution": True}, "no solution (column 'solution' is int"),
        ({"problem": "?", "answer": "2"}, {"need_solution": True}, "data.columns.solution=COLUMN"),
    ],
)  # fmt: skip
def test_errors_name_the_line_the_field_and_the_fix(row, needs, says):
    assert says in str(refused(row, **needs))


def test_many_columns_are_not_all_listed():
    error = refused({f"c{i:03}": 0 for i in range(50)})
    assert "c019, ...; set" in str(error)


# a question in several columns, and the turns before it


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


EARLIER = (("user", "1+1?"), ("assistant", "2"))
LAST = ("user", "And 3?")


def test_columns_that_are_named_are_taken_alone():
    row = {"question": "How old?", "context": "Tom is 7.", "image": "x.png", "A": "7", "B": "8"}
    row |= {"solution": "It is 7.", "reasoning": "Tom says so."}
    problem, columns = taken(row, columns=Columns(problem="question", solution="solution"))
    assert (problem.prompt, problem.solution) == ("How old?", "It is 7.")
    counts: Counts = {}
    count(counts, row, problem, columns)
    assert sorted(counts["not read"]) == ["A", "B", "context", "image", "reasoning"]
    del row["image"]
    problem, columns = taken(row)
    assert problem.prompt == "Tom is 7.\n\nHow old?\n\nA. 7\nB. 8"
    assert problem.solution == "<think>\nTom says so.\n</think>\n\nIt is 7."
    assert columns.problem == "context + question + A + B"
    assert columns.solution == "reasoning + solution"


def not_read(row: dict, **options) -> list[str]:
    problem, columns = taken(row, **options)
    counts: Counts = {}
    count(counts, row, problem, columns)
    names = sorted(counts["not read"])
    assert describe(counts).partition("not read: ")[2] == ", ".join(names)
    return names


@pytest.mark.parametrize("key", ["thought", "reasoning_details", "tool_calls", "name", "weight"])
@pytest.mark.parametrize("held", ["Add.", 0.5, [{"text": "Add."}], {"id": "x"}])
def test_what_a_turn_holds_beside_its_text_is_said(key, held):
    """In whichever column the chat stands, and in whichever of its turns; also where it is a text."""
    turns = chat(("user", "1+1?"), ("assistant", "2"))
    for turn in turns:
        other = [one | {key: held} if one is turn else one for one in turns]
        assert not_read({"messages": other}) == [f"messages[].{key}"]
        assert not_read({"messages": json.dumps(other)}) == [f"messages[].{key}"]
        assert not_read({"problem": "And 2?", "history": other}) == [f"history[].{key}"]
        row = {"extra": {"chat": other}, "solution": "2"}
        assert not_read(row, columns=Columns(problem="extra.chat", solution="extra.chat")) == [
            f"extra.chat[].{key}", "solution"
        ]  # fmt: skip
    for nothing in (None, "", [], {}, [None], float("nan")):
        assert not_read({"messages": [turns[0], turns[1] | {key: nothing}]}) == []


def test_what_a_turn_says_twice_or_in_other_keys():
    asked, said = chat(("user", "1+1?"), ("assistant", "2"))

    def of(**more):
        return not_read({"messages": [asked, said | more]})

    assert (
        of(reasoning="Add.") == of(reasoning="Add.", reasoning_content="<think>Add.</think>") == []
    )
    assert of(reasoning="Add.", thinking="Count.") == ["messages[].reasoning"]
    assert of(thinking="on") == ["messages[].thinking"]  # a switch: no thoughts, as in a row
    assert of(thinking="on", content="Go on.") == ["messages[].thinking"]
    assert of(content="<think>Add.</think>2", reasoning="Add.") == []
    assert of(content="<think>Add.</think>2", reasoning="Count.") == ["messages[].reasoning"]
    assert of(value="3") == ["messages[].value"]
    assert not_read({"messages": [asked | {"thinking": "Hm."}, said]}) == ["messages[].thinking"]
    shared = {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}
    assert not_read(shared) == []


@pytest.mark.parametrize("key", ["images", "image", "video", "audios"])
def test_a_turn_with_what_a_text_model_cannot_see_is_refused(key):
    """As a row with such a column is; a named column is taken alone, and the rest is said."""
    asked, said = chat(("user", "What is it?"), ("assistant", "A cat."))
    seen = [asked | {key: ["x.png"]}, said]
    for row in ({"messages": seen}, {"problem": "And now?", "history": seen}):
        error = refused(row)
        assert f"comes with {key!r}, which a text model cannot see" in str(error)
        assert error.reason == "no problem"
    named = Columns(problem="messages", solution="messages")
    assert not_read({"messages": seen}, columns=named) == [f"messages[].{key}"]
    assert not_read({"messages": [asked | {key: []}, said]}) == []


def test_earlier_turns_are_kept_whichever_column_they_stand_in():
    wanted = Problem("rows-3", "And 3?", "", "", "think", EARLIER)
    system = ("system", "think")
    assert read({"prompt": chat(system, *EARLIER, LAST)}) == wanted
    assert read({"problem": "And 3?", "history": chat(*EARLIER), "system": "think"}) == wanted
    assert read({"problem": "And 3?", "history": [["1+1?", "2"]], "system": "think"}) == wanted
    named = Columns(problem="p")  # what is named is the question; turns are kept
    assert read({"p": "And 3?", "history": chat(system, *EARLIER)}, columns=named) == wanted
    assert read({"problem": "And 3?", "history": "of Rome"}).history == ()  # a topic


def test_a_problem_is_read_back_from_its_row():
    problem = Problem("x", "And 3?", "5", "5", "think", EARLIER)
    assert read(problem.row()) == problem


def test_a_chat_may_end_in_its_solution_alone():
    turns = chat(*EARLIER, LAST, ("assistant", "5"))
    assert "ends in an assistant turn" in str(refused({"prompt": turns}))
    both = Columns(problem="prompt", solution="prompt")
    assert read({"prompt": turns}, columns=both).solution == "5"
    assert read({"prompt": turns}, columns=Columns(problem="prompt")).history == EARLIER


@pytest.mark.parametrize(
    "said",
    ['[{"from": "A", "to": "B"}] How far?', '{"role": "x"}', "[{'role': 'user'}]", '{"role": {'],
)
def test_a_text_that_is_no_chat_is_taken_as_it_stands(said):
    assert read({"problem": said}).prompt == said
    assert read({"q": said}, columns=Columns(problem="q")).prompt == said


def test_a_number_beside_choices_has_to_be_named():
    row = {"question": "1+1?", "choices": ["1", "2"], "answer": 1}
    error = refused(row, need_answer=True)
    assert "is a number beside choices" in str(error)
    assert read(row, columns=Columns(answer="answer")).answer == "1"
    assert read(row | {"choices": []}).answer == "1"


@pytest.mark.parametrize("none", ["None", "none", "N/A", "unknown", "-", "Not given"])
def test_a_choice_that_reads_like_a_placeholder_is_a_choice(none):
    """`None` of the others: elsewhere the word says that there is nothing."""
    shown = f"Who?\n\nA. Tom\nB. {none}"
    listed = {"question": "Who?", "choices": ["Tom", none], "answer": none}
    in_columns = {"question": "Who?", "A": "Tom", "B": none}
    arc = {"text": ["Tom", none], "label": ["A", "B"]}
    rows = [listed, in_columns, {"question": "Who?", "choices": arc},
            {"question": "Who?", "options": {"A": "Tom", "B": none}},
            {"question": "Who?", "options": ["A. Tom", f"B. {none}"]}]  # fmt: skip
    assert [read(row).prompt for row in rows] == [shown] * 5
    assert read(listed, need_answer=True).answer == none
    assert read(listed, columns=Columns(answer="answer")).answer == none
    refused(listed | {"answer": "nan"}, need_answer=True)  # not one of the choices
    for empty in (None, "  "):
        assert "no list of texts" in str(refused(listed | {"choices": ["Tom", empty]}))


def test_a_placeholder_in_a_named_column_is_no_answer():
    row = {"problem": "?", "a": "notfound"}
    error = refused(row, columns=Columns(answer="a"), need_answer=True)
    assert "column 'a' is the placeholder 'notfound'" in str(error)
    assert error.reason == "no answer"


def test_a_cell_nested_deeper_than_python_recurses_holds_what_is_inside():
    def nested(inner):
        for _ in range(5000):
            inner = [inner]
        return inner

    assert cells.holds(nested("x"))
    assert not cells.holds(nested(" "))
