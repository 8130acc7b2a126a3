"""Properties under random input: no exception, no slow answer, equal spellings equal."""

import os
import time
from fractions import Fraction

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mpmath import MPContext

from sdjax.rewards import RewardConfig, get_reward
from sdjax.rewards.mathematics import decide

MATH = get_reward("math")
NO_FALLBACK = RewardConfig(fallback=False)
# a run is reproducible; SDJAX_FUZZ_EXAMPLES=20000 fuzzes with fresh random input for longer
EXAMPLES = int(os.environ.get("SDJAX_FUZZ_EXAMPLES", "0"))
COMMON = settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
PIECES = (
    r"\frac \sqrt \left( \right) \left[ \right] \{ \} { } ( ) [ ] | \pi e i x y n 2 10 99999 0 .5 "
    r"1.25 + - * / ^ _ ! , ; = < > \le \cup \in \pm \mp \infty \text{ or } \text{and} \sin \log_2 "
    r"\binom{ \overline{ \begin{pmatrix} \end{pmatrix} \\ & \circ ^\circ % \$ \% : ' \ldots 9^9^9 "
    r"10^{10} \mathbb{R} \setminus \emptyset \lfloor \rfloor \gcd \pmod \int \sum_{k=1}^n a_1 f(x) "
    r"\vec{v} \angle \mathrm{cm} \text{cm} \text{million} \boxed{ 1\frac{1}{2} 0.\overline{3} ²"
).split(" ")
soup = st.lists(st.sampled_from(PIECES), min_size=1, max_size=14).map(" ".join)
small = st.integers(-30, 30)
EXACT = MPContext()
EXACT.dps = 60
mpf, sqrt = EXACT.mpf, EXACT.sqrt
TINY = mpf(10) ** -45


@COMMON
@given(soup, soup)
def test_no_answer_raises_or_is_slow(answer, gold):
    """Whatever is in the box, the verdict comes, in little CPU time, and is right for itself."""
    start = time.process_time()
    decide(answer, gold)
    decide(gold, gold)
    assert time.process_time() - start < 1.0


@COMMON
@given(st.text(max_size=60), st.text(max_size=20))
def test_any_text(response, gold):
    """Arbitrary unicode in response and gold."""
    for text in (response, "\\boxed{" + response + "}"):
        verdict = MATH(text, gold, NO_FALLBACK)
        assert verdict.correct in (True, False) and verdict.reason


@COMMON
@given(soup, st.integers(0, 999))
def test_soup_is_never_an_integer_by_accident(answer, gold):
    """A verdict of equal needs an answer that is that integer, by an independent evaluation."""
    if not decide(answer, str(gold))[0]:
        return
    pattern = decide(answer, str(gold + 1))[0]
    assert not pattern  # what equals every number equals none


def spellings(value: Fraction) -> list[str]:
    """Different ways to write a rational."""
    a, b = value.numerator, value.denominator
    texts = [f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}", f"\\dfrac{{{3 * a}}}{{{3 * b}}}", f"x = {a}/{b}"]
    texts += [
        f"\\left(\\frac{{{-a}}}{{{-b}}}\\right)",
        f"\\text{{{a}}}/{b}",
        f"{a}\\cdot {b}^{{-1}}",
    ]
    if value > 1 and b > 1:
        texts.append(f"{a // b}\\frac{{{a % b}}}{{{b}}}")
    if b in (1, 2, 4, 5, 8, 10, 20, 25):
        texts.append(f"{float(value)}")
    return texts


@COMMON
@given(st.fractions(-40, 40, max_denominator=60), st.fractions(-40, 40, max_denominator=60))
def test_rationals(value, other):
    """All spellings of one rational are equal, and none equals another rational."""
    gold = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    for text in spellings(value):
        assert decide(text, gold)[0] is True, text
    for text in spellings(other):
        assert (decide(text, gold)[0] is True) == (value == other), text


@COMMON
@given(small, small, small, st.integers(1, 12), st.integers(2, 30))
def test_polynomials_and_radicals(a, b, c, k, r):
    """Factored equals expanded; a changed coefficient does not."""
    factored = f"({k}x{a:+d})(x{b:+d})"
    expanded = f"{k}x^2{k * b + a:+d}x{a * b:+d}"
    assert decide(factored, expanded)[0] is True
    assert decide(expanded.replace("x^2", "x^3"), factored)[0] is not True
    assert decide(f"{expanded}+{abs(c) + 1}", factored)[0] is not True
    assert decide(f"{k}\\sqrt{{{r}}}", f"\\sqrt{{{k * k * r}}}")[0] is True
    assert decide(f"{k}\\sqrt{{{r}}}", f"\\sqrt{{{k * k * r + 1}}}")[0] is not True


