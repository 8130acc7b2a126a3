"""Tables of the reader: LaTeX commands, unicode, units, number words, words that hedge."""

from __future__ import annotations

SPACING = frozenset(
    "quad qquad enspace thinspace medspace thickspace negthinspace hfill noindent limits nolimits "
    "displaystyle textstyle scriptstyle scriptscriptstyle bf rm it sf tt sl em cal bfseries "
    "itshape large Large LARGE huge Huge small normalsize tiny footnotesize scriptsize strut "
    "mathstrut "
    "allowbreak nobreak protect centering boldmath".split()
)
THIN = frozenset(",;:!> ")  # \, \; \: \! \> and a backslash before a blank
SIZES = frozenset(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr bigm Bigm "
    "lvert rvert".split()
) - {"lvert", "rvert"}
TEXT_STYLES = frozenset(
    "text textbf textit textrm textnormal textsf texttt textsc textup textmd emph mbox hbox "
    "textsl textmath uline".split()
)
MATH_STYLES = frozenset(
    "mathrm mathbf mathit mathsf mathtt mathnormal boldsymbol bm pmb operatorname mathop mathbin "
    "mathord underline boxed fbox ensuremath mathup symbf symrm framebox "
    "bold".split()
)
WITH_DROPPED_ARGUMENT = frozenset(
    "color textcolor colorbox fcolorbox phantom hphantom vphantom label tag hspace vspace "
    "mspace".split()
)
OPERATORS = {
    "cdot": "*",
    "times": "*",
    "ast": "*",
    "bullet": "*",
    "div": "/",
    "pm": "pm",
    "mp": "mp",
    "le": "<=",
    "leq": "<=",
    "leqslant": "<=",
    "leqq": "<=",
    "ge": ">=",
    "geq": ">=",
    "geqslant": ">=",
    "geqq": ">=",
    "lt": "<",
    "gt": ">",
    "ne": "!=",
    "neq": "!=",
    "in": "in",
    "equiv": "equiv",
    "cup": "cup",
    "bigcup": "cup",
    "cap": "cap",
    "bigcap": "cap",
    "setminus": "setminus",
    "smallsetminus": "setminus",
    "backslash": "setminus",
    "lbrace": "\\{",
    "rbrace": "\\}",
    "{": "\\{",
    "}": "\\}",
    "lbrack": "[",
    "rbrack": "]",
    "lparen": "(",
    "rparen": ")",
    "vert": "|",
    "mid": "|",
    "lvert": "lv",
    "rvert": "rv",
    "|": "norm",
    "Vert": "norm",
    "lVert": "norm",
    "rVert": "norm",
    "langle": "langle",
    "rangle": "rangle",
    "lfloor": "lfloor",
    "rfloor": "rfloor",
    "lceil": "lceil",
    "rceil": "rceil",
    "circ": "circ",
    "degree": "deg",
    "textdegree": "deg",
    "%": "%",
    "prime": "'",
    "bmod": "bmod",
    "mod": "mod",
    "pmod": "pmod",
    "colon": ":",
    "&": "&",
    "\\": "\\\\",
    "cr": "\\\\",
    "lor": "or",
    "vee": "or",
    "land": "and",
    "wedge": "and",
    "to": "to",
}
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech "
    "csch arcsinh arccosh arctanh asin acos atan ln log lg exp cis".split()
)
LIST_FUNCTIONS = frozenset("gcd lcm min max".split())
STRUCTURES = frozenset(
    "frac dfrac tfrac cfrac nicefrac sfrac sqrt root binom dbinom tbinom choose over begin end "
    "overline bar vec hat widehat tilde angle measuredangle triangle operatorname dot "
    "overrightarrow overleftrightarrow ldots dots cdots dotsc infty emptyset varnothing "
    "bigtriangleup odot mathbb mathcal mathfrak Re Im top".split()
)
GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho "
    "sigma tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi "
    "Omega ell hbar".split()
)
ALIASES = {
    "varepsilon": "epsilon",
    "varphi": "phi",
    "vartheta": "theta",
    "varrho": "rho",
    "varsigma": "sigma",
    "varpi": "varpi",
    "imath": "i",
    "jmath": "j",
}

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
SUPERSCRIPTS = str.maketrans(_SUPERSCRIPTS)
SUBSCRIPTS = str.maketrans(_SUBSCRIPTS)
RAISED = "[" + "".join(_SUPERSCRIPTS) + "]+"
LOWERED = "[" + "".join(_SUBSCRIPTS) + "]+"
_VULGAR = {"½": "1 2", "⅓": "1 3", "⅔": "2 3", "¼": "1 4", "¾": "3 4", "⅕": "1 5", "⅖": "2 5"}
_VULGAR |= {"⅗": "3 5", "⅘": "4 5", "⅙": "1 6", "⅚": "5 6", "⅛": "1 8", "⅜": "3 8", "⅝": "5 8"}
_VULGAR |= {"⅞": "7 8"}
UNICODE = str.maketrans(
    {"−": "-", "–": "-", "‐": "-", "‑": "-", "﹣": "-", "＋": "+", "＝": "=", "／": "/"}
    | {"－": "-", "∕": "/", "（": "(", "）": ")", "［": "[", "］": "]", "｛": r"\{", "｝": r"\}"}
    | {"，": ", ", "；": ";", "：": ":", "、": ", ", "。": ".", "％": r"\%", "＜": "<", "＞": ">"}
    | {"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "∗": "*", "÷": r"\div "}
    | {"√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ", "±": r"\pm ", "∓": r"\mp "}
    | {"≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "∞": r"\infty "}
    | {"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "Ø": r"\emptyset "}
    | {"⌀": r"\emptyset ", "∖": r"\setminus ", "≡": r"\equiv ", "∠": r"\angle ", "…": r"\ldots "}
    | {"°": r"^{\circ}", "º": r"^{\circ}", "˚": r"^{\circ}", "¢": r"\text{ cents}", "℃": " C"}
    | {"′": "'", "’": "'", "‘": "'", "⁄": "/"}
    | {"π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta "}
    | {"ε": r"\epsilon ", "ζ": r"\zeta ", "η": r"\eta ", "θ": r"\theta ", "κ": r"\kappa "}
    | {"λ": r"\lambda ", "μ": r"\mu ", "µ": r"\mu ", "ν": r"\nu ", "ξ": r"\xi ", "ρ": r"\rho "}
    | {"σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ϕ": r"\phi ", "χ": r"\chi "}
    | {"ψ": r"\psi ", "ω": r"\omega ", "Δ": r"\Delta ", "Σ": r"\Sigma ", "Ω": r"\Omega "}
    | {"Φ": r"\Phi ", "Γ": r"\Gamma ", "Θ": r"\Theta ", "Λ": r"\Lambda ", "Π": r"\Pi "}
    | {"ℝ": r"\mathbb{R}", "ℕ": r"\mathbb{N}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}"}
    | {"ℂ": r"\mathbb{C}", "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor "}
    | {"⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "€": "", "£": "", "¥": ""}
    | {"\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,", "\u2003": " ", "\u2002": " "}
    | {key: "\\frac{{{}}}{{{}}}".format(*value.split()) for key, value in _VULGAR.items()}
)

NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
}
TENS = {
    word: 10 * value
    for value, word in enumerate(
        "twenty thirty forty fifty sixty seventy eighty ninety hundred".split(), start=2
    )
}
NUMBER_WORDS |= TENS
MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
HEDGES = frozenset(
    "or and not no nor either neither both maybe perhaps possibly probably likely about around "
    "approximately approx roughly nearly almost circa less fewer more greater larger smaller "
    "least most under over above below between to through from up upto until till unless if when "
    "where except without excluding including plus minus times multiplied divided squared cubed "
    "halved doubled tripled twice thrice half third quarter factorial root pi choose modulo mod "
    "base wrong incorrect false isnt is isn't impossible for any all some than as "
    "negative positive opposite reciprocal inverse conjugate unknown guess guessed none nothing "
    "never error point hence infinity infinite undefined approximately same equals equal "
    "original half halves thirds fourths quarters fifths sixths eighths tenths hundredths "
    "thousandths gross ish minimum maximum fails fail failed rejected extraneous cannot "
    "instead".split()
)
_UNITS = {
    "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "L": "l liter liters litre litres",
    "mL": "ml milliliter milliliters millilitre millilitres",
    "gal": "gal gallon gallons",
    "dollar": "dollar dollars usd",
    "cent": "cent cents",
    "deg": "degree degrees deg",
    "rad": "radian radians rad",
    "am": "am",
    "pm": "pm",
    "%": "% percent percents percentage pct",
}
UNITS = {word: unit for unit, words in _UNITS.items() for word in words.split()}
BARE_UNITS = frozenset(word for word in UNITS if len(word) > 2) | frozenset(
    "cm mm km kg mi ft mph kph ways units points integers cm² USD".split()
)
UNIT_LETTERS = frozenset("m g s h L l J N W V K F".split())
NUMBER_SETS = frozenset("R N Z Q C".split())  # \\R and its kin, as many preambles define them
# what may stand in text mode before its argument; sec, min and max are words as often as not
TEXT_FUNCTIONS = (FUNCTIONS | {"gcd", "lcm"}) - {"sec", "exp"}
CURRENCY = frozenset("$ mathdollar textdollar".split())
ORDINALS = frozenset("st nd rd th".split())
RUN_NAMES = {
    "sqrt": ("cmd", "sqrt"),
    "pi": ("sym", "pi"),
    "theta": ("sym", "theta"),
    "infinity": ("cmd", "infty"),
    "infty": ("cmd", "infty"),
    "or": ("word", "or"),
    "and": ("word", "and"),
    "not": ("word", "not"),
    "lcm": ("func", "lcm"),
    "gcd": ("func", "gcd"),
}
COMMANDS = (
    SPACING | SIZES | TEXT_STYLES | MATH_STYLES | WITH_DROPPED_ARGUMENT | FUNCTIONS | LIST_FUNCTIONS
)
COMMANDS |= NUMBER_SETS | STRUCTURES | GREEK | frozenset(ALIASES) | frozenset(OPERATORS)
