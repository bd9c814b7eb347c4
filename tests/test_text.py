"""Texts: vocabularies, corpora and their parts, and batches that depend on (seed, epoch, step) alone."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from zoo.data import text_corpora
from zoo.data.text import DocumentSplit, StreamSplit, TextBatches, load_text
from zoo.data.text_corpora import DEBIAN_BIBLE, bible, small_bible
from zoo.data.text_specs import BOOKS, TEXTS, is_text, text_name
from zoo.data.text_vocab import END, PAD, UNKNOWN, Vocabulary, tokenize
from zoo.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No test sees texts of the machine it runs on."""
    monkeypatch.setenv("TWNN_DATA_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small():
    return load_text("kjv-small")


class TestVocabulary:
    def test_tokens(self):
        text = "The LORD's name, O Lord: <unk>!"
        assert tokenize(text) == ["the", "lord's", "name", ",", "o", "lord", ":", "<unk>", "!"]
        assert tokenize(text, spaced=True) == text.split()
        assert tokenize("ab c", "char") == ["a", "b", " ", "c"]
        with pytest.raises(ConfigError, match="Did you mean 'word'"):
            tokenize("a", "words")

    def test_the_most_frequent_are_kept_and_ties_are_in_order(self):
        words = Vocabulary.build(["c", "b", "a", "b", "c", "d", "<unk>", "c"], size=6)
        assert words.tokens == (PAD, UNKNOWN, END, "c", "b", "a")
        assert words.encode(["c", "d", END]).tolist() == [3, 1, 2]
        assert words.decode([3, 1]) == ["c", UNKNOWN]

    def test_outside_the_vocabulary(self):
        words = Vocabulary.build(["heaven", "earth"])
        with pytest.raises(DataError, match=r"'heavens' \(number 2 of the text\).*Did you mean 'heaven'"):
            words.encode(["earth", "heavens"], strict=True)
        with pytest.raises(DataError, match="Number 5 is outside the vocabulary of 5"):
            words.decode([5])

    def test_nothing_to_build_from(self):
        with pytest.raises(DataError, match="empty"):
            Vocabulary.build([])
        with pytest.raises(ConfigError, match="at least 4"):
            Vocabulary.build(["a"], size=3)
        with pytest.raises(ConfigError, match="begins with"):
            Vocabulary(("a", "b", "c"))


class TestSmallBible:
    def test_it_is_three_books_entire(self):
        verses = small_bible()
        counts = {book: sum(v.book == book for v in verses) for book in ("Proverbs", "Mark", "Romans")}
        assert counts == {"Proverbs": 915, "Mark": 678, "Romans": 433} and len(verses) == 2026
        assert verses[0].text == "The proverbs of Solomon the son of David, king of Israel;"
        assert (verses[-1].chapter, verses[-1].number) == (16, 27)

    def test_parts_share_no_chapter_and_miss_no_verse(self):
        from zoo.data.text import _by_chapter

        verses = small_bible()
        parts = _by_chapter(verses)
        chapters = [{(v.book, v.chapter) for v in part} for part in parts]
        assert not (chapters[0] & chapters[1] or chapters[0] & chapters[2] or chapters[1] & chapters[2])
        assert sorted(v for part in parts for v in part) == sorted(verses)
        assert [len(c) for c in chapters] == [49, 7, 7]
        assert all({book for book, _ in c} == {"Proverbs", "Mark", "Romans"} for c in chapters)

    def test_a_language_model_reads_on_where_it_stopped(self, small):
        x, y = small.train.rows(torch.arange(len(small.train)))
        assert x.shape == y.shape == (len(small.train), 64)
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
        assert torch.equal(x.flatten(), small.train.tokens[: x.numel()])
        first = small.vocabulary.decode(x[0, :8])
        assert first == ["the", "proverbs", "of", "solomon", "the", "son", "of", "david"]
        assert END in small.vocabulary.decode(x[0])

    def test_the_vocabulary_is_that_of_the_training_part(self, small):
        assert set(range(3, len(small.vocabulary))) <= set(small.train.tokens.tolist())
        assert not (small.train.tokens == 1).any()
        assert (small.test.tokens == 1).any()  # words of the test part alone are unknown
        assert small.spec.num_classes == small.spec.vocab_size == len(small.vocabulary)

    def test_a_classifier_sees_verses_of_one_length(self):
        data = load_text("kjv-small-books", length=12)
        assert data.spec.num_classes == 3
        assert data.train.tokens.shape == (len(data.train), 12)
        assert set(data.train.labels.tolist()) == set(data.test.labels.tolist()) == {0, 1, 2}
        short = (data.train.tokens == 0).any(dim=1)
        padded = data.train.tokens[short]
        assert 0 < short.float().mean() < 0.5
        assert ((padded == 0).int().diff(dim=1) >= 0).all()  # padding comes last

    def test_one_call_is_like_another(self, small):
        again = load_text("kjv_small")
        assert all(torch.equal(again.part(p).tokens, small.part(p).tokens) for p in ("train", "val", "test"))

    def test_characters(self):
        data = load_text("kjv-small", level="char", length=100)
        assert len(data.vocabulary) < 100
        assert "".join(data.vocabulary.decode(data.train.tokens[:12])) == "The proverbs"


class TestBatches:
    def test_they_are_a_function_of_seed_epoch_and_step(self, small):
        batches = TextBatches(small.train, 16, shuffle=True, drop_last=True, seed=3)
        whole = list(batches.epoch(2))
        assert len(whole) == len(batches) == len(small.train) // 16
        for (x, y), (a, b) in zip(whole[5:], batches.epoch(2, start=5), strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)
        assert not torch.equal(whole[0][0], next(iter(batches.epoch(3)))[0])
        assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in whole)

    def test_windows_begin_elsewhere_in_each_epoch_and_never_end_too_late(self):
        split = StreamSplit(torch.arange(50), 7)
        offsets = {TextBatches(split, 2, shuffle=True).order(epoch)[1] for epoch in range(60)}
        assert offsets == set(range(split.movable())) and split.movable() == 1
        split = StreamSplit(torch.arange(54), 7)
        seen = [x for epoch in range(60) for x, _ in TextBatches(split, 2, shuffle=True).epoch(epoch)]
        assert split.movable() == 5 and int(torch.cat(seen).max()) == 52

    def test_processes_share_the_rows(self, small):
        halves = [TextBatches(small.val, 8, rank=rank, world_size=2) for rank in range(2)]
        seen = torch.cat([x for half in halves for x, _ in half])
        assert sorted(map(tuple, seen.tolist())) == sorted(
            map(tuple, torch.cat([x for x, _ in TextBatches(small.val, 8)]).tolist())
        )

    def test_documents_keep_their_labels(self):
        split = DocumentSplit(torch.arange(6)[:, None].expand(6, 4), torch.arange(6))
        for x, labels in TextBatches(split, 4, shuffle=True, seed=1).epoch(0):
            assert torch.equal(x[:, 0], labels)


