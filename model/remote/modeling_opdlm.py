"""Run an OPDLM student with `transformers`. This file needs nothing else of the project that wrote it.

    tok = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    prompt = [tok.bos_token_id, *tok.encode("Once upon a time", add_special_tokens=False)]
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=100)

A student is an AR model of `transformers` that also writes text by block diffusion. Without
trust_remote_code=True, the folder is loaded as the AR model. `generate` has two modes:

    diffusion      K masks are put after the text. A forward pass predicts them, the reveal rule takes some of
                   the tokens, and so on until no mask is left. Then the next K masks follow.
    speculative    One forward pass over K masks drafts K tokens, another one reads them as an AR model and
                   accepts or rejects them. The text has the distribution of the AR model.

There is no KV cache: each pass reads the whole text. The OPDLM project has cached twins of both modes.

config.json says how the student was trained: "student" has the block size K, the block size in which finished
text attends to itself (1: causal), and the shift (logits at position i - shift predict token i).

Shapes: T tokens of a text, P of its prompt, K block size, C width, V vocabulary, M masks, n drafts.
"""
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import cached_file

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

# 1. reveal rules: which masks of a block are replaced at a step -----------------------------------------
# Arguments: the confidences (M,) of the block's masks from left to right, and the argument of the rule.
# They return (M,) bool, of which at least one is True.

def leftmost(confidence: Tensor, level: float) -> Tensor:
    """From the left as long as the confidence is above the level."""
    revealed = (confidence > level).cumprod(0).bool()
    revealed[0] = True
    return revealed


def threshold(confidence: Tensor, level: float) -> Tensor:
    """All masks whose confidence is above the level."""
    revealed = confidence > level
    revealed[confidence.argmax()] = True
    return revealed


def static(confidence: Tensor, count: int) -> Tensor:
    """The `count` masks of the highest confidence."""
    order = confidence.argsort(descending=True, stable=True)
    revealed = torch.zeros_like(confidence, dtype=torch.bool)
    revealed[order[:count]] = True
    return revealed


# The function, the type of its argument, and the smallest and the largest one.
RULES = {
    "leftmost": (leftmost, float, 0, 1),
    "threshold": (threshold, float, 0, 1),
    "static": (static, int, 1, 2 ** 31 - 1),
}


def choose(rule: str, confidence: Tensor) -> Tensor:
    """(M,) bool: the masks that are replaced, by the rule NAME:ARGUMENT. ValueError if it is not known."""
    name, _, argument = rule.partition(":")
    try:
        function, kind, least, most = RULES[name]
        number = kind(argument)
        if not least <= number <= most:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"reveal={rule!r}: expected leftmost:P or threshold:P with P from 0 to 1, or "
                         "static:COUNT with COUNT from 1; other rules need the OPDLM project") from None
    return function(confidence, number)


# 2. sampling --------------------------------------------------------------------------------------------

