"""Names as a stranger may give them, for every place that names are written to."""

ESCAPES = [
    "\x1b[2J\x1b[31mred",  # clears the screen
    "\x1b]0;title\x07",  # renames the window
    "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31mred",  # the same as \x1b[ in one character
    "back\b\b\b\bhidden",
    "return\rhidden",
    "nul\x00bell\x07tab\tdel\x7f",
    "two\nlines",
    "\u202egnp.exe",  # read from right to left
    "\u2066isolate\u2069",
    "half \ud800 a character",
    "\ufffe\uffff",
]
MARKUP = [
    "[red]x[/nothing]",
    "[link=http://evil.example]x[/link]",
    ":skull:",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "]]><script>alert(1)</script>",
    "</text><script>alert(1)</script>",
    "\"' onload=alert(1) x='",
    "[a](javascript:alert(1))",
    "![a](javascript:alert(1))",
    "<javascript:alert(1)>",
    "[a]: javascript:alert(1)",
    "a | b || c",
    "`code` ``",
    "# title",
    "- item",
    "12. item",
    "---",
    "```\nfence",
    "{raw}`html <b>`",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "$\\frac{1}{0}$ $",
    "*a* _b_ ~~c~~ ^d^",
    "&lt;b&gt; &amp;",
    "\\",
    "% comment",
]
PATHS = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "   ",
    "a/b\\c",
    "C:\\x",
    "~/x",
    "x" * 400,
    "φ" * 200,
    "nul\x00x",
    ".hidden",
    "trailing. ",
]
NAMES = [*ESCAPES, *MARKUP, *PATHS]
"""All of them go to every place."""
