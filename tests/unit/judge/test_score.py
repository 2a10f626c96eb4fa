"""Scores: which number counts, which code counts, and references that cannot be used."""

from __future__ import annotations

from fractions import Fraction

import pytest

from spdbench.errors import InputError
from spdbench.judge.answer_code import code_in, program
from spdbench.judge.answer_number import any_number, final_number
from spdbench.judge.score import Scorer, check_references
from spdbench.types import Prompt

SUM = Prompt("s", "maths", ("What is 3 + 4?", "And twice that?"), ("7", "14"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 apples and 4 pears, so 7.", "7"),
        ("That makes $1,250.50 in all.", "1250.50"),
        ("The answer is **42**.", "42"),
        ("It fell to -3 degrees", "-3"),
        ("12-5", "5"),
        ("= 109\n#### 109 years, not 5", "109"),
        ("18 / 2 = 9 m2", "9"),
        ("Room B12", None),
        ("It is .5 of it", "0.5"),
        ("In all $1{,}250$ of them", "1250"),
        ("In all $1\\,250$ of them, or 1\u2009250", "1250"),
        ("It is $\\frac{-3}{8}$", "-3/8"),
        ("It is $2\\frac12$", "5/2"),
        ("It is $\\tfrac34$", "3/4"),
        ("It is 3\u20444", "3/4"),
        ("It is 1 3\u20444", "7/4"),
        ("5² = 25, so 2³", "8"),
        ("2⁻¹", "1/2"),
        ("6.02 × 10⁵", "602000"),
        ("3·10⁻²", "3/100"),
        ("In all 1\u202f250 of them", "1250"),
        ("Version 1.2.3", "1.2"),
        ("None at all", None),
        ("#### none, but 3", "3"),
        ("x = \\boxed{1,000}", "1000"),
        ("1,2 and 3", "3"),
        ("Each gets 3/4", "3/4"),
        ("Each gets 3 / 4 of it", "3/4"),
        ("About 2 3/4 cups", "11/4"),
        ("About 2¾ cups, or ⅓", "1/3"),
        ("About 2¾ cups", "11/4"),
        (r"so $-\frac{3}{4}$", "-3/4"),
        (r"so $2 \dfrac{3}{4}$", "11/4"),
        ("1,000/3", "1000/3"),
        ("on 12/25/2024", "2024"),
        ("nothing: 7, then 1/0", "7"),
        ("2.5e3 in all", "2500"),
        ("4E-2", "0.04"),
        ("3 × 10^4 of them", "30000"),
        (r"$3 \times 10^{-2}$", "0.03"),
        ("2^10 of them", "1024"),
        ("12 m^2", "12"),
        ("12 cm^{2}", "12"),
        ("8e9999", "8"),
        ("9 or 8^999", "9"),
        ("#### 9\n\nQuestion: 1 + 1?\n#### 2", "9"),
        ("It is 9.\n\nQuestion: What is 1 + 1?\nAnswer: 2", "9"),
        ("Question: What is 1 + 1?\nAnswer: 2", "2"),
        ("#### 1. Add them\n5 + 4 = 9\n#### Result\nIt is 9.", "9"),
        ("#### **9**", "9"),
        ("12,50 \u20ac", "12.5"),
        ("1.234,50 \u20ac", "1234.5"),
        ("Answer: 1 000 000", "1000000"),
        ("It is 12 345 678.5 in all", "12345678.5"),
        ("rows 1 200 and 300", "300"),
        ("0,125 of it", "0.125"),
        ("1'250 of them", "1250"),
        ("USD18, Rs.500, US$ 20", "20"),
        ("it costs Rs.500", "500"),
        ("it costs USD18", "18"),
        ("$2.5 million", "2500000"),
        ("2 and 1/2 cups", "5/2"),
        ("2-1/2 cups", "5/2"),
        (r"\cfrac{1}{2}", "1/2"),
        (r"\frac{1}2", "1/2"),
        (r"{1 \over 2}", "1/2"),
        ("\u00b3\u2044\u2084", "3/4"),
        ("(-1)/2", "-1/2"),
        ("It fell by \u20135", "-5"),
        ("So:\n- 18 apples", "18"),
        ("Total - 18", "18"),
        ("x = - 18", "-18"),
        ("_18_", "18"),
        ("x_1", None),
        ("...18", "18"),
        ("#### 20 - 2 = 18", "18"),
        ("\\boxed{18}\n\nCheck: 2 * 9 = 18, 20 > 5.", "18"),
        ("**Final Answer:** 18 hours\n\nNote: a day has 24 hours.", "18"),
        ("### Final Answer\n\n18\n\nThis took 3 steps.", "18"),
        ("The answer is 18 (not 9). Each of the 3 gets 6.", "18"),
        ("The answer is 18. Each of the 3 gets 6.", "18"),
        ("It is 18.\n\n### Instruction:\n1 + 1?\n### Response:\n2", "18"),
        ("It is 18.\n\n**Question 2:** 1 + 1?", "18"),
    ],
)
def test_flexible_takes_the_last_number_or_the_marked_one(text: str, number: str | None) -> None:
    assert any_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3/4/2020", "2020"),
        ("It is 12 as of 3/4/2020.", "12"),
        ("It is 7 as of 2020-04-03.", "7"),
        ("#### 12 on 3/4/2020", "12"),
        ("7 (since 3+4)", "7"),
        ("The answer is 7 (since 3 + 4 = 7 in all).", "7"),
        ("7, because 3 and 4", "7"),
        ("The answer is 7, since there are 3 and 4.", "7"),
        ("I paid $7 (not $9).", "7"),
        ("7 apples (3 red, 4 green)", "7"),
        ("He ran 7 km (4.35 miles).", "7"),
        ("18 (= 2 × 9)", "18"),
        ("The answer is 2 × 9 (= 18).", "18"),
        ("#### 7 (= 3 + 4)", "7"),
        ("#### 3+4 (= 7)", "7"),
        ("The answer is eighteen (18).", "18"),
        ("2 + 5 is \\(7\\)", "7"),
        ("\\boxed{7\\text{ apples in 2 days}}", "7"),
        ("\\boxed{\\text{7}}", "7"),
        ("0x1F", "31"),
        ("0b101", "5"),
        ("0o17", "15"),
        ("3x10^2", "300"),
        ("1_000_000", "1000000"),
        ("12,34,567", "1234567"),
        ("1,00,000", "100000"),
        ("1.234.567", "1234567"),
        ("50%", "50"),
        ("50\\%", "50"),
        ("$5k", "5000"),
        ("€2.5M", "2500000"),
        ("£3bn", "3000000000"),
        ("5kg", "5"),
        ("10m²", "10"),
        ("7 m", "7"),
        ("Rs 500/-", "500"),
        ("negative 5", "-5"),
        ("The answer is minus 5", "-5"),
        ("What is 12 minus 5", "5"),
        ("$-5", "-5"),
        ("1/-2", "-1/2"),
        ("\\frac{3}{-4}", "-3/4"),
        ("\\frac{-3}{-4}", "3/4"),
        ("-3 1/2", "-7/2"),
        ("2^(10)", "1024"),
        ("(-2)^3", "-8"),
        ("(-2)**2", "4"),
        ("(-2)^999", None),
        ("1.5E+3", "1500"),
        ("6.02\\times10^{2}", "602"),
    ],
)
def test_all_of_a_number_counts_and_what_explains_it_does_not(text: str, number: str | None) -> None:
    assert any_number(text) == (None if number is None else Fraction(number))


