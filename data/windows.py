"""Windows: the pieces of a token stream that are trained on, sampled with uniform random numbers.

A text counts as many windows as are needed to cover it. The first of them begins with the text; the others
begin anywhere in it. So every token of a long text is trained on; a short text is read from its beginning.
"""
import numpy as np


class Windows:
    """The windows of `length` ids of a stream. `starts` are the indices in `stream` at which texts begin.

    A text of n ids (with the token that begins it) counts ceil(n / length) windows. If no text is longer
    than a window, texts at the end of the stream, where no complete window begins, are left out. Making this
    takes time and memory in proportion to the number of texts: keep it for all batches (`Corpus.windows`).
    """

    def __init__(self, stream: np.ndarray, starts: np.ndarray, length: int, eot: int | None = None):
        self.stream = stream
        self.eot = stream[0] if eot is None else eot     # what fills a window at the end of the stream
        self.length = length
        ends = np.append(starts[1:], len(stream) - 1)
        self.sizes = ends - starts                               # ids of each text
        counts = np.maximum(1, -(-self.sizes // length))         # windows of each text
        self.has_long_text = bool(counts.max() > 1)
        if not self.has_long_text:
            num_complete = np.searchsorted(starts, len(stream) - length, "right")
            starts = starts[:max(1, num_complete)]
            counts = counts[:len(starts)]
        self.starts = starts
        self.counts = counts
        self.counts_to_here = counts.cumsum()                    # windows of a text and of all before it

    def __call__(self, u: np.ndarray) -> np.ndarray:
        """(B, length) int64: a window for each random number of `u` (B,) in [0, 1).

        A window that ends after the stream is padded with end-of-text.
        """
        rows = []
        for begin in self.begins(u):
            row = self.stream[begin:][:self.length]
            rows.append(np.pad(row, (0, self.length - len(row)), constant_values=self.eot))
        return np.stack(rows).astype(np.int64)

    def begins(self, u: np.ndarray) -> np.ndarray:
        """(B,) the index in the stream at which each window begins, a function of u alone."""
        scaled = u.astype(np.float64) * self.counts_to_here[-1]
        window = scaled.astype(np.int64)                         # (B,) one of all windows
        text = np.searchsorted(self.counts_to_here, window, "right")
        if not self.has_long_text:
            return self.starts[text]

        count = self.counts[text]
        slot = window - (self.counts_to_here[text] - count)      # (B,) one of the windows of its text
        # The windows after the first divide their text into equal parts, and each begins anywhere in its own.
        part = (slot - 1 + scaled - window) / np.maximum(1, count - 1)
        offset = (part * self.sizes[text]).astype(np.int64)
        last = np.maximum(self.starts[text], len(self.stream) - self.length)
        anywhere = np.minimum(self.starts[text] + offset, last)  # so that the window is in the stream
        return np.where(slot == 0, self.starts[text], anywhere)

    def describe(self) -> str | None:
        """What happens to texts that are longer than a window, in one line. None if there are none."""
        if not self.has_long_text:
            return None
        num_long = int((self.sizes > self.length).sum())
        num_tokens = int(self.sizes[self.sizes > self.length].sum())
        if num_long == 1:
            return f"1 text of {num_tokens:,} tokens: windows start anywhere in it"
        return (f"{num_long:,} of {len(self.sizes):,} texts are longer than a window of {self.length} tokens "
                f"({num_tokens:,} tokens): windows start anywhere in them")
