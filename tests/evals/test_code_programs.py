import ast
import time

import pytest

from evals.programs import extract_code, preamble

STUB = 'import math\n\ndef area(r):\n    """Area of a circle.\n    >>> area(0)\n    0.0\n    """\n'
GOOD = "def area(r):\n    return 3 * r * r"
DRAFT = "def area(r):\n    x = r\n    y = r\n    return x * y  # longer than the last one"


def fence(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"


@pytest.mark.parametrize(
    ("response", "code", "method"),
    [
        (fence(GOOD), GOOD, "fenced"),
        (fence(GOOD, ""), GOOD, "fenced"),
        (f"First:\n{fence(DRAFT)}\nBetter:\n{fence(GOOD)}\nDone.", GOOD, "fenced"),
        (f"{fence(GOOD)}\nRun it:\n{fence('print(area(2))')}", GOOD, "fenced"),
        (f"{fence(GOOD)}\nOutput:\n{fence('area is 12', 'text')}", GOOD, "fenced"),
        (f"{fence(GOOD)}\nBroken:\n{fence('def area(r:')}", GOOD, "fenced"),
        (f"{fence(GOOD)}\nTest:\n{fence('from circles import area; area(2)')}", GOOD, "fenced"),
        (f"{fence(GOOD)}\nTest:\n{fence('import area; area.area(2)')}", GOOD, "fenced"),
        (f"{fence(GOOD)}\nNote:\n{fence('area.cache = seen[area] = {}')}", GOOD, "fenced"),
        (f"1. Write\n   ```python\n   {GOOD.replace(chr(10), chr(10) + '   ')}\n   ```", GOOD, "fenced"),
        (f"```python\n{GOOD}", GOOD, "fenced"),
        (f"~~~\n{GOOD}\n~~~", GOOD, "fenced"),
        (f"````\n{GOOD}\n````", GOOD, "fenced"),
        (f"<think>\n{fence(DRAFT)}\n</think>\n{fence(GOOD)}", GOOD, "fenced"),
        (fence("area = lambda r: 3"), "area = lambda r: 3", "fenced"),
        (fence("from circles import area"), "from circles import area", "fenced"),
        (fence(f"{GOOD}\nif __name__ == '__main__':\n    print(area(input()))"), None, "fenced"),
        (f"{fence('import math')}\n{fence('def area(r): return math.pi')}", None, "joined"),
        (f"{fence('x = 1')}\n{fence('def k(): return 3')}\n{fence('def area(r): return k()')}", None, "joined"),
        (GOOD, GOOD, "bare"),
        (f"Here you are:\n\n{GOOD}", GOOD, "bare"),
        ("    return 3 * r * r\n", None, "completion"),
        ("    return 3 * r * r\n\ndef other():\n    pass\nprint(area(1))", None, "completion"),
        (fence("    return 3 * r * r"), None, "completion"),
    ],
)
def test_the_last_program_that_defines_the_function_is_taken(response, code, method):
    found = extract_code(response, "area", STUB)
    assert found is not None
    assert found.method == method
    assert code is None or found.code.strip() == code
    scope: dict = {}
    if "circles" not in found.code:
        exec(found.code, scope)
        assert callable(scope["area"])
    assert "def other" not in found.code


@pytest.mark.parametrize(
    "response",
    ["", "I do not know.", fence("def volume(r): return 1"), fence("x = area(2)"), "the area is 3", "<think> so",
     fence("def area(r:"), fence("class A:\n    def area(self): pass"), "    \n\n", "</think>"],
)  # fmt: skip
def test_without_the_function_there_is_no_program(response):
    assert extract_code(response, "area") is None


def test_a_body_is_only_taken_where_the_prompt_left_off_at_one():
    assert extract_code("    return 1", "area") is None


def test_only_blocks_that_the_program_needs_are_joined():
    blocks = ["def helper(): return 1", "def unused(): return 2", "def area(r): return helper()"]
    found = extract_code("\n".join(map(fence, blocks)), "area")
    assert found == ("def helper(): return 1\n\ndef area(r): return helper()", "joined")


def test_the_preamble_is_the_prompts_imports_and_helpers():
    prompt = (
        "import math\nfrom typing import List\n\ndef poly(xs):\n    return sum(xs)\n\n\ndef area(r: List):\n    'doc'\n"
    )
    assert ast.dump(ast.parse(preamble(prompt, "area"))) == ast.dump(
        ast.parse("import math\nfrom typing import List\ndef poly(xs):\n    return sum(xs)")
    )
    assert preamble('"""\nWrite a function.\n"""', "area") == ""
    assert preamble("not a program", "area") == ""


@pytest.mark.parametrize(
    "piece",
    ["```\n", "```python\narea\n", "```python\ndef g(): return area\n```\n", "    x\n", "def area(r):\n", "</think>",
     "`", "(", "[", "-", "not ", "a.", "f(", "1+", "lambda:", "elif 1: pass\n", "x=area\n", "@a\n", ">", "~~~ ",
     "\\", "'"],
)  # fmt: skip
def test_extraction_takes_no_time_on_text_made_to_stall_it(piece):
    for prefix in ("", "```python\ndef area(r): pass\n", "area = "):
        begin = time.process_time()
        extract_code(prefix + piece * (300_000 // len(piece)), "area", STUB)
        assert time.process_time() - begin < 5


def test_many_blocks_and_many_missing_names_take_linear_time():
    names = ", ".join(f"name{n}" for n in range(8000))
    blocks = "".join(fence(f"x{n} = area") + "\n" for n in range(8000))
    begin = time.process_time()
    assert extract_code(blocks + fence(f"def area(r): return [{names}]"), "area").method == "fenced"
    assert time.process_time() - begin < 5