@COMMON
@given(st.lists(small, min_size=2, max_size=5, unique=True), st.randoms())
def test_lists_tuples_intervals(values, rng):
    """Lists and sets are unordered, tuples ordered, interval ends count."""
    shuffled = values[:]
    rng.shuffle(shuffled)
    gold, other = ", ".join(map(str, values)), ", ".join(map(str, shuffled))
    assert decide(other, gold)[0] is True
    assert decide(f"\\{{{other}\\}}", gold)[0] is True
    assert (decide(f"({other})", f"({gold})")[0] is True) == (values == shuffled)
    assert decide(other + f", {max(values) + 1}", gold)[0] is not True
    low, high = sorted(values[:2])
    assert decide(f"[{low}, {high}]", f"({low}, {high})")[0] is not True
    assert decide(f"{low} < x \\le {high}", f"x \\in ({low}, {high}]")[0] is True


@COMMON
@given(small, small.filter(bool), small, st.integers(1, 9))
def test_equations_up_to_a_factor(a, b, c, k):
    """Equations may be scaled and rearranged; a changed constant shows."""
    gold = f"{a}x{b:+d}y={c}"
    assert decide(f"{k * b}y{k * a:+d}x{-k * c:+d}=0", gold)[0] is True
    assert decide(f"{a}x{b:+d}y={c + 1}", gold)[0] is not True
    assert decide(f"{a}x{-b:+d}y={c}", gold)[0] is not True


WRAPS = ("({})", r"\left({}\right)", r"\bigl({}\bigr)", "[{}]", r"{{({})}}")


def trees(depth: int):
    """Random arithmetic: (value to 60 digits or None, spelling, another spelling)."""
    leaves = st.builds(leaf, st.integers(0, 12), st.sampled_from((1, 1, 2, 3, 4, 10)))
    if depth == 0:
        return leaves
    inner = trees(depth - 1)
    return st.one_of(leaves, st.builds(node, st.sampled_from("+-*/s"), inner, inner, st.randoms()))


def leaf(top, bottom):
    if bottom == 1:
        return mpf(top), str(top), f"{top}.0"
    return mpf(top) / bottom, f"(\\frac{{{top}}}{{{bottom}}})", f"({top}/{bottom})"


def node(op, left, right, rng):
    (a, *a_texts), (b, *b_texts) = left, right
    value, texts = None, []
    for x, y in zip(a_texts, b_texts, strict=True):
        x, y = (rng.choice(WRAPS).format(text) for text in (x, y))
        forms = {
            "+": (f"{x}+{y}", f"{y} + {x}"),
            "-": (f"{x}-{y}", f"-{y}+{x}"),
            "*": (f"{x}\\cdot {y}", f"{y}{x}", f"{x}\\times{y}"),
            "/": (f"\\frac{{{x}}}{{{y}}}", f"{x}/{y}", f"{x}{y}^{{-1}}"),
            "s": (f"\\sqrt{{{x}}}", f"{x}^{{1/2}}", f"{x}^{{\\frac12}}"),
        }
        texts.append(rng.choice(forms[op]))
    if a is None or b is None:
        return None, *texts
    if op == "s":
        value = sqrt(a) if a >= 0 else None
    elif op == "/":
        value = a / b if abs(b) > TINY else None
    else:
        value = {"+": a + b, "-": a - b, "*": a * b}[op]
    return value, *texts


@COMMON
@given(trees(3), trees(1), st.sampled_from((1, 10**6, 10**30)))
def test_arithmetic_against_an_independent_evaluation(tree, other, scale):
    """Two spellings of a value are equal, another value is not, however near it is."""
    value, text, again = tree
    if value is None or len(text) + len(again) > 500:
        return
    assert decide(again, text)[0] is True
    assert decide(f"({again})+\\frac{{1}}{{{scale}}}", text)[0] is not True
    hidden = f"x+({again})+10^{{60}}\\sqrt{{2}}-10^{{60}}\\sqrt{{2}}"
    assert decide(hidden + "+1", f"x+{text}")[0] is not True  # giants must not hide the 1
    if other[0] is not None:
        assert (decide(other[1], text)[0] is True) == (abs(value - other[0]) < TINY)
