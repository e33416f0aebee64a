"""Invariants of data/tinystories.py: a stream is its stories, nothing held out is trained on, work is done
once.

A local server stands in for the Hugging Face hub, so no test uses a network.
"""

import functools
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from data import tinystories, tokenizer
from data.tinystories import EOT, NoNetwork, load, stories

REAL = Path(__file__).parents[2].parent / "shared/data/tinystories"
FIFTY = [f"Story {n} has a cat.\n\nIt ate {n % 7} fish, né? 🦔" for n in range(50)]


@pytest.fixture
def write(tmp_path):
    def to_file(content: str | bytes, name: str = "mine.txt") -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(tmp_path / name)

    return to_file


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip(f"no stories in {REAL}, and tests use no network")
    return {name: (REAL / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "valid")}


def fail_call(message: str, *_):
    pytest.fail(message)


def joined(texts: list[str]) -> str:
    return f"\n{EOT}\n".join(texts)


def texts_of(stream: np.ndarray, tok: tokenizer.Tokenizer) -> list[str]:
    """The stories, read with `stories` only."""
    starts = stories(stream, tok.eot)
    return [tok.decode(stream[a + 1:b]) for a, b in zip(starts, [*starts[1:], len(stream) - 1], strict=True)]


def read_stories(*paths: str) -> list[str]:
    """The stories of some files, each joined from its parts."""
    found = []
    for part in tinystories.Stories([Path(path) for path in paths]):
        if part.is_first:
            found.append("")
        assert part.text and part.story == len(found) - 1
        found[-1] += part.text
    return found


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# 1. streams -------------------------------------------------------------------------------------------
def test_a_stream_is_its_stories_each_after_an_end_of_text(write, out):
    corpus = load(write(joined(FIFTY)), None, 300, out)
    eot = corpus.tokenizer.eot
    for stream in (corpus.train, corpus.val):
        assert stream.dtype == np.uint16 and stream.ndim == 1 and not stream.flags.writeable
        assert stream[0] == stream[-1] == eot
        assert not np.any((stream[1:] == eot) & (stream[:-1] == eot)), "there is an empty story"
    assert texts_of(corpus.val, corpus.tokenizer) == FIFTY[::20]
    assert texts_of(corpus.train, corpus.tokenizer) == [text for n, text in enumerate(FIFTY) if n % 20]
    assert corpus.name == "mine" and corpus.tokenizer.vocab_size == 300


def test_starts_of_stories_by_hand():
    stream = np.array([9, 1, 2, 9, 3, 9, 4, 4, 9])
    assert stories(stream, 9).tolist() == [0, 3, 5]
    long = np.zeros((1 << 24) + 10, dtype=np.uint16)    # longer than the part compared at a time
    long[[0, 5, 1 << 24, -1]] = 9
    assert stories(long, 9).tolist() == [0, 5, 1 << 24]


def test_every_real_story_decodes_to_itself(real, write, out):
    expected = [text.strip() for text in real["valid"].split(EOT) if text.strip()]
    corpus = load(write(real["train"][:2_000_000]), str(REAL / "valid.txt"), 2048, out)
    assert texts_of(corpus.val, corpus.tokenizer) == expected
    n_bytes = sum(len(text.encode("utf-8")) for text in expected)
    n_tokens = len(corpus.val) - len(expected) - 1
    assert corpus.tokenizer.vocab_size == 2048
    assert n_bytes / n_tokens >= 3, f"{n_bytes / n_tokens:.2f} bytes per token"
    assert not set(expected) & set(texts_of(corpus.train, corpus.tokenizer))


