"""Properties under random input: no exception, no slow answer, equal spellings equal."""

import os
import time
from fractions import Fraction

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

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