def test_number_of_thousands_of_digits_is_a_number() -> None:
    for count in (5000, 50_000):  # the time to find it must not grow with the square
        assert any_number("9" * count) == 10**count - 1
    assert any_number(f"5 or {'9' * 50_000}^399") == 5
    assert any_number(f"5 or (-{'9' * 50_000})^399") == 5


@pytest.mark.parametrize(("text", "number"), [("so 7", None), ("8\n#### 7\nor 9", "7"), ("#### 1\n#### 2", "1")])
def test_strict_takes_only_the_marked_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("<think>\nIs it 8?\n</think>\nIt is 7.", 1.0),
        ("<think>#### 8</think>It is 7.", 1.0),
        ("Is it 8?</think> It is 7.", 1.0),
        ("<think>It is 7.</think>I do not know.", 0.0),
        ("<think>It is 7. Or", 0.0),
        ("It is 7. <think>Or is it 8", 1.0),
        ("[THINK]8[/THINK]7", 1.0),
        ("<reasoning>8</reasoning><think>9</think>7", 1.0),
        ("<|begin_of_thought|>8<|end_of_thought|>It is 7.", 1.0),
        ("<|channel>thought\nIs it 8?<channel|>7", 1.0),
        ("<unused94>thought\nIs it 8?<unused95>7", 1.0),
        ("Here is my thought process:\n7?\nHere is my response:\nI do not know.", 0.0),
        ("<scratchpad>It is 7. Or", 0.0),
        ('<thinking effort="high">It is 7. Or', 0.0),
        ("It is 7.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?", 1.0),
        ("It is 7.</s><s>[INST] What is 1 + 1? [/INST] 2", 1.0),
    ],
)
def test_thoughts_are_no_answer(answer: str, score: float) -> None:
    assert Scorer("gsm8k")(SUM, 0, answer) == score
    task = Prompt("c", "code", ("Write f.",), ("assert f() == 1",))
    drafts: list[str] = []

    def run(text: str) -> bool:
        drafts.append(text)
        return False

    Scorer("humaneval", run)(task, 0, f"<think>def f(): pass</think>{answer}")
    assert "pass" not in drafts[0]