def test_ids_that_do_not_fit_16_bits_get_32(write, out, monkeypatch):
    words = [f"w{n}" for n in range((1 << 16) - 256)]    # with the bytes and the end of text: one id too many
    path = write(joined([f"{words[-1]} now", "one", "two"]))
    wide = load(path, None, 300, out, tokenizer.word_level(words))
    narrow = load(path, None, 300, out, tokenizer.word_level(words[1:]))
    size = 1 << 16
    assert (wide.tokenizer.vocab_size, wide.train.dtype, wide.val[0]) == (size + 1, np.uint32, size)
    assert (narrow.tokenizer.vocab_size, narrow.train.dtype, narrow.val[0]) == (size, np.uint16, size - 1)
    assert texts_of(wide.val, wide.tokenizer) == [f"{words[-1]} now"]
    assert texts_of(narrow.val, narrow.tokenizer) == [f"{words[-1]} now"]


# 2. held-out stories ----------------------------------------------------------------------------------
def test_no_held_out_story_is_trained_on_even_if_it_is_repeated(write, out):
    for val in (None, write(joined(["not in it", FIFTY[3]]), "held.txt")):
        corpus = load(write(joined(FIFTY + FIFTY[:3] + FIFTY[:30])), val, 300, out)
        train, held = (texts_of(stream, corpus.tokenizer) for stream in (corpus.train, corpus.val))
        assert held and train and not set(train) & set(held)
        assert set(train) | set(held) >= set(FIFTY)
    assert held == ["not in it", FIFTY[3]]


def test_the_vocabulary_is_learned_without_the_held_out_stories(write, out, monkeypatch):
    seen = []
    train_bpe = tinystories.train_bpe

    def spy(texts, size):
        seen.extend(texts)
        return train_bpe(seen, size)

    monkeypatch.setattr(tinystories, "train_bpe", spy)
    load(write(joined(FIFTY)), None, 300, out)
    assert seen == [text for n, text in enumerate(FIFTY) if n % 20]


def test_the_vocabulary_is_learned_from_a_bounded_part():
    assert list(tinystories.take_chars(["aaa", "bb", "c", "d"], 5)) == ["aaa", "bb"]
    assert list(tinystories.take_chars(["aaa", "bb", "c"], 4)) == ["aaa", "bb"]
    assert list(tinystories.take_chars(["aaa"], 100)) == ["aaa"]


def test_at_least_one_story_is_held_out(write, out):
    for n in (2, 3, 19, 20):
        corpus = load(write(joined(FIFTY[:n])), None, 300, out)
        sizes = [len(stories(stream, corpus.tokenizer.eot)) for stream in (corpus.train, corpus.val)]
        assert sizes == [n - 1, 1]


@pytest.mark.parametrize("text", [
    "one two", "a b", "word " * 1000 + "end", "line\n" * 50, "x\ty " * 99, "a\tb"])
def test_the_end_of_a_single_text_is_held_out(write, out, text):
    for content in (text, f"{EOT}\n{text}{EOT}"):
        corpus = load(write(content), None, 300, out)
        (train,), (held,) = (texts_of(stream, corpus.tokenizer) for stream in (corpus.train, corpus.val))
        assert train.split() + held.split() == text.split(), "a word was lost or cut in two"
        assert len(held) <= max(0.07 * len(text), 5)


def test_a_single_text_with_a_held_out_file_is_not_split(write, out):
    corpus = load(write("one two"), write("three", "held.txt"), 300, out)
    assert texts_of(corpus.train, corpus.tokenizer) == ["one two"]
    assert texts_of(corpus.val, corpus.tokenizer) == ["three"]


# 3. reading -------------------------------------------------------------------------------------------
def test_chunks_do_not_matter(write, out, monkeypatch):
    without_end = read_stories(write(f"a{EOT}b"))
    with_end = read_stories(write(f"a{EOT}b{EOT}"))
    assert without_end == with_end
    expected = ["né 🦔\nü", "a", "<|endof", "text|>", "日本"]
    path = write(b"\xef\xbb\xbf" + joined(expected).replace("\n", "\r\n").encode("utf-8"))
    for size in (*range(1, 20), 1 << 22):    # cuts characters, line ends, separators and the byte order mark
        monkeypatch.setattr(tinystories, "CHUNK", size)
        assert read_stories(path) == expected


