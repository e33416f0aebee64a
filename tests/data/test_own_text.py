"""Invariants of --data=FILE and --data=FOLDER: long texts are read in parts and held out at their ends, every
mistake is one sentence, and no text is taken for something else than what it is."""

import gzip
import json
import os
import re
import string
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import train_tiny
from data import tinystories, tokenizer
from data.corpus import open_corpus
from data.tinystories import EOT, load
from report import metrics
from tests.data.test_tinystories import FIFTY, files_under, joined, read_stories, texts_of
from tests.data.test_tokenizer import byte_level, gpt2, space_first  # noqa: F401  (a fixture)
from training import cli

ROOT = Path(__file__).parents[2]
SPELLED = ["a<s>b</s>c", "<s>", "</s> x", "x [MASK] y", "<|im_start|>user", f"one{EOT}two", "<unk>",
           "<think>"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return name


def prose(words: int, seed: int = 0) -> str:
    """A long text with paragraphs, punctuation, digits and letters of several scripts."""
    rng = np.random.default_rng(seed)
    vocabulary = ["the", "a", "dog", "king's", "day,", "loved.", "1234", "né", "日本語の物語。", "e\u0301",
                  "\n", "\n\n", "  ", "\t", "end.\n", "(so)", "x_y", "\u3000", "don't", "!?", "«it»", "🦔"]
    return " ".join(rng.choice(vocabulary, words)).strip()


def vocabularies() -> dict:
    """One tokenizer of each kind; for the last ones a text begins with a space."""
    first = tokenizer.HubTokenizer(space_first(Path(".")), 1)
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *letter_scores()]
    metaspace = Tokenizer(models.Unigram(scores, unk_id=0))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.decoder = decoders.Metaspace()
    metaspace.add_special_tokens(["<unk>", "<s>", "</s>"])
    return {
        "bpe": tokenizer.train_bpe([prose(2000, seed=9)], 400),
        "words": tokenizer.word_level([" the", " dog"]),
        "byte level": tokenizer.HubTokenizer(byte_level(), 0),
        "SentencePiece": first,
        "Unigram": tokenizer.HubTokenizer(metaspace, 2),
    }


def letter_scores() -> list[tuple[str, float]]:
    letters = sorted({*prose(500), *"".join(SPELLED), *string.ascii_letters} - {" "})
    return [("\u2581", -2.0), ("\u2581the", -4.0), *((letter, -3.0) for letter in letters)]


# 1. long texts ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bpe", "words", "gpt2", "byte level", "SentencePiece", "Unigram"])
def test_a_text_read_in_parts_has_the_ids_of_the_whole_text(kind, monkeypatch, request):
    tok = request.getfixturevalue("gpt2") if kind == "gpt2" else vocabularies()[kind]
    texts = [prose(3000, seed) for seed in range(3)]
    path = write("mine.txt", joined(texts))
    monkeypatch.setattr(tinystories, "CHUNK", 1000)
    monkeypatch.setattr(tinystories, "PART", 300)
    parts = list(tinystories.Stories([Path(path)]))
    assert len(parts) > 90 and read_stories(path) == texts
    corpus = load(path, write("held.txt", "held out"), 300, "out", tok)
    expected = [tok.eot]
    for text in texts:
        expected += [*tok.encode(text), tok.eot]
    assert corpus.train.tolist() == expected


def test_text_without_white_space_is_cut_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(tinystories, "PART", 50)
    monkeypatch.setattr(tinystories, "CHUNK", 70)
    texts = ["今日は良い天気" * 40, "x" * 999, "=" * 777 + "\n", "1" * 51]
    texts.append(" a" + " " * 500 + "b " + "\n" * 400 + "c")
    path = write("mine.txt", EOT.join(texts))
    assert read_stories(path) == [text.strip() for text in texts]
    for tok in vocabularies().values():
        if isinstance(tok, tokenizer.HubTokenizer) and tok.tok.id_to_token(0) == "<unk>" and tok.eot == 2:
            continue                                    # it has no token for unknown characters
        corpus = load(path, write("held.txt", "held out"), 300, "out", tok)
        stream = corpus.train.tolist()
        begins = [*corpus.starts.tolist(), len(stream) - 1]
        for text, begin, end in zip(texts, begins, begins[1:]):
            assert tok.decode(stream[begin + 1:end]) == text.strip()


