"""Texts to score: scripts, emoji, code, white space, control characters; from one character to thousands of tokens."""

from __future__ import annotations

__all__ = ["LONG_TEXT", "PROMPTS", "TEXTS"]

TEXTS = (
    "a",
    " ",
    "7",
    "\n",
    "é",
    "字",
    "🙂",
    "The horse raced past the barn fell.",
    "The capital of France is Paris.",
    "It was the best of times, it was the worst of times.",
    "Is the answer yes or no? Yes.",
    "NO SHOUTING, PLEASE!!!",
    "3.14159265358979323846",
    "2 + 2 = 4, 17 * 23 = 391, 10 / 3 = 3.333",
    "+44 20 7946 0958, 2026-11-24T00:24:47Z",
    "https://example.org/a?b=c&d=%20#e",
    "Ünïcödé façade naïve Ærøskøbing",
    "e\u0301 and \u00e9 are one letter in two spellings",
    "Der Fluß fließt übers Moor.",
    "Où est la bibliothèque ?",
    "¿Dónde está el niño?",
    "Zażółć gęślą jaźń",
    "Příliš žluťoučký kůň",
    "İstanbul'da ılık bir gün",
    "Tiếng Việt có nhiều dấu",
    "Лошадь бежала мимо амбара.",
    "Η γλώσσα και οι λέξεις",
    "שלום לכל העולם",
    "السلام عليكم ورحمة الله",
    "सत्यमेव जयते",
    "வணக்கம் உலகம்",
    "สวัสดีชาวโลก",
    "안녕하세요, 세계",
    "吾輩は猫である。名前はまだ無い。",
    "床前明月光，疑是地上霜。",
    "ሰላም ለዓለም",
    "გამარჯობა მსოფლიო",
    "Բարեւ աշխարհ",
    "👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇺🇳 emoji with joiners",
    "so 😀 so 😢 so 🤷",
    "𝔉𝔯𝔞𝔨𝔱𝔲𝔯 and 𐍈 beyond the first plane",
    "∀x ∈ ℝ: ⌈x⌉ = −⌊−x⌋, ∑ 1/n² = π²/6",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    'SELECT name FROM horses WHERE raced = TRUE AND barn <> "red";',
    '{"key": [1, 2.5, null, true], "nested": {"empty": {}}}',
    "<p class='x'>Tags &amp; entities</p>",
    "\\frac{a}{b} \\le \\sqrt{c}",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "tab\tseparated\tvalues\r\nand a second line\r\n",
    "   leading and trailing   ",
    "many\n\n\n\nempty lines",
    "spaces" + 20 * " " + "between",
    "ha" * 40,
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "Buffalo buffalo Buffalo buffalo buffalo buffalo Buffalo buffalo.",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows.",
)

LONG_TEXT = "\n".join(
    f"{number}. {text} {other}"
    for number, (text, other) in enumerate(zip(8 * TEXTS, 8 * (*TEXTS[5:], *TEXTS[:5]), strict=True))
)
"""More than 2,000 tokens, in whatever pieces."""

PROMPTS = tuple(text for text in TEXTS if 20 <= len(text) <= 40)[:17]
"""Beginnings to go on from, all different."""