def test_chunks_do_not_matter_to_the_stream(write, out, monkeypatch):
    path = write(joined(FIFTY))
    load(path, None, 300, out / "whole")
    monkeypatch.setattr(tinystories, "CHUNK", 100)    # a few stories
    load(path, None, 300, out / "parts")
    assert files_under(out / "whole") == files_under(out / "parts")


def test_line_ends_and_white_space_around_a_story_do_not_matter(write, out):
    unix = load(write(joined(FIFTY)), None, 300, out)
    text = f"\n{EOT} \n\n" + f"  \n\n{EOT}{EOT}\t\n".join(FIFTY) + EOT
    dos = load(write(text.replace("\n", "\r\n"), "dos.txt"), None, 300, out)
    assert np.array_equal(unix.train, dos.train) and np.array_equal(unix.val, dos.val)


@pytest.mark.parametrize(("content", "at", "value"), [
    (b"abc\xff def", 3, "ff"), (b"ok \xc3\xa9 " * 9 + b"\xe9t\xe9", 54, "e9"),
    ("été".encode("utf-16"), 0, "ff"), (b"cut off \xf0\x9f", 8, "f0"), (b"\xef\xbb\xbfmark\xfe", 7, "fe")])
@pytest.mark.parametrize("chunk", [1, 4, 1 << 22])
def test_the_first_byte_that_is_not_utf8_is_named(write, out, monkeypatch, content, at, value, chunk):
    monkeypatch.setattr(tinystories, "CHUNK", chunk)
    message = rf"mine\.txt is not UTF-8 at byte {at} \(0x{value}\): save it as UTF-8"
    with pytest.raises(ValueError, match=message):
        load(write(content), None, 300, out)
    assert not files_under(out)


def test_errors_say_what_to_do(write, out, tmp_path):
    good = write(joined(FIFTY))
    (tmp_path / "empty").mkdir()
    cases = [
        (lambda: load(str(tmp_path / "no.txt"), None, 300, out),
         r"no\.txt does not exist: expected a UTF-8 text"),
        (lambda: load("tinystory", None, 300, out), r"one of toy, tinystories, tinystories-full"),
        (lambda: load(str(tmp_path / "empty"), None, 300, out),
         r"empty is a folder without \*\.txt files: expected a UTF-8 text file"),
        (lambda: load(good, str(tmp_path / "val.txt"), 300, out), r"val\.txt does not exist"),
        (lambda: load(write("", "e.txt"), None, 300, out),
         r"e\.txt has no stories: expected text, with <\|endoftext"),
        (lambda: load(write(f" {EOT}\n{EOT}", "s.txt"), None, 300, out), r"s\.txt has no stories"),
        (lambda: load(good, write("\n", "v.txt"), 300, out), r"v\.txt has no stories"),
        (lambda: load(good, good, 300, out), r"mine\.txt has no story left to train on.*other stories"),
        (lambda: load(write(joined(["a"] * 5), "r.txt"), None, 300, out),
         r"r\.txt has no story left to train on"),
        (lambda: load(write("word", "w.txt"), None, 300, out),
         r"w\.txt is too short to hold a part.*give it stories"),
        (lambda: load(good, None, 256, out), r"a vocabulary of 256 ids is too small"),
    ]
    for call, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as caught:
            call()
        assert not isinstance(caught.value, NoNetwork) and "\n" not in str(caught.value)
    assert not out.exists() or not os.listdir(out), "a refused text left files"


# 4. once, and completely or not at all ----------------------------------------------------------------
def test_the_same_text_gives_the_same_bytes(write, out):
    path = write(joined(FIFTY))
    for folder in ("one", "two"):
        load(path, None, 300, out / folder)
    assert files_under(out / "one") == files_under(out / "two")
    names = sorted(Path(name).name for name in files_under(out / "one"))
    assert names == ["bpe.json", "train.bin", "val.bin"]


def test_a_second_load_trains_and_tokenizes_nothing(write, out, monkeypatch):
    path = write(joined(FIFTY))
    before = load(path, None, 300, out)
    for worker in ("train_bpe", "write_stream"):
        fail = functools.partial(fail_call, f"{worker} was called again")
        monkeypatch.setattr(tinystories, worker, fail)
    again = load(path, None, 300, out)
    assert np.array_equal(before.train, again.train) and np.array_equal(before.val, again.val)


