"""Where texts come from: Debian's King James Bible, a part of it that ships, WikiText-2, IMDB, own files."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError

__all__ = [
    "CORPORA",
    "DEBIAN_BIBLE",
    "Documents",
    "Verse",
    "bible",
    "imdb",
    "lines_of_parts",
    "small_bible",
]

DEBIAN_BIBLE = Path("/usr/lib/bible.data")
"""Where Debian's package ``bible-kjv-text`` keeps the text, which its command ``bible`` reads."""

CORPORA = Path(__file__).parent / "corpora"
"""Texts that ship with this package; each file says where it is from and who may use it."""

_BIBLE_FILE = "kjv.txt"
_WIKITEXT = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")
_OWN = ("train.txt", "valid.txt", "test.txt")
_VERSE = re.compile(r"^(\d?[A-Za-z][A-Za-z ]*?) ?(\d+):(\d+) (.*)$")
_VERSES = 31_102


class Verse(NamedTuple):
    """A verse of the Bible, or what else is cited as book, chapter and verse."""

    book: str
    chapter: int
    number: int
    text: str


@dataclass(frozen=True)
class Documents:
    """Texts with labels.

    Attributes:
        texts: one a document.
        labels: one a document, from 0.
    """

    texts: Sequence[str]
    labels: Sequence[int]


def small_bible() -> list[Verse]:
    """Proverbs, Mark and Romans in the King James Version, which ship with this package (235 kB)."""
    return _verses(CORPORA / "kjv_small.txt")


def bible(folder: Path | None) -> list[Verse]:
    """The King James Version, 31,102 verses.

    Args:
        folder: with a file ``kjv.txt``, a verse a line: ``Gen 1:1 In the beginning ...``; None: Debian's
            package ``bible-kjv-text``.

    Raises:
        DataError: it is not there, or not as described.
    """
    if folder is not None:
        return _verses(folder / _BIBLE_FILE)
    command = shutil.which("bible")
    if command is None or not DEBIAN_BIBLE.is_file():
        raise DataError(
            "The text 'bible-kjv' comes from Debian's package bible-kjv-text, which is not installed: run "
            f"'apt-get install bible-kjv-text', or give --data-dir with a file {_BIBLE_FILE}, a verse a line "
            "('Gen 1:1 In the beginning ...'). 'kjv-small', a part of it, ships with this package."
        )
    # The program reads its own compressed format; -f prints a verse a line.
    done = subprocess.run([command, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=False)
    verses = _parse(done.stdout.splitlines(), "the output of Debian's command 'bible'")
    if len(verses) != _VERSES:
        raise DataError(
            f"Debian's command 'bible' gave {len(verses):,} verses where the whole Bible has {_VERSES:,} "
            f"({done.stderr.strip() or 'without a word of why'}). Install bible-kjv-text again."
        )
    return verses


def _verses(path: Path) -> list[Verse]:
    if not path.is_file():
        raise DataError(
            f"There is no file {path}. It should have a verse a line: 'Gen 1:1 In the beginning ...'."
        )
    return _parse(_lines(path), str(path))


def _parse(lines: Sequence[str], where: str) -> list[Verse]:
    verses = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _VERSE.match(line.strip())
        if match is None:
            raise DataError(
                f"Line {number} of {where} is no verse: expected 'Gen 1:1 In the beginning ...', found "
                f"{line[:60]!r}."
            )
        verses.append(Verse(match[1], int(match[2]), int(match[3]), match[4]))
    if not verses:
        raise DataError(f"{where} is empty: there is no verse in it.")
    return verses


def lines_of_parts(name: str, folder: Path, download: bool) -> tuple[list[str], list[str], list[str]]:
    """The lines of train, validation and test of a text in three files.

    Args:
        name: ``"wikitext-2"``: ``wiki.train.tokens``, ``wiki.valid.tokens``, ``wiki.test.tokens``;
            ``"text"``: ``train.txt``, ``valid.txt``, ``test.txt``.
        folder: where they are, or a folder ``wikitext-2`` with them.
        download: fetch WikiText-2 with the ``datasets`` library where it is missing.

    Raises:
        DataError: a file is missing, empty or unreadable, or the download failed.
    """
    files = _WIKITEXT if name == "wikitext-2" else _OWN
    places = [folder, folder / name]
    for place in places:
        if all((place / file).is_file() for file in files):
            train, valid, test = (_some_lines(place / file) for file in files)
            return train, valid, test
    if download and name == "wikitext-2":
        parts = _from_hub("Salesforce/wikitext", "wikitext-2-v1", name)
        train, valid, test = ([str(t) for t in parts[p]["text"]] for p in ("train", "validation", "test"))
        return train, valid, test
    raise DataError(_missing(name, places, ", ".join(files), name == "wikitext-2"))


def imdb(folder: Path, download: bool) -> tuple[Documents, Documents]:
    """The 25,000 training and 25,000 test reviews of IMDB (Maas et al. 2011); label 1 is praise.

    Args:
        folder: ``aclImdb``, or the folder it is in.
        download: fetch it with the ``datasets`` library where it is missing.

    Raises:
        DataError: it is missing or empty, or the download failed.
    """
    places = [folder, folder / "aclImdb"]
    for place in places:
        if all((place / part / kind).is_dir() for part in ("train", "test") for kind in ("pos", "neg")):
            return _reviews(place / "train"), _reviews(place / "test")
    if download:
        parts = _from_hub("stanfordnlp/imdb", None, "imdb")
        train, test = (
            Documents([str(t) for t in parts[p]["text"]], [int(n) for n in parts[p]["label"]])
            for p in ("train", "test")
        )
        return train, test
    raise DataError(_missing("imdb", places, "train/pos, train/neg, test/pos and test/neg", True))


def _reviews(folder: Path) -> Documents:
    texts, labels = [], []
    for label, kind in enumerate(("neg", "pos")):
        files = sorted((folder / kind).glob("*.txt"))
        if not files:
            raise DataError(f"There is no review in {folder / kind}: it should hold files *.txt.")
        texts += [" ".join(_lines(file)).replace("<br />", " ") for file in files]
        labels += [label] * len(files)
    return Documents(texts, labels)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path} as text: {error}.") from None


def _some_lines(path: Path) -> list[str]:
    lines = _lines(path)
    if not any(line.strip() for line in lines):
        raise DataError(f"The file {path} is empty: there is no text in it.")
    return lines


def _missing(name: str, places: Sequence[Path], files: str, on_hub: bool) -> str:
    way = (
        ", or pass --dataset-download with the extra 'text' installed (pip install 'twnn-plugin[text]')"
        if on_hub
        else ""
    )
    where = " or ".join(str(place) for place in places)
    return (
        f"The text {name!r} is not (or not completely) in {where}: expected {files}. Put the files there, or "
        f"give their folder with --data-dir{way}."
    )


def _from_hub(repository: str, configuration: str | None, name: str) -> Any:
    """A data set of the Hugging Face hub."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"Fetching {name!r} needs the library 'datasets': pip install 'twnn-plugin[text]', or put the "
            "files in place by hand and give --data-dir."
        ) from None
    try:
        return load_dataset(repository, configuration)
    except Exception as error:  # its own, the hub's and the network's: no common base
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"The download of {name!r} failed ({reason}). Put the files in place by hand and give --data-dir."
        ) from error