def to_probs(logits: Tensor, temperature: float) -> Tensor:
    """(n, V): the probabilities that tokens are drawn from. Temperature 0: 1 for the most likely token."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    return (logits / temperature).softmax(-1)


def draw(probs: Tensor) -> Tensor:
    """(n,) one token of each distribution (n, V)."""
    return probs.multinomial(1)[:, 0]


def verified(drafts: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """The drafts (n,) up to the first rejected one, and one more token: distributed as `p`.

    `q` (n, V) are the distributions that the drafts were drawn from, `p` (n + 1, V) those of the AR model.
    """
    for i, draft in enumerate(drafts):
        u = torch.rand((), device=q.device)
        if u * q[i, draft] >= p[i, draft]:                       # with probability 1 - min(1, p / q)
            residual = (p[i] - q[i]).clamp(min=0)
            if not residual.any():                               # p = q, up to rounding
                residual = p[i]
            return torch.cat([drafts[:i], draw(residual[None])])
    return torch.cat([drafts, draw(p[-1:])])


# 3. the student -----------------------------------------------------------------------------------------

class Student:
    """What is added to the AR model `ar_class` of `transformers`; each family has a subclass."""

    mask_vector = None          # (C,) the embedding of [MASK]; None: [MASK] is a token of the vocabulary

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs):
        # Version 4 of transformers has registered this class for all models of the family.
        transformers.AutoModelForCausalLM.register(cls.config_class, cls.ar_class, exist_ok=True)
        loaded = super().from_pretrained(name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded   # beside it may be information
        mask_file = getattr(model.config, "mask_file", None)
        if mask_file:
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            tensors = load_file(cached_file(name, mask_file, **hub))
            model.mask_vector = tensors["mask_vector"]
        return loaded

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 128,
                 mode: str | None = None, reveal: str | None = None, temperature: float = 0.0,
                 eos_token_id: int | list[int] | None = None) -> Tensor:
        """(B, T) the prompts `input_ids` (B, P), each with up to `max_new_tokens` tokens after it.

        attention_mask    (B, P): 0 where a prompt is padded, at its left
        mode              "diffusion" or "speculative"; default: as the student was trained
        reveal            leftmost:P, threshold:P or static:COUNT, for diffusion; default: as it was trained
        temperature       of the distributions that tokens are drawn from; 0: always the most likely token
        eos_token_id      the ids that end a text; the first one is also the padding after it
        ValueError for a value that is not possible.
        """
        trained_mode = getattr(self.config, "mode", "diffusion")
        mode = mode or ("diffusion" if reveal else trained_mode)
        rule = reveal or getattr(self.config, "reveal", "static:1")
        ends = self.end_ids(eos_token_id)
        self.check(mode, temperature, input_ids.size(1), max_new_tokens)

        responses = []
        for row, prompt in enumerate(input_ids):
            if attention_mask is not None:
                prompt = prompt[attention_mask[row].bool()]
            response = self.continue_text(prompt, max_new_tokens, mode, rule, temperature, ends)
            responses.append(response)
        padded = pad_sequence(responses, batch_first=True, padding_value=int(ends[0]))
        return torch.cat([input_ids, padded], 1)

    def continue_text(self, prompt: Tensor, length: int, mode: str, rule: str, temperature: float,
                      ends: Tensor) -> Tensor:
        """Up to `length` tokens after the `prompt` (P,), up to and including the first of the ids `ends`."""
        P = len(prompt)
        text = prompt
        while len(text) < P + length:
            if mode == "speculative":
                text = self.add_verified(text, temperature)
            else:
                size = min(self.config.student["block"], P + length - len(text))
                text = self.add_block(text, size, P, rule, temperature)
            is_end = torch.isin(text[P:], ends)
            if is_end.any():
                length = min(length, int(is_end.int().argmax()) + 1)
        return text[P:P + length]

    def check(self, mode: str, temperature: float, prompt_len: int, max_new_tokens: int) -> None:
        """ValueError for arguments of `generate` that are not possible."""
        layout = self.config.student
        context = self.config.max_position_embeddings
        confidence = getattr(self.config, "confidence", "largest")
        if mode not in ("diffusion", "speculative"):
            raise ValueError(f"mode={mode!r}: expected 'diffusion' or 'speculative'")
        if mode == "speculative" and (layout["context_block"], layout["logit_shift"]) != (1, 1):
            raise ValueError("mode='speculative': this student cannot verify its own drafts, since it does "
                             "not read text as an AR model does; use mode='diffusion'")
        if mode == "diffusion" and confidence not in ("largest", "drawn"):
            raise ValueError(f"confidence={confidence!r} in config.json: expected 'largest' or 'drawn'; the "
                             "others need the OPDLM project")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature={temperature}: expected a number from 0")
        if max_new_tokens < 1 or not 1 <= prompt_len <= context - max_new_tokens:
            raise ValueError(f"a prompt of {prompt_len} tokens and max_new_tokens={max_new_tokens}: expected "
                             f"at least 1 each, together at most {context}")
        if self.config._attn_implementation != "sdpa":
            raise ValueError(f"attn_implementation={self.config._attn_implementation!r}: expected 'sdpa', "
                             "since others do not take an attention mask of blocks")

    def end_ids(self, eos_token_id: int | list[int] | None) -> Tensor:
        """The ids that end a text. By default these are all eos, and bos, since another text begins there."""
        if eos_token_id is None:
            eos_token_id = []
            for config in (self.config, self.generation_config):
                for ids in (config.eos_token_id, config.bos_token_id):
                    eos_token_id += ids if isinstance(ids, list) else [ids]
        ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        ids = [i for i in ids if i is not None]
        if not ids:
            raise ValueError("config.json does not say which token ends a text: give eos_token_id")
        return torch.tensor(ids, device=self.device)

    def add_block(self, text: Tensor, size: int, prompt_len: int, rule: str, temperature: float) -> Tensor:
        """`text` (T,) and a block of `size` tokens after it, denoised step by step."""
        begin = len(text)
        layout = self.config.student
        text = torch.cat([text, self.masks(size)])
        mask = attention(len(text), begin, prompt_len, layout["context_block"])
        while True:
            masked = text[begin:] == self.mask_id                # (size,)
            if not masked.any():
                return text
            logits = self.logits(text, mask, begin - layout["logit_shift"])
            logits = logits[:size][masked]                       # (M, V)
            token = draw(to_probs(logits, temperature))          # (M,)
            probs = logits.softmax(-1)
            confidence = probs.amax(-1)
            if getattr(self.config, "confidence", "largest") == "drawn":
                confidence = probs.gather(1, token[:, None])[:, 0]
            revealed = choose(rule, confidence)
            text[begin:][masked] = torch.where(revealed, token, self.mask_id)

    def add_verified(self, text: Tensor, temperature: float) -> Tensor:
        """`text` (T,) and 1 to K + 1 tokens after it, as the AR model writes them."""
        last = len(text) - 1    # its logits predict the first new token
        block = min(self.config.student["block"], self.config.max_position_embeddings - len(text))
        noisy = torch.cat([text, self.masks(block)])
        mask = attention(len(noisy), len(text), 0, 1)
        q = to_probs(self.logits(noisy, mask, last)[:block], temperature)
        drafts = draw(q)

        drafted = torch.cat([text, drafts])
        causal = attention(len(drafted), len(drafted), 0, 1)
        p = to_probs(self.logits(drafted, causal, last), temperature)
        return torch.cat([text, verified(drafts, q, p)])

    @property
    def mask_id(self) -> int:
        """[MASK]: an id of the vocabulary, or the first one after it."""
        return self.config.vocab_size if self.mask_vector is not None else self.config.mask_token_id

    def masks(self, count: int) -> Tensor:
        return torch.full((count,), self.mask_id, device=self.device)

    def logits(self, text: Tensor, mask: Tensor, begin: int) -> Tensor:
        """(T - begin, V) logits at the positions from `begin` on, under the attention mask (T, T)."""
        x = self.embed(text)                                     # (1, T, C)
        lowest = torch.finfo(x.dtype).min
        bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, lowest)
        bias = bias.to(x.device)[None, None]                     # (1, 1, T, T)
        hidden = self.hidden_states(x, bias)[0]                  # (T, C)
        logits = self.lm_head(hidden[begin:]).float()
        if self.mask_vector is None:
            logits[:, self.mask_id] = -torch.inf                 # [MASK] is never generated
        return logits

    def embed(self, text: Tensor) -> Tensor:
        """(1, T, C): the row of a token in the table, or the [MASK] vector."""
        table = self.get_input_embeddings()
        if self.mask_vector is None:
            return table(text)[None]
        is_mask = text == self.mask_id
        x = table(text.masked_fill(is_mask, 0))                  # the table has no row for [MASK]
        return torch.where(is_mask[:, None], self.mask_vector.to(x), x)[None]

    def hidden_states(self, x: Tensor, bias: Tensor) -> Tensor:
        """(1, T, C) the input of the output layer. `bias` (1, 1, T, T) is added to the attention scores."""
        return self.model(inputs_embeds=x, attention_mask=bias, use_cache=False).last_hidden_state


def attention(length: int, begin: int, prompt_len: int, context_block: int) -> Tensor:
    """(T, T) bool: queries by keys, True where a query attends to a key.

    Finished text, before `begin`, attends both ways within its blocks, which are counted from the end of the
    prompt, and to the blocks before them. The block that is denoised attends to everything.
    """
    position = torch.arange(length)
    block = (position - prompt_len) // context_block
    is_noisy = position >= begin
    return (block[None, :] <= block[:, None]) | is_noisy[:, None]


class Gpt2Student(Student, transformers.GPT2LMHeadModel):
    ar_class = transformers.GPT2LMHeadModel

    def hidden_states(self, x: Tensor, bias: Tensor) -> Tensor:
        """Layer by layer: in version 4, the whole network does not take such an attention mask."""
        net = self.transformer
        position = torch.arange(x.size(1), device=x.device)
        x = x + net.wpe(position)
        for block in net.h:
            x = block(x, attention_mask=bias)
            if isinstance(x, tuple):                             # in version 4
                x = x[0]
        return net.ln_f(x)


class LlamaStudent(Student, transformers.LlamaForCausalLM):
    ar_class = transformers.LlamaForCausalLM


class Qwen2Student(Student, transformers.Qwen2ForCausalLM):
    ar_class = transformers.Qwen2ForCausalLM


class Qwen3Student(Student, transformers.Qwen3ForCausalLM):
    ar_class = transformers.Qwen3ForCausalLM