def test_numbers_are_compared_by_value_turn_by_turn() -> None:
    score = Scorer("gsm8k")
    assert [score(SUM, turn, "It is 14.00") for turn in (0, 1)] == [0.0, 1.0]
    assert score(SUM, 0, "no idea") == 0.0
    assert Scorer("gsm8k_strict")(SUM, 0, "It is 7") == 0.0


def test_only_what_has_a_judge_and_a_reference_is_scored() -> None:
    assert Scorer({"code": "humaneval"})(SUM, 0, "7") is None
    assert Scorer(None)(SUM, 0, "7") is None
    assert Scorer("gsm8k")(Prompt("s", "maths", ("a", "b"), ("", "2")), 0, "7") is None
    assert Scorer("gsm8k")(Prompt("s", "maths", ("a", "b"), ("1",)), 1, "7") is None
    assert Scorer("gsm8k")(Prompt("s", "maths", ("a",)), 0, "7") is None


def test_code_is_never_run_without_someone_who_may() -> None:
    task = Prompt("c", "code", ("Write f.",), ("assert f() == 1",))
    assert Scorer("humaneval")(task, 0, "def f(): return 1") is None
    seen: list[str] = []

    def run(text: str) -> bool:
        seen.append(text)
        return True

    assert Scorer("humaneval", run)(task, 0, "def f(): return 1") == 1.0
    assert seen == ["def f(): return 1\nassert f() == 1"]
    assert Scorer("humaneval", lambda _: None)(task, 0, "def f(): return 1") is None


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure:\n```python\ndef f():\n    return 1\n```\nDone.", "def f():\n    return 1"),
        ("```\npip install x\n```\n```py\ndef f(): pass\n```", "def f(): pass"),
        ("```python\ndef f():\n    return 1", "def f():\n    return 1"),
        ("Here it is.\ndef f():\n    return 1\n", "def f():\n    return 1\n"),
        ("    return 1\n\ndef g(): pass", "    return 1\n\ndef g(): pass"),
        ("I cannot.", "I cannot."),
        ("<|python_tag|>def f():\n    return 1\n", "def f():\n    return 1\n"),
        ("1. Code:\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1"),
        ("So: ```python\n    return 1\n```", "    return 1"),
        ("```python\n    return 1\n```", "    return 1"),
        ("~~~python\ndef f(): pass\n~~~\nDone", "def f(): pass"),
        ("````python\ndef f(): pass\n````\nDone", "def f(): pass"),
        ("```python def f():\n    return 1\n```", "def f():\n    return 1"),
        (
            '```\ndef f():\n    """So:\n    ```\n    f()\n    ```\n    """\n```\nDone',
            'def f():\n    """So:\n    ```\n    f()\n    ```\n    """',
        ),
    ],
)
def test_code_is_found_among_words(answer: str, code: str) -> None:
    assert code_in(answer) == code


def fenced(*blocks: str) -> str:
    return "\nand\n".join(f"```python\n{block}\n```" for block in blocks)


@pytest.mark.parametrize(
    "blocks",
    [
        ("import math", "def f(x): return math.floor(x) + 1"),
        ("from math import *", "def f(x): return floor(x) + 1"),
        ("STEP = 1", "def add(x): return x + STEP", "def f(x): return add(x)"),
        ("print(f(1))", "def f(x): return x + 1"),
        ("def f(x):\n    ...", "def f(x): return x + 1"),
        ("def f(x): return x + 1", "import unittest\nclass TestF(unittest.TestCase): pass\nunittest.main()"),
        ("def f(x): return x + 1", "result = f('1')"),
        ("pip install x", "def f(x): return x + 1"),
    ],
)
def test_blocks_that_belong_together_are_one_program(blocks: tuple[str, ...]) -> None:
    exec(program(fenced(*blocks), "assert f(1) == 2"), {})


ADD = "def f(x): return x + 1"
PROMPT = 'def f(x):\n    """Add one."""\n# <answer>\nassert f(1) == 2'


