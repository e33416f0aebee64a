"""OPDLM in one file: an autoregressive (AR) model becomes a block-diffusion model by on-policy distillation.

    python opdlm_pico.py        one to two minutes on one CPU core; needs only torch

An AR model of characters learns a rhyme. The student is a copy of it with another attention mask, so that it
can predict a block of K characters at once. The student writes a text. The frozen AR model, the teacher, says
what it would have written at each position, and the student learns that: on its own text, hence "on-policy".

Shapes: B rows, P prompt, R response, T = P + R positions, K characters in a block, V in the alphabet.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

K = 4                                                   # block size
P, R, B = 16, 32, 16                                    # of the training texts
CONFIDENT = 0.95                                        # more probable characters are revealed at once
PRETRAINING, WARM, STEPS = 400, 200, 1400               # updates: of the AR model, warm start, of the student
PARTS = [
    "the house that Jack built.", "the malt that lay in", "the rat that ate", "the cat that killed",
    "the dog that worried", "the cow with the crumpled horn that tossed",
    "the maiden all forlorn that milked",
]
TEXT = " ".join("This is " + " ".join(reversed(PARTS[:n])) for n in range(1, len(PARTS) + 1))
CHARS = sorted(set(TEXT))
MASK = V = len(CHARS)                                   # characters are 0 .. V - 1
DATA = torch.tensor([CHARS.index(char) for char in TEXT])


class GPT(nn.Module):
    """A transformer. Which positions attend to which is an argument, and so are the positions themselves."""

    def __init__(self, width=64, heads=4, layers=2):
        super().__init__()
        self.token = nn.Embedding(V + 1, width)         # the last row is [MASK]
        self.position = nn.Embedding(P + R, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0, activation=nn.GELU("tanh"),
                                       batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens, position, noisy):
        """(B, T, V) logits; those at position i - 1 predict character i. `noisy` (T,): see `attention`."""
        may_attend = attention(position, noisy)
        x = self.token(tokens) + self.position(position)
        for block in self.blocks:
            x = block(x, src_mask=~may_attend)
        return self.norm(x) @ self.token.weight[:V].T   # [MASK] is never predicted


def attention(position, noisy):
    """(T, T) bool: may the query (row) attend to the key (column)? `noisy` (T,): in a block with masks?"""
    block = (position - P) // K                         # blocks are counted from the end of the prompt
    query_noisy = noisy[:, None]
    key_noisy = noisy[None, :]
    causal = position[None, :] <= position[:, None]
    earlier_block = block[None, :] < block[:, None]
    same_block = block[None, :] == block[:, None]
    text_to_text = ~query_noisy & ~key_noisy & causal   # finished text: the AR model, unchanged
    block_to_text = query_noisy & ~key_noisy & earlier_block
    block_to_itself = query_noisy & key_noisy & same_block  # to its left and to its right
    return text_to_text | block_to_text | block_to_itself


def ar_logits(net, tokens):
    """(B, T - 1, V): the AR model's logits for the characters 1 .. T - 1 of finished text."""
    position = torch.arange(tokens.size(1))
    noisy = torch.zeros_like(position, dtype=torch.bool)
    return net(tokens, position, noisy)[:, :-1]


@torch.no_grad()
def rollout(net, prompt, u):
    """Continue `prompt` (B, P) block by block. `u` (B, T): a random number for each character.

    Returns text (B, T), the step of its block that revealed a character (B, T), forward passes of a row (B,).
    """
    tokens = F.pad(prompt, (0, u.size(1) - P), value=MASK)
    order = torch.full_like(tokens, -1)
    passes = torch.zeros(len(prompt))
    for start in range(P, u.size(1), K):
        stop = start + K
        position = torch.arange(stop)
        for step in range(K):
            masked = tokens[:, start:stop] == MASK      # (B, K)
            if not masked.any():
                break
            passes += masked.any(1)
            logits = net(tokens[:, :stop], position, position >= start)
            probs = logits[:, start - 1:-1].softmax(-1)  # (B, K, V)
            sampled = (probs.cumsum(-1) <= u[:, start:stop, None]).sum(-1).clamp(max=V - 1)
            confident = (probs.amax(-1) > CONFIDENT) | ~masked
            run_from_left = confident.cumprod(1).bool()
            first = masked.cumsum(1) == 1
            revealed = masked & (run_from_left | first)
            tokens[:, start:stop][revealed] = sampled[revealed]
            order[:, start:stop][revealed] = step
    return tokens, order, passes


