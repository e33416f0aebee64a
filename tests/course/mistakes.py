"""Wrong answers that people give, per lesson: (name, old text, new text, what the refusal has to say).

Each is made from the solved exercise by one replacement. The last element stands in what the check prints.
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

LESSON_5 = [
    ("only the predicted position is masked", "masked_fill(slot >= j,", "masked_fill(slot == j,",
     "or to the right of it"),
    ("all slots from the fully masked block", "masked_fill(slot >= j,", "masked_fill(slot >= 0,",
     "the likelihood of another sampler"),
    ("the predicted token is visible", "masked_fill(slot >= j,", "masked_fill(slot > j,",
     "at position i, or"),
    ("only the first slot of each block is scored", "range(layout.block)", "range(1)",
     "differ in one token only"),
    ("the mean instead of the sum", "    return nats\n", "    return nats / (tokens.size(1) - 1)\n",
     "the first token is context only"),
    ("logits of the wrong position", "log_probs[:, :-1].gather(2, tokens[:, 1:, None])",
     "log_probs[:, 1:].gather(2, tokens[:, 1:, None])", "which row of the logits"),
    ("divided by all positions", "[response_mask[:, 1:]].mean()",
     "[response_mask[:, 1:]].sum() / tokens.numel()",
     "the prompt's are not generated"),
    ("the mean of the texts' means", "return -token_log_probs[response_mask[:, 1:]].mean()",
     "return -((token_log_probs * response_mask[:, 1:]).sum(1) / response_mask.sum(1)).mean()",
     "the mean of the two texts' means"),
]


# Lesson 6: on-policy distillation -----------------------------------------------------------------

LESSON_6 = [
    ("what step k reveals is already visible", "order_in_block >= k", "order_in_block > k",
     "is no state to learn from"),
    ("the finished block is a state too", "num_states = last_step + 1", "num_states = last_step + 2",
     "how many states have a mask"),
    ("mask and shown are swapped", "order_in_block >= k", "order_in_block <= k",
     "what step k itself reveals"),
    ("the number of steps of the whole row", ".amax(-1, keepdim=True)", ".amax((1, 2), keepdim=True)",
     "its own number of steps"),
    ("states after the end of the text", "order_in_block.masked_fill(~in_response, -1).amax",
     "order_in_block.amax",
     "the last state to count"),
    ("target of the next position", "teacher_logits[rows, position - 1]", "teacher_logits[rows, position]",
     "read where its network predicts it"),
    ("cross-entropy without the entropy", "(log_q - log_p)", "(-log_p)", "beside the cross-entropy"),
    ("reverse KL", "(log_q.exp() * (log_q - log_p))", "(log_p.exp() * (log_p - log_q))",
     "KL is not symmetric"),
    ("mean over all positions", "total / masked.sum(1)", "total / masked.size(1)", "and only over them"),
    ("the teacher is trained too", "    with torch.no_grad():\n", "    if True:\n", "the teacher is frozen"),
]


# Lesson 7: speculative decoding -------------------------------------------------------------------

LESSON_7 = [
    ("accepted only if p > q", "u[..., speculative.ACCEPT] * q_draft < p_draft", "p_draft > q_draft",
     "is not always rejected"),
    ("q / p instead of p / q", "u[..., speculative.ACCEPT] * q_draft < p_draft",
     "u[..., speculative.ACCEPT] * p_draft < q_draft",
     "which of p and q is the verifier's"),
    ("residual with the wrong sign", "(p_next - q_next)", "(q_next - p_next)", "writes too often"),
    ("a rejected draft is replaced from p", "(p_next - q_next)", "p_next", "often enough already"),
    ("residual not renormalised", "residual / total.clamp(min=1e-30)", "residual",
     "probabilities that sum to 1"),
    ("the most likely token of the residual",
     "given.draw(residual, u[row, num_accepted, speculative.RESAMPLE])",
     "residual.argmax(-1)", "drawn in proportion"),
    ("the number of the acceptance is used again", "num_accepted, speculative.RESAMPLE]",
     "num_accepted, speculative.ACCEPT]",
     "a random number of their own"),
    ("goes on after the first rejection", "is_accepted.long().cumprod(1).sum(1)", "is_accepted.long().sum(1)",
     "made for another text"),
    ("p of the first position", "p_next = p[row, num_accepted]", "p_next = p[row, 0]",
     "those of the position of the first rejection"),
]


# Lesson 8: schedules and policies -----------------------------------------------------------------

LESSON_8 = [
    ("the mean of all groups", "return reward - reward.mean(1, keepdim=True)",
     "return reward - reward.mean()", "over which dimension"),
    ("speed is added to quality", "quality * saved ** alpha", "quality + alpha * saved",
     "write nonsense in one step"),
    ("divided by the standard deviation", "return reward - reward.mean(1, keepdim=True)",
     "advantage = reward - reward.mean(1, keepdim=True)\n"
     "    return advantage / (advantage.std(1, correction=0, keepdim=True) + 1e-9)",
     "does not divide by the group's"),
    ("alpha is a factor", "saved ** alpha", "saved * alpha", "alpha is the power"),
    ("the share is one step short", "(length - nfe + 1) / length", "(length - nfe) / length",
     "saved all that can be saved"),
    ("the steps themselves are the speed", "saved = (length - nfe + 1) / length", "saved = 1 / nfe",
     "is its power"),
    ("not paired", "gain[picks].mean(1)", "ours[picks].mean(1) - theirs[picks.flip(0)].mean(1)",
     "the same prompts in each draw"),
    ("theirs minus ours", "gain = ours - theirs", "gain = theirs - ours", "ours minus theirs"),
    ("half an interval", "[0.025, 0.975]", "[0.25, 0.75]", "too narrow"),
    ("the spread of prompts, not of means", "gain[picks].mean(1)", "gain[picks].flatten()", "too wide"),
]


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
