"""Wrong answers that people give, per lesson: (name, old text, new text, what the refusal has to say).

Each is made from the reference solution by one replacement. The last element stands in what the check prints.
"""

# Lesson 1: masks and the bound --------------------------------------------------------------------

LESSON_1 = [
    ("n can be 0", "n = 1 + (u[:, 0, 0] * R).long()", "n = (u[:, 0, 0] * R).long()",
     "which values can n take"),
    ("argsort is taken for the rank", "argsort(-1).argsort(-1)", "argsort(-1)", "inverse permutation"),
    ("the loss counts visible positions", "(nats * masked).sum(-1) / t", "nats.sum(-1) / t",
     "only for what it cannot see"),
    ("1/t forgotten", "(nats * masked).sum(-1) / t", "(nats * masked).sum(-1)", "costs less than one"),
    ("mean instead of sum", "(nats * masked).sum(-1) / t", "(nats * masked).sum(-1) / masked.sum(-1)",
     "loss per token"),
    ("the next token is scored", "tokens[..., None]", "tokens.roll(-1, -1)[..., None]",
     "compare with the chain rule"),
]


# Lesson 2: parallel reveals -----------------------------------------------------------------------

LESSON_2 = [
    ("tokens of the same step are visible", "(order >= step)", "(order > step)", "they sum to"),
    ("earlier steps are not visible", "(order >= step)", "(order >= 0)", "the chain rule"),
    ("0 log 0 is not a number", "terms[p > 0].sum()", "terms.sum()", "0 times log 0"),
    ("the other direction", "terms = p * (p / q).log()", "terms = q * (q / p).log()", "is the mean taken"),
]


# Lesson 3: from AR to block -----------------------------------------------------------------------

LESSON_3 = [
    ("the mask is transposed", "return torch.cat([top, bottom], 0)", "return torch.cat([top, bottom], 0).T",
     "rows are queries"),
    ("the answer is visible", "block[None, :] < noisy[:, None]", "block[None, :] <= noisy[:, None]",
     "could copy the answer"),
    ("blocks are counted from position 0", "block = (position - prompt_len) // layout.block    ",
     "block = position // layout.block", "where block 0 begins"),
    ("a masked position sees itself only", "noisy[None, :] == noisy[:, None]", "torch.eye(R).bool()",
     "both ways"),
    ("noisy blocks see earlier noisy blocks", "noisy[None, :] == noisy[:, None]",
     "noisy[None, :] <= noisy[:, None]", "noisy position 2 sees noisy position 1"),
    ("noisy blocks see later noisy blocks", "noisy[None, :] == noisy[:, None]",
     "noisy[None, :] >= noisy[:, None]", "which key lets this query see"),
    ("finished text in blocks", "(position - prompt_len) // layout.context_block",
     "(position - prompt_len) // layout.block", "layout.context_block"),
    ("the shift is dropped", "source = position - layout.logit_shift", "source = position",
     "logits at i - 1 predict"),
    ("a first slot reads the block before", "block_of_source == block_of_position,", "source >= 0,",
     "of another block"),
    ("logits of the clean text only", "block_of_source == block_of_position,", "source < 0,",
     "the sampler does not know"),
]


# Lesson 4: cache and reveal rules -----------------------------------------------------------------

LESSON_4 = [
    ("visible positions are revealed", "confident = masked & (confidence > level)",
     "confident = confidence > level", "a visible position has a confidence"),
    ("nothing above the level, nothing revealed", "return confident | fallback", "return confident",
     "wait for ever"),
    ("a visible position is the most confident", "confidence.masked_fill(~masked, -torch.inf).argmax",
     "confidence.argmax", "nothing is revealed"),
    ("the leftmost instead of the best", "confidence.masked_fill(~masked, -torch.inf).argmax",
     "masked.long().argmax", "most confident among which"),
    ("the best is revealed only once for all rows", "return confident | fallback",
     "return confident | (fallback & ~confident.any())", "each row stands for itself"),
    ("the prompt is not processed", "first = min(model.written, start - shift)", "first = start - shift",
     "an empty cache"),
    ("the position before the block is not processed", "first = min(model.written, start - shift)",
     "first = model.written", "is in the cache now"),
    ("an unfinished block counts as finished", "model.written = start", "model.written = last",
     "keys and values of which tokens"),
    ("nothing is taken from the cache", "first = min(model.written, start - shift)", "first = 0",
     "are enough"),
    ("the text is overwritten", "source = torch.arange(start, last) - shift\n",
     "source = torch.arange(start, last) - shift\n    tokens[start] = 0\n",
     "print the block after each step"),
]


# Lesson 5: likelihood -----------------------------------------------------------------------------

LESSON_5 = []


# Lesson 6: on-policy distillation -----------------------------------------------------------------

LESSON_6 = []


# Lesson 7: speculative decoding -------------------------------------------------------------------

LESSON_7 = []


# Lesson 8: schedules and policies -----------------------------------------------------------------

LESSON_8 = []


MISTAKES = {
    1: LESSON_1,
    2: LESSON_2,
    3: LESSON_3,
    4: LESSON_4,
    5: LESSON_5,
    6: LESSON_6,
    7: LESSON_7,
    8: LESSON_8,
}