VERSES = "\n".join(
    f"{book} {chapter}:{verse} {book} says {chapter} and {verse} ."
    for book in ("Ge", "Mat")
    for chapter in range(1, 11)
    for verse in range(1, 9)
)


class TestBible:
    def test_from_a_file(self, tmp_path):
        (tmp_path / "kjv.txt").write_text("# comment\n" + VERSES + "\n")
        data = load_text("bible-kjv-testament", str(tmp_path))
        assert data.spec.num_classes == 2
        assert [len(data.part(p)) for p in ("train", "val", "test")] == [128, 16, 16]
        assert data.vocabulary.decode(data.train.tokens[data.train.labels == 1][0, :2]) == ["mat", "says"]
        assert load_text("bible-kjv-books", str(tmp_path)).train.labels.unique().tolist() == [0, 39]

    @pytest.mark.parametrize(
        ("content", "said"),
        [(None, "There is no file"), ("# only a comment\n", "is empty"), ("In the beginning\n", "Line 1 of")],
    )
    def test_broken_files(self, tmp_path, content, said):
        if content is not None:
            (tmp_path / "kjv.txt").write_text(content)
        with pytest.raises(DataError, match=said):
            load_text("bible-kjv", str(tmp_path))

    def test_an_unknown_book(self, tmp_path):
        (tmp_path / "kjv.txt").write_text(VERSES.replace("Mat ", "Matt "))
        with pytest.raises(DataError, match="Did you mean 'Mat'"):
            load_text("bible-kjv-books", str(tmp_path))

    def test_debians_package_is_missing(self, monkeypatch, tmp_path):
        monkeypatch.setattr(text_corpora, "DEBIAN_BIBLE", tmp_path / "none")
        with pytest.raises(DataError, match="apt-get install bible-kjv-text"):
            load_text("bible-kjv")

    def test_debians_package_is_broken(self, monkeypatch, tmp_path):
        program = tmp_path / "bible"
        program.write_text("#!/bin/sh\necho 'Ge1:1 In the beginning'\necho 'no space left' >&2\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(text_corpora, "DEBIAN_BIBLE", program)
        with pytest.raises(DataError, match=r"gave 1 verses where .* 31,102 \(no space left\)"):
            bible(None)

    @pytest.mark.skipif(not DEBIAN_BIBLE.is_file(), reason="Debian's bible-kjv-text is not installed")
    def test_debians_package(self):
        verses = bible(None)
        assert len(verses) == 31_102
        assert tuple(dict.fromkeys(v.book for v in verses)) == BOOKS
        ours = {(v.chapter, v.number): v.text for v in small_bible() if v.book == "Mark"}
        assert {(v.chapter, v.number): v.text for v in verses if v.book == "Mark"} == ours


def write_wikitext(folder: Path) -> None:
    folder.mkdir(parents=True)
    lines = [" \n", " = Robert = \n", *(f" he was {n} , an <unk> actor . \n" for n in range(40))]
    for name in ("train", "valid", "test"):
        (folder / f"wiki.{name}.tokens").write_text("".join(lines))


class TestFiles:
    def test_wikitext(self, tmp_path):
        write_wikitext(tmp_path / "wikitext-2")
        data = load_text("wikitext-2", str(tmp_path), length=10)
        begin = data.vocabulary.decode(data.train.tokens[:8])
        assert begin == ["=", "Robert", "=", END, "he", "was", "0", ","]
        assert (data.train.tokens == 1).sum() == 40  # its own unknown token is ours

    def test_own_files(self, tmp_path):
        for name in ("train", "valid", "test"):
            (tmp_path / f"{name}.txt").write_text("To be, or not to be.\n" * 20)
        assert load_text("text", str(tmp_path), length=5).vocabulary.tokens[3:5] == ("be", "to")

    def test_a_missing_file(self, tmp_path):
        write_wikitext(tmp_path / "wikitext-2")
        (tmp_path / "wikitext-2" / "wiki.valid.tokens").unlink()
        with pytest.raises(DataError, match=r"wiki.valid.tokens.*--data-dir.*twnn-plugin\[text\]"):
            load_text("wikitext-2", str(tmp_path))

    def test_an_empty_file(self, tmp_path):
        write_wikitext(tmp_path / "w")
        (tmp_path / "w" / "wiki.test.tokens").write_text(" \n\n")
        with pytest.raises(DataError, match=r"wiki.test.tokens is empty"):
            load_text("wikitext-2", str(tmp_path / "w"))

    def test_not_a_text(self, tmp_path):
        write_wikitext(tmp_path / "w")
        (tmp_path / "w" / "wiki.test.tokens").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(DataError, match="Cannot read"):
            load_text("wikitext-2", str(tmp_path / "w"))

    def test_imdb(self, tmp_path):
        for part in ("train", "test"):
            for kind in ("pos", "neg"):
                folder = tmp_path / "aclImdb" / part / kind
                folder.mkdir(parents=True)
                for n in range(20):
                    (folder / f"{n}_7.txt").write_text(f"A {kind} film.<br /><br />Number {n}.")
        data = load_text("imdb", str(tmp_path))
        assert [len(data.part(p)) for p in ("train", "val", "test")] == [36, 4, 40]
        assert data.spec.num_classes == 2
        good = data.test.tokens[data.test.labels == 1][0]
        assert data.vocabulary.decode(good[:4]) == ["a", "pos", "film", "."]
        for file in (tmp_path / "aclImdb" / "train" / "neg").iterdir():
            file.unlink()
        with pytest.raises(DataError, match=r"no review in .*neg"):
            load_text("imdb", str(tmp_path))


class TestDownload:
    def test_without_the_library(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"pip install 'twnn-plugin\[text\]'"):
            load_text("imdb", download=True)

    def test_with_it(self, monkeypatch):
        library = types.ModuleType("datasets")
        calls = []

        def load_dataset(*args):
            calls.append(args)
            lines = {"text": ["one two three four five six"] * 9, "label": [0, 1, 1] * 3}
            return {"train": lines, "validation": lines, "test": lines}

        library.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", library)
        assert len(load_text("wikitext-2", download=True, length=6).train) == 10
        assert load_text("imdb", download=True).train.labels.bincount().tolist() == [2, 5]
        assert calls == [("Salesforce/wikitext", "wikitext-2-v1"), ("stanfordnlp/imdb", None)]

    def test_a_failure(self, monkeypatch):
        library = types.ModuleType("datasets")

        def load_dataset(*args):
            raise ConnectionError("no route\nto host")

        library.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", library)
        with pytest.raises(DataError, match=r"failed \(no route to host\)"):
            load_text("wikitext-2", download=True)

    def test_nothing_is_fetched_unasked(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match="--dataset-download"):
            load_text("imdb")


def test_names():
    assert is_text("Bible_KJV") and text_name("bible_kjv") is TEXTS["bible-kjv"]
    assert not is_text("digits")
    with pytest.raises(ConfigError, match="Did you mean 'wikitext-2'"):
        load_text("wikitext2")


def test_a_window_longer_than_the_text():
    with pytest.raises(DataError, match="shorter than a window of 20000 tokens"):
        load_text("kjv-small", length=20_000)
    with pytest.raises(ConfigError, match="at least 1 token"):
        load_text("kjv-small", length=0)