def student_logits(student, tokens, noisy_text):
    """(B, R, V): the student reads text (B, T) and blocks with masks (B, R) in one pass, T + R columns."""
    T = tokens.size(1)
    position = torch.cat([torch.arange(T), torch.arange(P, T)])
    noisy = torch.arange(len(position)) >= T
    logits = student(torch.cat([tokens, noisy_text], 1), position, noisy)
    # Logits are read one position before: for the first character of a block, that is in the finished text.
    response = torch.arange(T - P)
    column = torch.where(response % K == 0, P + response - 1, T + response - 1)
    return logits[:, column]


def distill_loss(student, teacher, tokens, order, u):
    """KL divergence from teacher to student, a mean. `u` (B, R / K, 1) picks a state of each block."""
    order = order[:, P:].unflatten(1, (-1, K))          # (B, R / K, K): a row per block
    num_states = order.amax(-1, keepdim=True) + 1
    state = (u * num_states).long()                     # one of the states that the block passed through
    masked = (order >= state).flatten(1)                # (B, R): in it, these were not revealed yet
    noisy_text = tokens[:, P:].masked_fill(masked, MASK)
    with torch.no_grad():                               # target: the teacher reads the finished text
        target = ar_logits(teacher, tokens)[:, P - 1:].log_softmax(-1)  # (B, R, V)
    log_probs = student_logits(student, tokens, noisy_text).log_softmax(-1)
    kl = (target.exp() * (target - log_probs)).sum(-1)
    mean_of_masked = (kl * masked).sum(1) / masked.sum(1)   # (B,)
    return mean_of_masked.mean()


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def report(name, student, teacher):
    """One text of the student, its speed, and its quality: nats per character under the teacher."""
    prompts = DATA[:P].repeat(64, 1)
    tokens, _, passes = rollout(student, prompts, torch.rand(64, P + R))
    nats = F.cross_entropy(ar_logits(teacher, tokens)[:, P - 1:].flatten(0, 1), tokens[:, P:].flatten())
    print(f"{name}: {R / passes.mean():.2f} characters per forward pass, {nats:.2f} nats per character")
    print("   ", "".join(CHARS[token] for token in tokens[0]))


def texts_of_data(length):
    """(B, length) pieces of the rhyme, from random places."""
    begin = torch.randint(len(DATA) - length + 1, (B, 1))
    return DATA[begin + torch.arange(length)]


def main():
    torch.manual_seed(0)
    teacher = GPT()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(PRETRAINING):                        # an ordinary AR model
        tokens = texts_of_data(P + R)
        logits = ar_logits(teacher, tokens)
        update(optimizer, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    student = copy.deepcopy(teacher)                    # the conversion: another mask, nothing else
    student.token.weight.data[MASK] = student.token.weight[:V].mean(0)
    report("before", student, teacher)

    optimizer = torch.optim.AdamW(student.parameters(), lr=4e-3)
    left_to_right = (torch.arange(P + R) - P) % K
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / STEPS)
        if step < WARM:                                 # off-policy: the rhyme, as if revealed one by one
            tokens = texts_of_data(P + R)
            order = left_to_right.repeat(B, 1)
        elif step % 4 == 0:                             # on-policy: a text of its own for four updates
            tokens, order, _ = rollout(student, texts_of_data(P), torch.rand(B, P + R))
        update(optimizer, distill_loss(student, teacher, tokens, order, torch.rand(B, R // K, 1)))
    report("after", student, teacher)


if __name__ == "__main__":
    main()
