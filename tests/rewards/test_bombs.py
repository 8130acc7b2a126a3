"""Answers built to be expensive: our own reader's static bounds must make each one cheap."""

import time

import pytest

from sdjax.rewards.mathematics import decide

PMATRIX = "\\begin{pmatrix}1&0\\\\0&1\\end{pmatrix}"


def series(text, count, join="+", start=1):
    """`text` with {k} filled in, joined."""
    return join.join(text.replace("{k}", str(k)) for k in range(start, start + count))


BOMBS = {
    "0": [series("\\sin({k}!)", 59), series("\\sqrt[{k}]{2}", 58, start=2), "9^{9^{9^{9}}}"],
    "x": [
        "\\sin(" * 40 + "x" + ")" * 40,
        series("(x^{{k}}+{k})", 79, ""),
        "\\binom{x}{50}" * 30,
        "f(" * 40 + "x" + ")" * 40,
        "\\frac{1}{1+" * 40 + "x" + "}" * 40,
        "x^{" * 40 + "2" + "}" * 40,
        "\\left|" * 40 + "x" + "\\right|" * 40,
        "|x" * 200,
        "x" + "!" * 50,
        "x_{" * 40 + "1" + "}" * 40,
    ],
    "x^2=1": [
        "(x+y+z+w+1)^{24}=0",
        "((((x+y+1)^{6})^{6})^{6})^6=1",
        series("(x+y+z+{k})", 39, "") + "=0",
        series("\\frac{1}{x+{k}y+z}", 39) + "=1",
    ],
    "1": [
        "\\binom{100000}{2900}",
        series("2999!", 80),
        series("(\\pi/{k})!", 58, start=2),
        "\\gcd(2^{50000},3^{30000})",
        "3^{37000}-3^{36999}",
        "e^{e^{e^{e}}}",
        "\\sin(10^{300})",
        "\\tan(10^{100})",
        "0.\\overline{" + "1" * 900 + "}",
        "1:" * 200 + "1",
        "1=" * 200 + "1",
    ],
    "\\pi": [series("10^{-{k}0}", 59) + "+\\pi", "\\pi+10^{-1400}"],
    "(\\pi)!": ["(\\pi)!+10^{-300}"],
    "1,2": [series("\\sin {k}", 60, ","), series("\\pm{k}\\pm1\\pm3", 40, ",")],
    "\\{1,2\\}": ["\\{" + series("\\sin {k}", 60, ",") + "\\}"],
    "[0,1]": [
        series("(-\\infty,{k})\\cup({k},\\infty)", 20, "\\cap"),
        series("[{k},9{k}]", 60, "\\cup"),
    ],
    PMATRIX: [
        "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}" * 20,
        "(" * 6 + "\\begin{pmatrix}x&2\\\\3&4\\end{pmatrix}" + ")^3" * 6,
    ],
}


@pytest.mark.parametrize(
    ("gold", "bomb"), [(gold, bomb) for gold, bombs in BOMBS.items() for bomb in bombs]
)
def test_bomb_is_cheap_and_wrong(gold, bomb):
    """A bound that is checked after the computation would take minutes here."""
    start = time.process_time()
    assert decide(bomb[:1000], gold)[0] is not True
    decide(bomb[:1000], bomb[:999])
    assert time.process_time() - start < 1.5


REPEATED = (
    r"\ \\ \{ \} & ^ _ % ~ ' \frac \left( \text{ \begin{pmatrix} \overline \dot ( ) [ ] | || < 1, "
    r"1{,} . .. .0 ² √ π U ** __ ` \phantom{ \mathrm{m m^2/ \% \text{or} or = x= \cup 1\cup \pm "
    r"\pm1 ! 1! ^\circ f( \sin \sin( \log_ \log_2 1: a_ \in \{1, \binom{ 1\choose 1\over \mid "
    r"\middle| \langle \lfloor \ldots \infty \mathbb{R} \R 1\bmod \pmod{ \equiv \vec{ \angle "
    r"\begin{cases} \fcolorbox{a}{b} {:} \frac{\text{m}}{ \textdegree \$ ﹣ （ ，"
).split()


UNITS = (r"7\mathrm{" + unit * 150 + "!}" for unit in ("m  ", r"m \cdot ", "m\t ", "m^2 ", "m/"))
SPREAD = (r"7\mathrm{m" + " " * 900 + "!}", r"7\text{ " + " " * 900 + "}x", ".1" + r"\dot{1}" * 80)


@pytest.mark.parametrize("answer", [*UNITS, *SPREAD])
def test_patterns_do_not_backtrack(answer):
    """A first pattern for units took minutes for a hundred of them."""
    start = time.process_time()
    decide(answer, "7")
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("gold", ["7", "x^2+1", "(0,1)\\cup(2,3)", "1,2", "\\text{(B)}", "12_7"])
def test_repeated_tokens_are_cheap_and_wrong(gold):
    """A model that repeats itself writes these; each is a chance for quadratic scanning."""
    for token in REPEATED:
        start = time.process_time()
        answer = token * (999 // len(token))
        assert decide(answer, gold)[0] is not True, token
        decide(answer, answer[:-1])
        assert time.process_time() - start < 1.0, token
