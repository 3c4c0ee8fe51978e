"""Untrusted text on its way out, to a terminal, a page, a figure, a table or a shell; and the secrets that stay in.

What is read from a file or typed may have terminal escapes, line breaks, markup or formulas in it. Each medium shows
such text as the characters that it is made of.
"""

import html
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Literal, TypeGuard
from urllib.parse import unquote

from quack_lm.errors import UserError

Medium = Literal["terminal", "markdown", "markdown code", "html", "figure", "csv"]

# Emphasis, code, links, tables, HTML, entities, formulas, attributes, and addresses that GitHub makes links of. Not
# underscores in names, and not intervals, [0.1, 0.2], which would be harder to read in the file.
_MARKDOWN = re.compile(
    r"(\[(?=[^\]]*\d)[-+., \d]*\](?![(\[:]))|[\\`*|{}\[\]]|(?<![^\W_])_|_(?![^\W_])|<(?=[a-z/!?])|&(?=#?\w+;)"
    r"|~(?=\S)|(?<=\S)~|\$|:(?=//)|(?<=www)\.|(?<=\S)@(?=[\w-]+\.)|#$",
    re.IGNORECASE,
)
# Headings, quotes, lists, rules and definitions: what makes a block where a line begins with it.
_MARKDOWN_BLOCK = re.compile(r"^(?:[#>=:?!]|[-+](?![.\d])|\d+[.)](?=\s|$))")

# Whatever stands before an @ in a URL. A path keeps one slash of `://`, and a grammar may remove the colon.
_PASSWORD = re.compile(r"(:/+|//)[^/\s]*@")
# Parameters of a query or a fragment: of signed URLs of S3, GCS and Azure, of APIs, and of OAuth.
_PARAMETER = re.compile(
    r"([?&#;](?:[\w.-]*(?:token(?![is])|secret|passw|pwd|signature|credential|session|access[-_]?key)[\w.-]*"
    r"|(?:[\w.-]*[-_.])?(?:api)?(?:sig|key|auth|authorization|pass|pw|pat|otp|jwt|bearer|creds))(?:=|%3D))"
    r"[^&#\s'\",)\]}]+",
    re.IGNORECASE,
)
# Of Hugging Face, GitHub, GitLab, Slack, AWS and OpenAI, wherever they stand.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|xox[abeoprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|sk-[\w-]{32,})"
)


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string that UTF-8 can encode, as tokenizers do: a lone surrogate is none."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def escape(text: str, medium: Medium = "terminal") -> str:
    """Untrusted text on one line of a medium, which shows its characters and does nothing else with them."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if medium == "markdown":
        line = _MARKDOWN.sub(lambda found: found[1] or _markdown_escape(found[0]), line.strip())
        return _MARKDOWN_BLOCK.sub(lambda found: found[0][:-1] + _markdown_escape(found[0][-1]), line)
    if medium == "markdown code":
        # The text cannot close a fence that is longer than any run of backticks inside.
        fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
        padding = " " if "`" in line else ""
        return f"{fence}{padding}{line}{padding}{fence}"
    if medium == "html":
        return html.escape(line)
    if medium == "figure":
        return line.replace("$", r"\$")  # matplotlib would read what is between two as a formula
    if medium == "csv":
        return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line  # a formula, for a spreadsheet
    return line


def _markdown_escape(character: str) -> str:
    # Not every parser takes a backslash before these.
    return f"&#{ord(character)};" if character in "<&~$:.=?@" else f"\\{character}"


def echo(*lines: str, err: bool = False) -> None:
    """Print lines, the only way to a terminal: each argument stays one line, whatever is in it."""
    for line in lines:
        print(escape(line), file=sys.stderr if err else sys.stdout, flush=True)


def echo_piece(text: str) -> None:
    """Print a part of a text, whose line breaks and tabs are kept, and no line break after it."""
    print("".join(c if c in "\n\t" else escape(c) for c in text), end="", flush=True)


class PrintableRecord(logging.LogRecord):
    """What libraries log, with `logging.setLogRecordFactory`: some repeat what they have read."""

    def getMessage(self) -> str:
        """The message, with its line breaks."""
        return "\n".join(map(escape, super().getMessage().split("\n")))


def one_line(text: str) -> str:
    """A message on one line, without the secrets of URLs."""
    line = _PASSWORD.sub(r"\1***@", escape(" ".join(text.split())))
    return _TOKEN.sub("***", _PARAMETER.sub(r"\1***", line))


def refuse_secret(key: str, value: str) -> None:
    """UserError where a URL has a password or a token: before the @ of its host, where `git` alone is none, or in a
    parameter, like that of a signed URL; and where a token stands that is known by its form."""
    if re.search(r"://(?!git@)[^/@\s]+@", value) or _PARAMETER.search(unquote(value)) or _TOKEN.search(value):
        # The value is not repeated: it would stand in a log.
        raise UserError(
            f"{key} has a password in its URL, or a token, which would be written down; remove it there, and give it "
            "in an environment variable or ~/.netrc"
        )


def shell_line(arguments: Sequence[str]) -> str:
    """The arguments as one line for bash: like shlex.join, but a line break stays inside of the line."""
    return " ".join(shlex.quote(text) if text.isprintable() else _ansi_quoted(text) for text in arguments)


def _ansi_quoted(text: str) -> str:
    known = {"\\": "\\\\", "'": "\\'"}
    return "$'" + "".join(known.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + "'"