@pytest.mark.parametrize(
    "answer",
    [
        fenced(f"{ADD}\n\nif __name__ == '__main__':\n    raise SystemExit"),
        fenced(f"import sys\n{ADD}\nsys.exit(0)"),
        fenced(f"import no_such_library\n{ADD}\n@no_such_library.mark\ndef test(): assert f(1) == 2"),
        fenced(f"{ADD}\n\nassert f(1) == 3"),
        fenced(f"{ADD}\nx = int(input())\nprint(f(x))"),
        fenced(ADD, "def check(g):\n    assert g(1) == 9\ncheck(f)"),
        fenced("import sys\nsys.setrecursionlimit(9000)\nTABLE = {}\nTABLE[1] = 2\ndef f(x): return TABLE[x]"),
        fenced(">>> def f(x):\n...     return x + 1\n>>> f(1)\n2"),
        f"from this it follows that\n{ADD}\nand no more.",
        f"{ADD}\n```\nAs an example:\n```python\nprint(f('a'))\n```",
    ],
)
def test_only_statements_that_the_tests_need_are_run(answer: str) -> None:
    exec(program(answer, "def check(g):\n    assert g(1) == 2\ncheck(f)"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "answer",
    [
        "    return x + 1\n\nprint(f('a'))\n",
        "    return x + 1\n\nThis adds one.\n\n```python\nprint(f('a'))\n```",
        "    return x + 1\n```\n\nThis adds one.",
        "return x + 1\n",
        "y = x\n    return y + 1\n",
        fenced("return x + 1"),
    ],
)
def test_insides_of_a_function_go_on_where_the_prompt_stops(answer: str) -> None:
    exec(program(answer, PROMPT), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "code", ["def f(x): return x", "def g(x): return x + 1", "def f(x): return x\ndef check(g): pass"]
)
def test_wrong_code_stays_wrong(code: str) -> None:
    with pytest.raises((AssertionError, NameError)):
        exec(program(fenced(code), "def check(g):\n    assert g(1) == 2\ncheck(f)"), {})


def test_imports_from_the_future_come_first() -> None:
    code = fenced("from __future__ import annotations\ndef f(x: int) -> int:\n    return x + 1")
    exec(program(code, 'def f(x: int) -> int:\n    """More."""\n# <answer>\nassert f(1) == 2\n'), {})


def test_words_behind_the_code_are_left_out() -> None:
    text = program("def f():\n    return 1\n\nThis returns one.", "assert f() == 1")
    assert text == "def f():\n    return 1\n\nassert f() == 1"


def test_body_of_a_function_goes_on_where_the_prompt_stops() -> None:
    reference = 'def f(x):\n    """Twice x."""\n# <answer>\nassert f(2) == 4\n'
    assert program("    return 2 * x\n", reference).startswith('def f(x):\n    """Twice x."""\n    return 2 * x\n')
    whole = program("```python\ndef f(x):\n    return x + x\n```", reference)
    scope: dict[str, object] = {}
    exec(whole, scope)


def test_answer_that_is_no_python_stays_a_mistake() -> None:
    with pytest.raises(SyntaxError):
        compile(program("Sorry, I cannot.", "assert True"), "x", "exec")


def refused(judges: object, prompts: list[Prompt], *, runs_code: bool = True, missing: str = "") -> str:
    with pytest.raises(InputError) as caught:
        check_references("mine", judges, prompts, runs_code=runs_code, missing=missing)  # type: ignore[arg-type]
    return str(caught.value)


def test_references_that_are_missing_or_useless_are_refused_with_what_to_do() -> None:
    bare = [Prompt("a", "maths", ("1 + 1?",))]
    assert refused("gsm8k", bare) == (
        "suite mine: score: gsm8k needs a reference for each prompt, and there is none. Name what holds them with the "
        "source's key `reference`, or leave `score` out."
    )
    assert refused("humaneval", bare, missing="They are elsewhere.").endswith("there is none. They are elsewhere.")
    assert "no number" not in refused({"sums": "gsm8k"}, bare)
    assert refused({"sums": "gsm8k"}, bare).endswith("score.sums: no prompt has this category. Known: maths.")
    words = [Prompt("a", "maths", ("1 + 1?",), ("two",))]
    assert refused("gsm8k", words).endswith("reference: gsm8k needs a number in it, and there is none in 'two'")
    two = [Prompt("a", "maths", ("1 + 1?",), ("3:4",))]
    assert "gsm8k compares one number, and there are several in '3:4'" in refused("gsm8k", two)
    check_references("mine", "gsm8k", [Prompt("a", "maths", ("?",), ("1 + 1 = 2",))], runs_code=True, missing="")
    solution = [Prompt("a", "code", ("f?",), ("    return 1\n",))]
    assert "humaneval needs Python that tests the answer" in refused("humaneval", solution)


def test_references_of_code_are_not_asked_for_when_no_code_is_run() -> None:
    check_references("mine", "humaneval", [Prompt("a", "code", ("f?",))], runs_code=False, missing="")
