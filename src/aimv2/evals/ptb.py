"""Captions as words, the way caption scores count them: Stanford's PTBTokenizer through Java, or ours without it.

Caption scores (CIDEr, BLEU) are computed on tokens of the Penn Treebank's style, lower case, most punctuation left out.
The tokeniser of the public scorers is a Java program. :func:`ptb_tokens` follows its rules as far as captions need them: the
captions of Flickr8k come out the same, all 40,455 of them; text with programming marks in it does not always.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

JAR = "stanford-corenlp-3.4.1.jar"
JAVA, OURS = "Stanford PTBTokenizer 3.4.1 (Java)", "aimv2.evals.ptb (PTB-like, no Java)"
# left out, as pycocoevalcap lists it; its brackets are in capitals, so those of the lower-case tokens stay, there and here
PUNCTUATION = frozenset(("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"))
PUNCTUATION |= frozenset((".", "?", "!", ",", ":", "-", "--", "...", ";"))

_ALIKE = {
    **dict.fromkeys("“”«»‹›", '"'),
    **{"’": "'", "‘": "`", "…": " ... ", "—": "--", "–": "--", "―": "--", "‐": "-", "‑": "-"},
    **{"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "€": "$", "£": "#", "¢": "cents"},
    **{"\u00ad": "", "\u200b": " "},  # soft hyphen, space without width
}
_SAME = str.maketrans(_ALIKE)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# words that keep their full stop; a capital where only the capitalised word is one; then those before a number only
_ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig bros calif capt cf cie"
    " cmdr co col colo comdr conn corp cos cpl ct dak dec dept det drs? elec ens esq est etc ext feb fla fri ft ga gen"
    " govs? hon inc ind insp intl invt jan jos jr jul jun kans? ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme"
    " mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc pres profs? ptes pty pvt rd reps? rev"
    " rt sens? sept? sfc sgt spc sq sr ste? supts? sys tel tenn thu thurs treas tues? univ va vs vt wed wisc? wm wyo"
).replace(" ", "|")
_CAPITALISED = "A[Rr][Kk]|D[Ee][Ll]|I[Ll][Ll]|L[Aa]|M[Aa]SS|Mass|Miss|MISS|Ore|ORE|P[Aa]|Tex|TEX|Wash|WASH"
_TWO = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
_TWO |= {"gimme": "gim me", "lemme": "lem me", "'tis": "'t is", "'twas": "'t was"}

_LETTERS = r"[^\W\d_]"
_PIECE = r"(?:[^\W_][\u0300-\u036f]*)+"
_END = r"(?![^\W_])"
_SHORT = "(?:s|m|d|re|ve|ll)"  # what follows an apostrophe in a contraction
_TOKEN = re.compile(
    rf"""
    (?P<whole> </?[A-Za-z]\w*(?:\s[^<>]*)?/?>                                # a tag
      | [A-Za-z0-9][\w.+-]*@[\w-]+(?:\.[\w-]+)+                             # an address
      | (?:https?://|www\.)[^\s<>"]*[^\s<>"'.,;:!?)]                        # a link
      | [#@][A-Za-z_]\w*
      | [:;=][-o*]?[()DPdp\\@|\[\]]{_END}                                   # a smiley
      | '\d0s | '\d\d(?!\d) | 'n' | 'n{_END} | '(?:em|till?|cause){_END}
      | '{_SHORT}{_END}
      | (?:Nos?|Figs?|pp|prop)\.(?=\s?\d)
      | (?:(?:{_ABBREVIATIONS})\.{_END})
      | (?:Ph|Ed)\.D\.
      | (?-i:(?:{_CAPITALISED})\.){_END}
      | (?:{_LETTERS}\.)+{_END}                                             # u.s., a.m., an initial
      | ol'{_END} | c\+\+ | c\#
      | [A-Za-z]+\+\+ )
    | (?P<split> '?(?:cannot|gonna|gotta|wanna|gimme|lemme|(?<=')tis|(?<=')twas){_END} )
    | (?P<number> [-+.,:]?\d+(?:[.,:/]\d+)+(?:-{_PIECE})* | [-+.,:]\d+(?![^\W_]) )
    | (?P<word> (?-i:[A-Z]+(?:[&+][A-Z]+)+)
      | {_LETTERS}*n't{_END}
      | [A-Za-z]+[aeiouy]'(?!{_SHORT}{_END})(?-i:[aeiouA-Z])[A-Za-z]*       # ma'am
      | [A-HJ-XZ]'(?!{_SHORT}{_END}){_LETTERS}{{2,}}                          # o'clock, d'oh
      | y'(?={_LETTERS}{{2}})                                               # y' all
      | {_PIECE}(?:[-_./!?]{_PIECE})* )
    | (?P<run> \.{{2,}} | -{{2,}} | _+ | \*+ | [!?]+ | \#+ | @+ | '' | `` | << | >> )
    | (?P<mark> \S )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SUFFIX = re.compile(rf"(n't|'{_SHORT}){_END}", re.IGNORECASE)


def ptb_tokens(caption: str) -> list[str]:
    """The words of a caption: lower case, contractions cut in two, quotes, commas and full stops left out."""
    text = caption.replace("&amp;", "&").translate(_SAME)
    found: list[str] = []
    at = 0
    while match := _TOKEN.search(text, at):
        at, kind, token = match.end(), match.lastgroup, match[0].lower()
        if kind == "split":
            found += _TWO[token].split()
        elif kind == "word":
            if token.endswith("n't"):
                token, suffixes = token[:-3], ["n't"]
            else:
                suffixes = []
            while more := _SUFFIX.match(text, at):
                suffixes.append(more[0].lower())
                at = more.end()
            found += [token] * bool(token) + suffixes
        elif kind == "run":
            found.append({"-": "--", ".": "..."}.get(token[0], token))
        elif kind == "mark":
            found += [_BRACKETS.get(token, token)] * (token != '"' and ord(token) < 0x10000)
        else:
            found.append(token.replace("(", "-lrb-").replace(")", "-rrb-"))
    return [token for token in found if token not in PUNCTUATION]


def tokenise(captions: Sequence[str]) -> tuple[list[list[str]], str]:
    """Words of captions, and the tokeniser's name: Java's where Java and pycocoevalcap are there and run, else ours."""
    found = java_tokens(captions)
    return (found, JAVA) if found is not None else ([ptb_tokens(caption) for caption in captions], OURS)


def java_tokens(captions: Sequence[str]) -> list[list[str]] | None:
    """Words of captions by Stanford's program, as pycocoevalcap calls it; None where it is not there or does not run."""
    package, java = find_spec("pycocoevalcap"), shutil.which("java")
    if java is None or package is None or not package.submodule_search_locations:
        return None
    jar = Path(package.submodule_search_locations[0]) / "tokenizer" / JAR
    words = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    words += ["-encoding", "UTF-8", "-preserveLines", "-lowerCase"]
    text = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    done = subprocess.run(words, input=text.encode(), capture_output=True, check=False)
    lines = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode or len(lines) != len(captions):  # a stub of Java, a jar that is gone
        return None
    return [[word for word in line.split() if word not in PUNCTUATION] for line in lines]
