"""The table of texts: what is read, what is asked, and how long a row is."""

from __future__ import annotations

from dataclasses import dataclass

from twnn_plugin.errors import nearest

from ..errors import ConfigError, DataError

__all__ = ["BOOKS", "TEXTS", "TextSpec", "is_text", "text_name"]

BOOKS = (
    *("Ge", "Exo", "Lev", "Num", "Deu", "Josh", "Jdgs", "Ruth", "1Sm", "2Sm", "1Ki", "2Ki", "1Chr", "2Chr"),
    *("Ezra", "Neh", "Est", "Job", "Psa", "Prv", "Eccl", "SSol", "Isa", "Jer", "Lam", "Eze", "Dan", "Hos"),
    *("Joel", "Amos", "Obad", "Jonah", "Mic", "Nahum", "Hab", "Zep", "Hag", "Zec", "Mal"),
    *("Mat", "Mark", "Luke", "John", "Acts", "Rom", "1Cor", "2Cor", "Gal", "Eph", "Phi", "Col", "1Th", "2Th"),
    *("1Tim", "2Tim", "Titus", "Phmn", "Heb", "Jas", "1Pet", "2Pet", "1Jn", "2Jn", "3Jn", "Jude", "Rev"),
)
"""The books of the Bible in order, as Debian's ``bible`` cites them; the first 39 are the Old Testament."""

_OLD = 39
_SMALL = ("Proverbs", "Mark", "Romans")


@dataclass(frozen=True)
class TextSpec:
    """What a model must know about a text.

    Attributes:
        name: what users type after ``--dataset``.
        task: ``"language"``: the next token at every step; ``"classification"``: one label a document.
        length: tokens of a window or of a document.
        vocab_size: before loading the default size of the vocabulary by words (None: all that occur), after
            it the number of tokens.
        num_classes: labels, or tokens of a language model; 0 until the text has been read.
        source: one line for listings.
    """

    name: str
    task: str
    length: int
    vocab_size: int | None
    num_classes: int = 0
    source: str = ""

    def label(self, book: str) -> int:
        """The label of a verse of ``book``; 0 for language models.

        Raises:
            DataError: a book that is not known.
        """
        if self.task == "language":
            return 0
        books = _SMALL if self.name.startswith("kjv-small") else BOOKS
        if book not in books:
            raise DataError(
                f"Unknown book {book!r}.{nearest(book, books)} {self.name!r} tells apart {', '.join(books)}."
            )
        place = books.index(book)
        return int(place >= _OLD) if self.name.endswith("testament") else place


TEXTS = {
    spec.name: spec
    for spec in (
        TextSpec(
            "kjv-small",
            "language",
            64,
            None,
            source="Proverbs, Mark and Romans, which ship with this package",
        ),
        TextSpec("kjv-small-books", "classification", 32, None, source="which of the three a verse is from"),
        TextSpec(
            "bible-kjv", "language", 64, 8_000, source="the King James Version, Debian's bible-kjv-text"
        ),
        TextSpec(
            "bible-kjv-books", "classification", 32, 8_000, source="which of its 66 books a verse is from"
        ),
        TextSpec(
            "bible-kjv-testament", "classification", 32, 8_000, source="which testament a verse is from"
        ),
        TextSpec("wikitext-2", "language", 64, None, source="Wikipedia articles (Merity et al. 2017)"),
        TextSpec("imdb", "classification", 256, 20_000, source="50,000 film reviews (Maas et al. 2011)"),
        TextSpec("text", "language", 64, None, source="your own train.txt, valid.txt and test.txt"),
    )
}
"""The texts by name."""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def is_text(name: str) -> bool:
    """Whether ``--dataset name`` means a text."""
    return _plain(name) in TEXTS


def text_name(name: str) -> TextSpec:
    """The entry that ``name`` means; ``_`` and ``-`` are alike.

    Raises:
        ConfigError: there is none.
    """
    if not is_text(name):
        near = nearest(_plain(name), TEXTS)
        raise ConfigError(f"Unknown text {name!r}.{near} Texts: {', '.join(TEXTS)}.")
    return TEXTS[_plain(name)]
