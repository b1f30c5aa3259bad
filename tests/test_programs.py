"""Programs that a model has written: which pass, which cannot, and what they cannot do.

What a program must not be able to do has a control, in which Python itself does it to the same program.
"""

import functools
import gzip
import itertools
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import elastic_reset
from elastic_reset import (
    EXCEPTIONS,
    FUNCTIONS,
    SIGNATURE,
    STEPS,
    humaneval,
    run_programs,
    table,
    toy_answer,
    toy_code,
    toy_problem,
)

HUMANEVAL = Path(__file__).parents[2] / "shared/data/humaneval/HumanEval.jsonl.gz"
TEST = "assert add(1, 2) == 3\nassert add(2, 2) == 4\n'passed'"
RIGHT = "def add(a, b):\n    return a + b\n" + TEST
WRONG = "def add(a, b):\n    return 3\n" + TEST
LOOP = "n = 0\nfor i in range({}):\n    n += 1\n"
ADD = (["the sum of a and b", "r = a + b"], (), None)


def passes(program, **limits):
    """Whether the program runs to its end."""
    return run_programs([f"{program}\n'passed'"], **limits) == ["passed"]


def workers():
    return [child for child in psutil.Process().children() if child.name().startswith("monty")]


def test_right_programs_pass_and_wrong_ones_fail_in_the_order_given():
    slow = LOOP.format(100_000) + RIGHT
    assert run_programs([slow, WRONG, "1 + 1", WRONG] * 5) == ["passed", None, 2, None] * 5
    assert run_programs([]) == []


@pytest.mark.parametrize(
    "end",
    [
        "return",
        "return add",
        "return {lambda: 1: add}",
        "class A:\n    def __hash__(self):\n        return 1\nreturn {A()}",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "exit()",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
    ],
)
def test_a_program_that_ends_before_its_test_does_not_pass(end):
    assert not passes(f"add = 3\n{end}\n{TEST}")


@pytest.mark.parametrize("text", ["def add(a, b) return", "'''", "x = \\", "(" * 10_000, "x = '\ud800'"])
def test_what_is_no_program_fails(text):
    assert run_programs([text, RIGHT]) == [None, "passed"]


def test_a_program_sees_nothing_of_another():
    assert run_programs(["secret = 1\nsecret", "secret"] * 4) == [1, None] * 4


def test_a_verdict_is_the_same_every_time():
    """HumanEval's tests draw random numbers; and to sleep costs no time, of which there are 3 seconds."""
    draws = ["import random\nrandom.random()", "import random\nrandom.randint(0, 10**9)"]
    assert len(set(run_programs(draws * 10))) == 2
    assert passes("import time\ntime.sleep(10_000)")


def test_the_constants_of_module_string_are_there():
    assert passes("import string\nassert string.ascii_lowercase[:3] == 'abc' and '!' in string.punctuation")