def test_chunks_and_separators_at_the_ends_of_parts_do_not_matter(monkeypatch):
    texts = [prose(40), "short", prose(90, 1), "日本語" * 30]
    path = write("mine.txt", "\n" + f"{EOT}\n \n{EOT}".join(texts))
    for part in (20, 33):
        monkeypatch.setattr(tinystories, "PART", part)
        found = []
        for chunk in (1, 2, 7, 64, 1 << 18):
            monkeypatch.setattr(tinystories, "CHUNK", chunk)
            found.append(list(tinystories.Stories([Path(path)])))
            assert read_stories(path) == texts
        assert all(parts == found[0] for parts in found)


def test_the_ends_of_few_long_texts_are_held_out(monkeypatch):
    plays = [prose(9000, 1), prose(6000, 2)]
    for part in (1 << 16, 1000):
        monkeypatch.setattr(tinystories, "PART", part)
        corpus = load(write("two.txt", joined(plays)), None, 300, f"out{part}")
        train = texts_of(corpus.train, corpus.tokenizer)
        held = texts_of(corpus.val, corpus.tokenizer)
        assert len(train) == len(held) == 2
        for play, head, end in zip(plays, train, held):
            assert head.split() + end.split() == play.split()
            assert play.startswith(head) and play.endswith(end)
            assert 0.04 * len(play) < len(end) < 0.06 * len(play)
    assert len(corpus.val) > 2 * 256


@pytest.mark.parametrize(("sizes", "held"), [
    ([3000] * 3, "ends"), ([40, 9000, 9000], "ends"), ([9000] + [40] * 50, "ends"),
    ([3000] * 24, "stories"), ([40] * 3, "stories"), ([40] * 50, "stories"), ([3000] * 15, "stories")])
def test_what_is_held_out_is_a_small_part_where_texts_are_long(sizes, held):
    texts = [f"{n} " + prose(size, n) for n, size in enumerate(sizes)]
    corpus = load(write("mine.txt", joined(texts)), None, 300, "out")
    train = texts_of(corpus.train, corpus.tokenizer)
    found = texts_of(corpus.val, corpus.tokenizer)
    if held == "stories":
        assert found == texts[::20]
        assert train == [text for n, text in enumerate(texts) if n % 20]
    else:
        long = [text for text in texts if len(text) >= tinystories.LONG_TEXT]
        assert all(text.endswith(end) for text, end in zip(long, found, strict=True))
        assert len(train) == len(texts)
        assert 0.02 < sum(map(len, found)) / sum(map(len, texts)) < 0.2


def test_the_end_of_a_long_text_without_white_space_is_held_out():
    text = "今日は良い天気です。" * 900
    corpus = load(write("mine.txt", text), None, 300, "out")
    (train,), (held,) = (texts_of(stream, corpus.tokenizer) for stream in (corpus.train, corpus.val))
    assert train + held == text and len(held) == tinystories.HELD_CHARS