def test_a_given_tokenizer_is_used_unchanged(write, out, monkeypatch):
    monkeypatch.setattr(tinystories, "train_bpe", lambda *_: pytest.fail("a BPE was trained"))
    given = tokenizer.word_level(["Story", " has", " cat"])
    corpus = load(write(joined(FIFTY)), None, 300, out, given)
    assert corpus.tokenizer.to_json() == given.to_json()
    assert texts_of(corpus.val, given) == FIFTY[::20]


def test_other_text_or_vocabulary_is_another_corpus(write, out, monkeypatch):
    monkeypatch.setattr(tinystories, "CHUNK", 50)    # the texts differ at their ends
    own = joined(FIFTY)
    held = write("held out", "held.txt")    # the third and fifth corpus are the same bytes, split differently
    one, two = (tokenizer.word_level([word]) for word in ("Story", " has"))
    calls = [(own + "!", None, 300, None), (own + "?", None, 300, None), (own + "held out", None, 300, None),
             (own, None, 300, None), (own, held, 300, None), (own, None, 301, None),
             (own, None, 300, one), (own, None, 300, two)]
    for n, (text, val, size, given) in enumerate(calls, start=1):
        load(write(text), val, size, out, given)
        assert len(os.listdir(out)) == n


@pytest.mark.parametrize("step", ["tinystories.write_stream", "Path.rename"])
def test_a_failure_in_the_middle_leaves_nothing(write, out, monkeypatch, step):
    path = write(joined(FIFTY))

    def fail(*_):
        raise OSError("disk full")

    owner, function = step.split(".")
    monkeypatch.setattr({"tinystories": tinystories, "Path": Path}[owner], function, fail)
    with pytest.raises(OSError, match="disk full"):
        load(path, None, 300, out)
    assert os.listdir(out) == []


