"""The values in config.json: which ones are possible, and which keys would change the computation.

    check_values       type and range of every key that is used
    check_unsupported  ValueError for a key that asks for something the networks do not have

Every message names the key, what was expected and what came.
"""
import math
from dataclasses import dataclass

LONGEST_TEXT = 1000
MAX_DEPTH = 20


@dataclass(frozen=True)
class Expected:
    """What a value must be: an `int` or `float` from `least` to `most`, a `bool`, `str`, `list` or `dict`."""
    kind: type
    least: float = -math.inf
    most: float = math.inf
    optional: bool = False      # null is allowed; a missing key is null

    def allows(self, value) -> bool:
        if value is None:
            return self.optional
        if self.kind is float:
            is_number = type(value) in (int, float) and abs(value) < math.inf
            return is_number and self.least <= value <= self.most
        if type(value) is not self.kind:
            return False
        if self.kind is str:
            return value.isprintable() and len(value) <= LONGEST_TEXT
        return self.kind is not int or self.least <= value <= self.most

    def __str__(self) -> str:
        if self.kind is int:
            return f"an integer from {self.least} to {self.most}"
        if self.kind is float:
            return f"a number from {self.least:g} to {self.most:g}"
        text = f"a text of at most {LONGEST_TEXT} characters"
        names = {bool: "true or false", str: text, dict: "an object", list: "a list"}
        return names[self.kind]


COUNT = Expected(int, 1, 10 ** 7)
WIDTH = Expected(int, 1, 10 ** 6)
LAYERS = Expected(int, 1, 10 ** 6)
FLAG = Expected(bool, optional=True)
OBJECT = Expected(dict, optional=True)

OWN_KEYS = {        # of this project; missing keys have defaults
    "student": Expected(dict),
    "mask_file": Expected(str),
    "reveal": Expected(str),
    "confidence": Expected(str),
    "trained": OBJECT,
    "base": Expected(str),
}
ADAPTER_KEYS = {    # of adapter_config.json
    "r": Expected(int, 1, 10 ** 5),
}
GPT2_KEYS = {
    "vocab_size": COUNT,
    "n_positions": COUNT,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": WIDTH,
    "n_inner": Expected(int, 1, 10 ** 7, optional=True),
    "tie_word_embeddings": FLAG,
}
LLAMA_KEYS = {
    "vocab_size": COUNT,
    "max_position_embeddings": COUNT,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH,
    "num_key_value_heads": Expected(int, 1, 10 ** 6, optional=True),
    "head_dim": Expected(int, 1, 10 ** 6, optional=True),
    "rms_norm_eps": Expected(float, 1e-30, 1, optional=True),
    "rope_theta": Expected(float, 1e-3, 1e15, optional=True),
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "layer_types": Expected(list, optional=True),
    "tie_word_embeddings": FLAG,
    "mask_token_id": Expected(int, 0, 10 ** 7, optional=True),
}
ROPE_KEYS = {       # of rope_parameters and rope_scaling
    "rope_theta": LLAMA_KEYS["rope_theta"],
    "rope_type": Expected(str, optional=True),
    "type": Expected(str, optional=True),
    "partial_rotary_factor": Expected(float, 0, 1, optional=True),
}

# Keys of related models that change the computation, with the values that change nothing.
NEUTRAL = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "pretraining_tp": (None, 1),
    "rope_scaling_factor": (None, 1),
    "partial_rotary_factor": (None, 1.0),
    "rotary_pct": (None, 1),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "alibi": (None, False),
    "parallel_attn": (None, False),
    "use_parallel_residual": (None, False),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "moe_intermediate_size": (None, 0),
    "lm_head_bias": (None, False),
    "qkv_bias": (None, False),
    "attention_out_bias": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "is_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
}


def check_values(config: dict, expected: dict[str, Expected], where: str = "config.json",
                 missing_allowed: bool = False) -> None:
    """ValueError for the first value that is not as `expected`."""
    for key, kind in expected.items():
        if key not in config and missing_allowed:
            continue
        value = config.get(key)
        if not kind.allows(value):
            is_size = kind.kind is int and kind.least == 1 and type(value) is not int
            wanted = "a positive integer" if is_size else kind
            raise ValueError(f"{key} in {where}: expected {wanted}, got {shown(value)}")


def check_unsupported(config: dict) -> None:
    """ValueError for a key of NEUTRAL with another value, wherever in config.json it is."""
    objects = [(config, 0)]
    while objects:
        current, depth = objects.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"config.json is nested too deeply: expected at most {MAX_DEPTH} levels")
        if isinstance(current, list):
            current = dict(enumerate(current))
        for key, value in current.items():
            if isinstance(value, (dict, list)):
                objects.append((value, depth + 1))
            neutral = NEUTRAL.get(key)
            if neutral is not None and value not in neutral:
                raise ValueError(f"{key} in config.json: expected {shown(neutral[-1])}, got {shown(value)} "
                                 "(not supported)")


def check_rope(config: dict) -> None:
    """ValueError for scaled RoPE, and for two different bases of the wavelengths."""
    thetas = {config["rope_theta"]} if config.get("rope_theta") is not None else set()
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        check_values(rope, ROPE_KEYS, f"{name} in config.json", missing_allowed=True)
        for key in ("rope_type", "type"):
            rope_type = rope.get(key) or "default"
            if rope_type != "default":
                raise ValueError(f"rope_type in config.json: expected 'default', got {shown(rope_type)} "
                                 "(not supported)")
        unknown = [key for key, value in rope.items() if key not in ROPE_KEYS and value is not None]
        if unknown:
            raise ValueError(f"{unknown[0]} in {name} in config.json: not supported")
        if rope.get("rope_theta") is not None:
            thetas.add(rope["rope_theta"])
    if len(thetas) > 1:
        values = " and ".join(f"{theta:g}" for theta in sorted(thetas))
        raise ValueError(f"rope_theta in config.json: it has two values, {values}")


def check_layer_types(config: dict) -> None:
    """ValueError if a layer does not attend to all positions before it."""
    for layer_type in config.get("layer_types") or ():
        if layer_type != "full_attention":
            is_name = Expected(str).allows(layer_type)
            got = layer_type[:60] if is_name else shown(layer_type)
            raise ValueError(f"layer_types in config.json: expected full_attention, got {got} "
                             "(not supported)")


def check_student(layout: dict, context: int) -> None:
    """ValueError if the three integers of a student's layout are not possible with this context."""
    unknown = sorted(set(layout) - {"block", "context_block", "logit_shift"})
    if unknown:
        raise ValueError(f'"student" in config.json: {unknown[0]} is not a key of a layout')
    block = layout.get("block", 4)
    expected = {"block": Expected(int, 1, context)}
    check_values({"block": block}, expected, '"student" in config.json')
    for key, allowed in (("context_block", (1, block)), ("logit_shift", (0, 1))):
        value = layout.get(key, 1)
        if type(value) is not int or value not in allowed:
            raise ValueError(f'{key} in "student" in config.json: expected {allowed[0]} or {allowed[1]}, got '
                             f"{shown(value)}")


def shown(value, longest: int = 60) -> str:
    """A value for a message of one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; deep nesting
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= longest else text[:longest] + "..."