def test_a_held_out_text_of_several_parts_is_not_trained_on(monkeypatch):
    monkeypatch.setattr(tinystories, "PART", 200)
    long = prose(400)
    for val in (None, write("held.txt", long)):
        texts = [long, *FIFTY[:30], long, *FIFTY[30:], long + " more"]
        corpus = load(write("mine.txt", joined(texts)), val, 300, "out")
        train = texts_of(corpus.train, corpus.tokenizer)
        assert long not in train and long in texts_of(corpus.val, corpus.tokenizer)
        assert long + " more" in train


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Reading and tokenizing 24 MB takes at most 4 times the bytes of its ids, as one text or as many."""
    code = ("import resource, sys; from data import tinystories, tokenizer\n"
            "tok = tokenizer.word_level([' cat', ' the'])\n"
            "load = lambda name: tinystories.load(name, None, 300, sys.argv[1], tok).train.nbytes\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
            "before = peak(); ids = load(sys.argv[2]); print(ids, peak() - before)")
    sentence = "the cat saw the other cat, and ran to the big house in the wood; "
    for separator in ("", EOT):
        stories = [f"{n} {sentence * 20}" for n in range(24_000_000 // (20 * len(sentence)))]
        write("big.txt", separator.join(stories))
        command = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "big.txt")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        id_bytes, growth = map(int, done.stdout.split())
        assert id_bytes > 20_000_000 and growth < 4 * id_bytes, f"{growth:,} bytes for {id_bytes:,} of ids"


def test_a_run_on_a_book_and_then_from_its_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "matmul_rate", lambda _: 1.0)
    write("play.txt", prose(6000))
    small = ["--data=play.txt", "--vocab=300", "--layers=1", "--width=64", "--length=48", "--batch=2",
             "--pretrain_batch=2", "--pretrain_steps=1", "--warm_steps=1", "--distill_steps=2",
             "--device=cpu"]
    for flags in (["--out=book"], ["--init=book/ar", "--out=converted"]):
        if "--init=book/ar" in flags:
            small = [flag for flag in small if not flag.startswith(("--layers", "--width", "--vocab"))]
        assert cli.run(train_tiny.main, [*small, *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        said = [line for line in lines if "windows start anywhere" in line]
        assert len(said) == 1
        assert re.fullmatch(r"play\.txt: 1 text of 1\d,\d{3} tokens: windows start anywhere in it", said[0])
        numbers = json.loads(Path(flags[-1].removeprefix("--out="), "summary.json").read_text())
        assert 0 < numbers["after"]["val_nats"] < 12
    held = open_corpus("play.txt", None, 300)
    pieces = metrics.held_out(held.val, tinystories.stories(held.val, held.tokenizer.eot), 128, 48)
    assert len(pieces) > 5, "the held-out end is evaluated in pieces, not only its first window"


# 2. runs of one character, spellings of special tokens ------------------------------------------------
@pytest.mark.parametrize("run", [" ", "\n", "\t", "\u3000", " \n", "x", "7", "=", "今"])
def test_a_run_of_a_million_characters_is_encoded(run):
    text = "Start" + (run * 10**6)[:10**6] + "end."
    write("held.txt", "held out")
    corpus = load(write("runs.txt", joined([*FIFTY[:10], text, *FIFTY[10:40]])), "held.txt", 300, "out")
    assert texts_of(corpus.train, corpus.tokenizer)[10] == text
    for tok in (corpus.tokenizer, tokenizer.word_level([" cat"])):
        assert tok.decode(tok.encode(text)) == text
        assert tok.encode_batch([text, "cat"]) == [tok.encode(text), tok.encode("cat")]


def test_blanks_do_not_count_in_what_is_held_out():
    texts = [*FIFTY[:10], "Start" + " " * 1_000_000 + "end.", *FIFTY[10:]]
    corpus = load(write("blanks.txt", joined(texts)), None, 300, "out")
    assert texts_of(corpus.val, corpus.tokenizer) == texts[::20]


def test_a_vocabulary_is_learned_from_a_million_blanks():
    tok = tokenizer.train_bpe(["a" + " " * 1_000_000 + "b"], 300)
    assert tok.decode(tok.encode("a  b")) == "a  b"


@pytest.mark.parametrize("kind", ["bpe", "words", "gpt2", "byte level", "SentencePiece", "Unigram"])
def test_the_spelling_of_a_special_token_is_text(kind, request):
    if kind == "gpt2":
        tok = request.getfixturevalue("gpt2")
    elif kind == "byte level":
        hub = byte_level()
        hub.add_special_tokens(["[MASK]", "<|im_start|>"])
        hub.add_tokens([EOT])                           # not marked as special, but used as the end of a text
        tok = tokenizer.HubTokenizer(hub, hub.token_to_id(EOT))
    else:
        tok = vocabularies()[kind]
    special = {tok.eot} | getattr(tok, "special", set())
    for text in SPELLED:
        if kind == "Unigram" and text == "<unk>":
            continue                                    # this token also stands for unknown characters
        ids = tok.encode(text)
        assert special.isdisjoint(ids), f"{text!r} became {ids}"
        assert tok.decode(ids) == text
        assert tok.encode_batch([text, "a"]) == [ids, tok.encode("a")]


def test_only_end_of_text_separates_texts():
    texts = [f"{n} says <s> and </s> and [MASK] and <|im_start|> and <|eot_id|>." for n in range(30)]
    corpus = load(write("mine.txt", joined(texts)), None, 300, "out", tokenizer.HubTokenizer(byte_level(), 1))
    assert texts_of(corpus.train, corpus.tokenizer) == [text for n, text in enumerate(texts) if n % 20]


# 3. names ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["toy.txt", "./toy", "tinystories.txt", "tinystories-full.txt", "toy/"])
def test_a_file_is_not_taken_for_a_corpus_of_its_name(name, capsys):
    write(f"{name}part.txt" if name.endswith("/") else name, joined(FIFTY))
    corpus = open_corpus(name, None, 300)
    assert texts_of(corpus.val, corpus.tokenizer) == FIFTY[::20]
    assert corpus.name not in ("toy", "tinystories", "tinystories-full")
    config = train_tiny.resolve_options(train_tiny.Config(data=name, out="out/run"), corpus)
    assert config.length == train_tiny.SIZES["text"]["length"]
    assert train_tiny.pretrain_settings(config, corpus)["data"] == name


def test_toy_is_the_story_world_even_beside_a_file_of_that_name():
    write("toy", joined(FIFTY))
    corpus = open_corpus("toy", None, 300)
    assert corpus.name == "toy" and len(corpus.starts) == 30_000
    config = train_tiny.resolve_options(train_tiny.Config(data="toy"), corpus)
    assert train_tiny.pretrain_settings(config, corpus)["data"] == "toy"
    assert config.length == train_tiny.SIZES["toy"]["length"]


def test_a_home_folder_and_a_very_long_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("mine.txt", joined(FIFTY))
    write("held.txt", "held out")
    corpus = open_corpus("~/mine.txt", "~/held.txt", 300)
    assert texts_of(corpus.val, corpus.tokenizer) == ["held out"]
    long = write("n" * 240 + ".txt", joined(FIFTY))
    assert texts_of(load(long, None, 300, "out").val, corpus.tokenizer) == FIFTY[::20]


# 4. folders -------------------------------------------------------------------------------------------
def test_a_folder_is_its_txt_files_in_the_order_of_their_names():
    write("books/b.txt", joined(FIFTY[2:30]))
    first = joined(FIFTY[:2]) + f"\n{EOT}\n"
    write("books/a.txt", b"\xef\xbb\xbf" + first.replace("\n", "\r\n").encode())
    write("books/c.TXT", joined(FIFTY[30:]))
    write("books/empty.txt", "")
    write("books/notes.md", "no text")
    write("books/._b.txt", b"\0\xff")
    write("books/deeper/d.txt", "not in the folder itself")
    one = load(write("one.txt", joined(FIFTY)), None, 300, "out")
    for name in ("books", "books/", "./books"):
        corpus = load(name, None, 300, "out")
        assert corpus.name == "books"
        assert np.array_equal(corpus.train, one.train) and np.array_equal(corpus.val, one.val)
    os.chdir("books")
    assert load(".", None, 300, "../out").name == "books"


def test_a_folder_of_books_has_one_text_per_file():
    books = [prose(9000, n) for n in range(3)]
    for n, book in enumerate(books):
        write(f"books/{n}.txt", book)
    corpus = load("books", None, 300, "out")
    assert len(corpus.starts) == 3
    held = texts_of(corpus.val, corpus.tokenizer)
    assert all(book.endswith(end) for book, end in zip(books, held, strict=True))


def test_held_out_files_in_the_folder_are_not_trained_on():
    write("books/train.txt", joined(FIFTY[:20]))
    write("books/val.txt", joined(FIFTY[20:]))
    corpus = load("books", "books/val.txt", 300, "out")
    assert texts_of(corpus.train, corpus.tokenizer) == FIFTY[:20]
    write("more/v.txt", joined(FIFTY[:5]))
    other = load("books", "more", 300, "out")
    assert texts_of(other.val, other.tokenizer) == FIFTY[:5]
    assert texts_of(other.train, other.tokenizer) == FIFTY[5:]


def test_the_files_of_a_folder_are_part_of_what_a_corpus_is():
    write("books/a.txt", joined(FIFTY[:30]))
    load("books", None, 300, "out")
    write("books/b.txt", joined(FIFTY[30:]))
    assert len(load("books", None, 300, "out").starts) == 47


# 5. mistakes ------------------------------------------------------------------------------------------
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ZIP = "text.zip"


def mistakes() -> dict:
    """What is given as --data, and the sentence."""
    with zipfile.ZipFile(ZIP, "w") as archive:
        archive.writestr("a.txt", "text")
    records = "\n".join(json.dumps({"text": story}) for story in FIFTY)
    os.mkdir("none")
    os.mkfifo("pipe")
    write("lfs/a.txt", "one")
    write("lfs/b.txt", LFS)
    write("broken/a.txt", joined(FIFTY))
    write("broken/b.txt", b"ok \xff")
    write("blank/a.txt", f" {EOT}\n")
    return {
        "none": r"none is a folder without \*\.txt files: expected a UTF-8 text file",
        "pipe": "pipe is a pipe or a device, .* write it to a file first",
        "/dev/null": "/dev/null is a pipe or a device",
        write("lfs.txt", LFS): r"lfs\.txt is a Git LFS pointer, not the text itself: run `git lfs pull`",
        "lfs": r"lfs/b\.txt is a Git LFS pointer",
        "broken": r"broken/b\.txt is not UTF-8 at byte 3 \(0xff\): save it as UTF-8",
        "blank": "blank.* has no stories: expected text",
        write("t.txt.gz", gzip.compress(b"text")): "gz is a gzip file: expected UTF-8 text .*; extract",
        write("gz.txt", gzip.compress(b"text")): r"gz\.txt is a gzip file",
        ZIP: r"text\.zip is a zip file",
        write("t.parquet", b"PAR1\0\0"): "t.parquet is a Parquet file",
        write("t.jsonl", records): r"t\.jsonl is a JSON file: expected UTF-8 text",
        write("t.json", f"[{records}]"): r"t\.json is a JSON file",
        write("nul.txt", b"text \0 text"): r"nul\.txt has a NUL at byte 5, so it is not text: save",
        write("utf16.txt", "\ufeffText".encode("utf-16-le")): r"utf16\.txt is not UTF-8 at byte 0 \(0xff\)",
        write("no_mark.txt", "Text".encode("utf-16-le")): r"no_mark\.txt has a NUL at byte 1",
        write("empty.txt", ""): r"empty\.txt has no stories: expected text, with <\|endoftext",
        write("mark.txt", b"\xef\xbb\xbf"): r"mark\.txt has no stories",
        write("only.txt", f"{EOT}\n{EOT}"): r"only\.txt has no stories",
        "~/no.txt": r"~/no\.txt does not exist: expected a UTF-8 text file, a folder of",
    }


def test_every_mistake_is_one_sentence_and_leaves_nothing():
    for given, sentence in mistakes().items():
        for data, val in ((given, None), (write("good.txt", joined(FIFTY)), given)):
            with pytest.raises(ValueError, match=sentence) as caught:
                load(data, val, 300, "out")
            assert "\n" not in str(caught.value)
    assert not files_under(Path("out"))


def test_a_folder_that_cannot_be_written_is_named():
    write("file", "in the way")
    sentence = "tokenized into the folder file/data, which cannot be made .*start from"
    with pytest.raises(ValueError, match=sentence):
        load(write("mine.txt", joined(FIFTY)), None, 300, "file/data")