def test_a_load_after_a_killed_one_is_complete(write, out):
    path = write(joined(FIFTY))
    killed = ("import os, sys; from data import tinystories as t; w = t.write_stream\n"
              "t.write_stream = lambda p, *a: os._exit(9) if p.name == 'val.bin' else w(p, *a)\n"
              "t.load(sys.argv[1], None, 300, sys.argv[2])")
    command = [sys.executable, "-c", killed, path, str(out)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
    assert run.returncode == 9
    assert any(name.endswith("train.bin") for name in files_under(out)), "killed too early"
    corpus = load(path, None, 300, out)
    assert texts_of(corpus.val, corpus.tokenizer) == FIFTY[::20]
    assert len(stories(corpus.train, corpus.tokenizer.eot)) == 47


def test_two_processes_at_once_agree(write, out, monkeypatch):
    path = write(joined(FIFTY))
    load(path, None, 300, out / "alone")
    write_stream = tinystories.write_stream

    def slow(target, *rest):    # while this process writes, another one finishes
        monkeypatch.setattr(tinystories, "write_stream", write_stream)
        load(path, None, 300, out / "both")
        write_stream(target, *rest)

    monkeypatch.setattr(tinystories, "write_stream", slow)
    load(path, None, 300, out / "both")
    assert files_under(out / "alone") == files_under(out / "both") and len(os.listdir(out / "both")) == 1


# 5. the hub -------------------------------------------------------------------------------------------
class Hub(http.server.ThreadingHTTPServer):
    """Serves `files` at the hub's addresses. While `torn`, the first GET breaks off and the others fail."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.torn, self.asked = files, False, []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        pass


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):    # noqa: N802
        self.answer(b"")

    def do_GET(self):    # noqa: N802
        name = self.path.rsplit("/", 1)[1]
        if self.server.torn and ("GET", name) in self.server.asked:
            return self.send_error(503)
        content = self.server.files.get(name, b"")
        return self.answer(content[:len(content) // 2] if self.server.torn else content)

    def answer(self, body: bytes):
        folder, name = self.path.rsplit("/", 1)
        self.server.asked.append((self.command, name))
        if folder != "/datasets/roneneldan/TinyStories/resolve/main" or name not in self.server.files:
            return self.send_error(404)
        self.send_response(200)
        for key, value in {"ETag": f'"{zlib.crc32(name.encode()):040x}"', "X-Repo-Commit": "c" * 40,
                           "Content-Length": len(self.server.files[name])}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running server, which `tinystories.download` uses for the time of a test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = Hub({tinystories.VALID: joined(FIFTY).encode("utf-8"),
                  tinystories.TRAIN: joined([*FIFTY[:5], "only here", "here too"]).encode("utf-8")})
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    reach(monkeypatch, server.endpoint, tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def reach(monkeypatch, endpoint: str, tmp_path: Path):
    monkeypatch.setattr(tinystories, "download", functools.partial(
        tinystories.download, endpoint=endpoint, cache_dir=str(tmp_path / "cache")))


def test_tinystories_is_downloaded_once(hub, out, monkeypatch):
    corpus = load("tinystories", None, 300, out)
    assert corpus.name == "tinystories" and texts_of(corpus.val, corpus.tokenizer) == FIFTY[::20]
    assert hub.asked.count(("GET", tinystories.VALID)) == 1
    hub.asked.clear()
    load("tinystories", None, 300, out)
    load("tinystories", None, 301, out)
    assert hub.asked == [], "a file of the cache was requested again"


def test_tinystories_full_trains_on_one_file_and_holds_out_the_other(hub, out, write):
    corpus = load("tinystories-full", None, 300, out)
    assert texts_of(corpus.val, corpus.tokenizer) == FIFTY
    # the five other stories of the training file are held out
    assert texts_of(corpus.train, corpus.tokenizer) == ["only here", "here too"]
    own = load("tinystories-full", write("held out"), 300, out)
    assert texts_of(own.val, own.tokenizer) == ["held out"]


def test_an_interrupted_download_leaves_no_file(hub, out, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)    # the hub's pauses between its attempts
    hub.torn = True
    with pytest.raises(NoNetwork, match="cannot be downloaded"):
        load("tinystories", None, 300, out)
    assert ("GET", tinystories.VALID) in hub.asked, "nothing was transferred, so nothing was interrupted"
    assert not out.exists()
    assert not any(b"cat" in content for content in files_under(tmp_path / "cache").values())
    hub.torn = False
    corpus = load("tinystories", None, 300, out)
    assert len(stories(corpus.train, corpus.tokenizer.eot)) == 47


def test_no_network_has_an_error_of_its_own_that_says_what_to_do(out, tmp_path, monkeypatch):
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))    # it does not listen, so connections are refused
    reach(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path)
    begun = time.monotonic()
    sentence = (r"valid\.txt of .* cannot be downloaded \(.*\): connect .* "
                r"or use --data=toy or --data=FILE\.txt$")
    with pytest.raises(NoNetwork, match=sentence) as caught:
        load("tinystories", None, 300, out)
    assert isinstance(caught.value, ValueError), "a mistake of the user, as all others here"
    assert time.monotonic() - begun < 10 and "\n" not in str(caught.value) and not out.exists()
    closed.close()


def test_a_hub_that_does_not_answer_is_not_waited_for(out, tmp_path, monkeypatch):
    monkeypatch.setattr(tinystories, "HUB_SECONDS", 0.5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        reach(monkeypatch, f"http://127.0.0.1:{mute.getsockname()[1]}", tmp_path)
        begun = time.monotonic()
        with pytest.raises(NoNetwork):
            load("tinystories", None, 300, out)
    assert time.monotonic() - begun < 5


def test_a_file_that_the_hub_does_not_have_gives_an_error_of_one_line(hub, out):
    hub.files.clear()
    with pytest.raises(NoNetwork, match="--data=toy") as caught:
        load("tinystories", None, 300, out)
    assert "\n" not in str(caught.value)
