"""Invariants of data/windows.py: every token of a long text is trained on, a short text begins its window."""

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import opdlm
import train_tiny
from data.corpus import open_corpus, story_world_corpus, windows
from data.tinystories import Corpus
from data.windows import Windows

EOT = 0


def make_stream(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(stream, starts): texts of these sizes, each with its end-of-text; the other ids are all different."""
    starts = np.cumsum([0, *sizes[:-1]])
    stream = np.arange(sum(sizes) + 1, dtype=np.uint32)
    stream[starts] = EOT
    stream[-1] = EOT
    return stream, starts


def of_short_texts(stream, starts, u, length):
    """The windows as they have always been if no text is longer than one: each begins with a text."""
    num_complete = np.searchsorted(starts, len(stream) - length, "right")
    starts = starts[:max(1, num_complete)]
    rows = []
    for x in u.astype(np.float64):
        row = stream[starts[int(x * len(starts))]:][:length]
        rows.append(np.pad(row, (0, length - len(row)), constant_values=stream[0]))
    return np.stack(rows).astype(np.int64)


def random_numbers(count: int, seed: int = 0) -> np.ndarray:
    return opdlm.uniforms(seed, opdlm.DATA, range(count), (1,))[:, 0].numpy()


def test_without_a_long_text_a_window_is_what_it_was():
    rng = np.random.default_rng(0)
    u = np.concatenate([random_numbers(300), np.array([0, 1 - 2**-24], dtype=np.float32)])
    for _ in range(50):
        sizes = rng.integers(2, 21, rng.integers(1, 40)).tolist()
        stream, starts = make_stream(sizes)
        for length in (max(sizes), max(sizes) + 1, 3 * max(sizes), 1000):
            expected = of_short_texts(stream, starts, u, length)
            assert np.array_equal(windows(stream, starts, u, length), expected)


def test_the_story_world_s_batches_are_what_they_were():
    world = story_world_corpus(stories=300, held_out=2)
    rows = range(40, 340)
    u = opdlm.uniforms(3, opdlm.DATA, rows, (1,))[:, 0].numpy()
    for length in (96, 97):
        batch = train_tiny.get_batch(world, rows, length, 3, "cpu").numpy()
        assert np.array_equal(batch, of_short_texts(world.train, world.starts, u, length))


@pytest.mark.parametrize("sizes", [[1000], [40, 1000, 7, 300, 3], [300] * 9, [11] * 20 + [90], [21, 5, 5, 5]])
def test_every_token_of_a_long_text_is_sampled(sizes):
    stream, starts = make_stream(sizes)
    seen = windows(stream, starts, random_numbers(20_000), 20)
    assert set(stream.tolist()) == set(seen.flatten().tolist())


def test_a_short_text_is_read_from_its_beginning_and_a_long_one_from_anywhere():
    sizes = [40, 5, 1000, 7, 20, 300, 3]
    stream, starts = make_stream(sizes)
    begins = Windows(stream, starts, 20).begins(random_numbers(20_000))
    for start, size in zip(starts, sizes):
        inside = begins[(begins >= start) & (begins < start + size)] - start
        if size <= 20:
            assert set(inside) == {0}
        else:
            num_windows = size // 20
            share_of_beginnings = (inside == 0).mean()
            assert share_of_beginnings >= 0.8 / num_windows
            anywhere = inside[inside > 0] / size
            assert abs(anywhere.mean() - 0.5) < 0.03 and anywhere.min() < 0.03
    counts = [max(1, -(-size // 20)) for size in sizes]
    shares = [((begins >= start) & (begins < start + size)).mean() for start, size in zip(starts, sizes)]
    assert np.allclose(shares, np.array(counts) / sum(counts), atol=0.01)


def test_a_window_is_a_piece_of_the_stream():
    stream, starts = make_stream([130, 5, 77, 4])
    sampler = Windows(stream, starts, 20)
    u = random_numbers(2000)
    for begin, row in zip(sampler.begins(u), sampler(u)):
        piece = stream[begin:begin + 20]
        assert row[:len(piece)].tolist() == piece.tolist()
        assert set(row[len(piece):]) <= {EOT}
        assert len(piece) == 20 or begin in starts


def test_a_window_after_the_stream_is_filled_with_the_end_of_text():
    stream = np.array([1, 5, 6, 2, 1])                          # bos, a text, eot, bos
    assert Windows(stream, np.array([0]), 8, eot=2)(np.array([0.5])).tolist() == [[1, 5, 6, 2, 1, 2, 2, 2]]


def test_random_numbers_of_24_bits_reach_all_of_a_book():
    """With a power of two as the number of windows, the fractional parts have few different values."""
    length = 256
    stream = np.arange(length << 14, dtype=np.uint32)
    stream[-1] = EOT
    u = (np.arange(1 << 18) / (1 << 18)).astype(np.float32)
    begins = np.unique(Windows(stream, np.array([0]), length).begins(u))
    assert begins[0] == 0 and np.diff(begins).max() <= length and begins[-1] + length >= len(stream) - length


def test_a_window_depends_on_its_number_alone():
    stream, starts = make_stream([1000, 4, 300])
    u = random_numbers(64)
    together = windows(stream, starts, u, 20)
    apart = [windows(stream, starts, u[i:i + 1], 20)[0] for i in range(64)]
    assert np.array_equal(together, np.stack(apart))


def test_the_texts_are_counted_once_per_length_and_not_per_batch():
    sizes = np.full(1_000_000, 3)
    sizes[17] = 5000
    stream, _ = make_stream(sizes.tolist())
    corpus = Corpus(stream, stream[:4], type("Tok", (), {"bos": EOT, "eot": EOT}), "many")
    train_tiny.get_batch(corpus, range(2), 64, 0, "cpu")
    assert corpus.windows(64) is corpus.windows(64) and corpus.windows(65) is not corpus.windows(64)
    tracemalloc.start()
    began = time.process_time()                                 # of this process alone
    for step in range(100):
        train_tiny.get_batch(corpus, range(step, step + 4), 64, 0, "cpu")
    assert time.process_time() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_one_line_says_what_happens_to_long_texts(tmp_path):
    stream, starts = make_stream([12_345])
    line = Windows(stream, starts, 256).describe()
    assert line == "1 text of 12,345 tokens: windows start anywhere in it"
    stream, starts = make_stream([300, 5, 400])
    line = Windows(stream, starts, 256).describe()
    assert line == ("2 of 3 texts are longer than a window of 256 tokens (700 tokens): "
                    "windows start anywhere in them")
    assert Windows(*make_stream([300, 256, 5]), 300).describe() is None


def test_a_book_without_separators_is_read_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    words = "the a cat dog king queen lord night day love death speak hear come go my thy thou art is".split()
    lines = [f"L{n} " + " ".join(rng.choice(words, 8)) + "." for n in range(1500)]
    Path("play.txt").write_text("\n".join(lines))
    corpus = open_corpus("play.txt", None, 400)
    assert len(corpus.starts) == 1
    batch = train_tiny.get_batch(corpus, range(3000), 65, 0, "cpu").numpy()
    assert len({tuple(row) for row in batch.tolist()}) > 2500
    text = corpus.tokenizer.decode(batch.flatten().tolist())
    assert sum(f"L{n} " in text for n in range(1425)) > 1415