CATCH = "while True:\n  try:\n    {}\n  except BaseException:\n    pass"
HOSTILE = {
    "an endless loop": "while True: pass",
    "a loop that catches the end of its time": CATCH.format("while True: pass"),
    "a list without end": "x = []\nwhile True: x.append('a' * 1000)",
    "a list that is too long": "[0] * 10**12",
    "a text that doubles": "s = 'a'\nwhile True: s += s",
    "a loop that catches the end of its memory": CATCH.format("x = [0] * 10**12"),
    "recursion without end": "def f(): return f()\nf()",
    "recursion that catches its end": "def f():\n  try: f()\n  finally: f()\nf()",
    "a number too large": "10 ** 10**9",
    "a division that takes long": "x, y = 3 ** 10**7, 7 ** (5 * 10**6)\nwhile True: x // y",
    "a regular expression that backtracks": r"import re; re.match(r'(a+)+\1$', 'a' * 40 + 'b')",
    "a value whose text is too long": "x = []\nfor i in range(60): x = [x, x]\nrepr(x)",
    "an output flood": "while True: print('a' * 1000)",
    "imports without end": CATCH.format("import nothing"),
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_programs_fail_within_their_limits_and_harm_no_other(program):
    assert run_programs([program, RIGHT, program, RIGHT], seconds=1.5) == [None, "passed"] * 2
    assert not workers()


def test_time_and_memory_are_what_is_asked_for():
    """Each program is fine within larger limits."""
    assert passes(LOOP.format(300_000), seconds=60)
    assert not passes(LOOP.format(300_000), seconds=0.001)
    assert passes("x = 'a' * 10**8", megabytes=256)
    assert not passes("x = 'a' * 10**8", megabytes=64)
    deep = "def f(n):\n    return n and f(n - 1)\nf({})"
    assert passes(deep.format(900)) and not passes(deep.format(10_000))


def test_what_programs_print_is_neither_shown_nor_kept(capfd):
    """The program prints 60 MB, while this process grows by less than half of that."""
    assert passes("1")  # so that the interpreter's package is imported
    program = "for i in range(60): print('a' * 10**6)"
    before = peak = psutil.Process().memory_info().rss
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(passes, program, seconds=60)
        while not running.done():
            peak = max(peak, psutil.Process().memory_info().rss)
            time.sleep(0.01)
    assert running.result() and peak - before < 25e6
    assert capfd.readouterr() == ("", "")


REACHING = {
    "reading a file": "assert open({file!r}).read() == 'intact'",
    "reading by pathlib": "import pathlib\nassert pathlib.Path({file!r}).read_text() == 'intact'",
    "listing a folder": "import os\nassert os.listdir({folder!r})",
    "writing a file": "open({file!r}, 'w').write('gone')",
    "deleting a file": "import os\nos.remove({file!r})",
    "a shell": "import os\nassert os.system('exit 0') == 0",
    "a process": "import subprocess\nsubprocess.run(['true'], check=True)",
    "C": "import ctypes\nassert ctypes.CDLL(None).getpid() > 0",
    "a socket": "import socket\nsocket.socket().close()",
    "the environment": "import os\nassert os.environ['SECRET'] == 'known'",
    "Python's own frames": "import sys\nassert sys._getframe()",
    "subclasses": "assert [c for c in object.__subclasses__() if c.__name__ == 'Popen'] is not None",
}


@pytest.mark.parametrize("reach", REACHING.values(), ids=REACHING)
def test_programs_reach_nothing_outside(reach, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "known")
    file = tmp_path / "file"
    file.write_text("intact")
    program = reach.format(file=str(file), folder=str(tmp_path))
    assert not passes(program)
    assert file.read_text() == "intact"
    exec(program, {})  # the control: it raises nothing, and it may well have written


def test_an_interpreter_that_is_killed_is_no_failure_of_its_program():
    """A terminal's Ctrl-C reaches the interpreters too, while the evaluation is to come to its end."""
    killed = []

    def kill():
        while not workers():
            time.sleep(0.01)
        time.sleep(0.1)
        for worker in workers():
            worker.send_signal(2)
            killed.append(worker.wait(300))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert passes(LOOP.format(5_000_000), seconds=60)
    killer.join(300)
    assert killed


@pytest.fixture
def judge(monkeypatch):
    """Says which share of problems the policy solves that gives the same answer to all."""

    def judge(problems, answer):
        monkeypatch.setattr(elastic_reset, "respond", lambda *given, **how: (None, [answer] * len(given[2])))
        config = SimpleNamespace(program_samples=1, program_length=9, program_temperature=1.0)
        return elastic_reset.pass_at_k(None, None, problems, config)["pass_at_1"]

    monkeypatch.setattr(elastic_reset, "run_programs", functools.partial(run_programs, seconds=1.5))
    return judge


def test_embedded_problems_are_solved_by_their_answers_alone():
    """Introduced and explained in any way."""
    rng, programs, expected = random.Random(0), [], []
    exceptions = [None, *table(EXCEPTIONS, "|")]
    for base, step, exception in itertools.product(table(FUNCTIONS, "|"), table(STEPS, "|"), exceptions):
        function = base, (step,), exception
        problem = toy_problem(function, "a question")
        programs.append(problem["program_of"](toy_answer(rng, function)))
        bare = toy_problem(function, "a comment", SIGNATURE)  # whose answers go on behind the first line
        programs.append(bare["program_of"](toy_code(function).removeprefix(SIGNATURE)))
        expected += [problem["expected"], bare["expected"]]
    assert run_programs(programs) == expected
    wrong = toy_problem(ADD, "a question")["program_of"]("def f(a, b):\n    return 123456")
    assert run_programs([wrong])[0] not in expected


ANSWERS = {
    "nothing": "",
    "words": "I do not know, sorry.",
    "another name": "def g(a, b):\n    return a + b",
    "a parameter less": "def f(a):\n    return a",
    "one call that fails": "def f(a, b):\n    return a + b + 0 // (b - 2)",
    "one call that does not end": "def f(a, b):\n    while b == 2: pass\n    return a + b",
    "text": "def f(a, b):\n    return str(a + b)",
    "a fraction": "def f(a, b):\n    return a + b + 0.0",
    "equal to all": "def f(a, b):\n    class A:\n        def __eq__(self, b): return True\n    return A()",
    "no hash": "def f(a, b):\n    class A:\n        def __hash__(self): return 1\n    return {A(): 1}",
    "a long number": "def f(a, b):\n    return 10 ** 5000",
    "a deep list": "def f(a, b):\n    for i in range(10**5): a = [a]\n    return a",
    "a wide list": "def f(a, b):\n    for i in range(60): a = [a, a]\n    return a",
    "no number": "def f(a, b):\n    from decimal import Decimal\n    return Decimal('sNaN')",
    "the function": "def f(a, b):\n    return f",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_no_other_value_passes_for_the_right_one(judge, answer):
    problems = [toy_problem(ADD, "a question")]
    assert judge(problems, answer) == 0
    assert judge(problems, "def f(a, b):\n    return a + b") == 1


@pytest.fixture(scope="module")
def problems():
    if not HUMANEVAL.exists():
        pytest.skip(f"needs HumanEval in {HUMANEVAL.parent}")
    with gzip.open(HUMANEVAL, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_humaneval_is_solved_by_its_own_solutions(problems):
    programs = [humaneval(row)["program_of"](row["canonical_solution"]) for row in problems]
    assert run_programs(programs, seconds=30) == ["passed"] * 164


@pytest.mark.parametrize("body", ["pass", "return None", "raise SystemExit"])
def test_humaneval_is_not_solved_by_an_empty_function(judge, problems, body):
    assert judge(list(map(humaneval, problems)), f"    {body}\n") == 0


def test_a_completion_counts_as_far_as_its_function_goes(judge):
    """What follows it is cut off; a completion that leaves the function at once is none."""
    row = dict(
        prompt='def add(a, b):\n    """Adds."""\n', test=f"def check(add):\n    {TEST.splitlines()[0]}\n"
    )
    problems = [humaneval(row | dict(entry_point="add"))]
    assert judge(problems, "    return a + b\n\nadd = None\nprint(add(1))") == 1
    assert judge(problems, "return 3") == 0
