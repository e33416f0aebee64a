"""Invariants of data/tokenizer.py: what is encoded decodes to itself, an id has the same bytes everywhere,
files are complete or absent."""

import json
import os
import random
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data import story_world, tokenizer
from data.corpus import story_world_tokens
from tests.conftest import sentence_pieces

SHARED = Path(__file__).parents[2].parent / "shared/data"
CORPUS = [
    f"The {a} {b} sat by the {c}, and the {b} said: «it's 123 o'clock»."
    for a in ("red", "old", "sad") for b in ("cat", "dog", "emu") for c in ("sea", "hill", "door")
]
WORDS = ["One", " day", " ball", "ball", ",", ".", "\n", " Zoë"]
ODD = ["", " ", "\0", "\r", "\r\n\r\r\n", "a  b\t\tc ", "naïve Zoë", "日本語の物語。", "e\u0301",
       "\u2028x\u00a0y", "\ufeffmark", "\U0001f469\u200d\U0001f467 and \U0001f3f3\ufe0f met \U0001f994",
       "\ufffd", "<|endoftext|>",
       "'s 'S don't", "One ball, two balloons. One_ball 42", "x" * 3000, " " * 3000 + "end"]


def vocabularies() -> dict:
    return {"bpe": tokenizer.train_bpe(CORPUS, 300), "words": tokenizer.word_level(WORDS)}


@pytest.fixture(params=["bpe", "words"], scope="module")
def tok(request):
    return vocabularies()[request.param]


@pytest.fixture
def gpt2(monkeypatch):
    cache = SHARED / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip(f"no copy of GPT-2's vocabulary in {cache}, and tests use no network")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return tokenizer.gpt2()


def random_texts(n: int) -> list[str]:
    """Texts of up to 59 characters, whose UTF-8 has 1 to 4 bytes."""
    rng = random.Random(0)
    kinds = [(0, 0x80), (0x80, 0x800), (0x800, 0xd800), (0xe000, 0x10000), (0x10000, 0x110000)]
    texts = []
    for _ in range(n):
        length = rng.randrange(60)
        texts.append("".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(length)))
    return texts


def test_every_text_decodes_to_itself(tok):
    for text in ODD + random_texts(500):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert all(0 <= i < tok.vocab_size and i != tok.eot for i in ids), f"{text!r} became {ids}"


def test_a_batch_is_encoded_as_its_texts_are(tok):
    assert tok.encode_batch(ODD) == [tok.encode(text) for text in ODD]


def test_end_of_text_is_the_last_id_and_has_no_text(tok):
    assert tok.eot == tok.vocab_size - 1
    ids = tok.encode("One day")
    assert tok.decode([tok.eot, *ids, tok.eot, tok.eot]) == "One day"
    assert tok.pieces([tok.eot, *ids, tok.eot])[::len(ids) + 1] == ["", ""]


def test_an_id_without_a_token_shows_as_nothing(tok):
    """A network's table of vectors may be longer than its vocabulary, for speed."""
    ids = tok.encode("One day")
    assert tok.decode([tok.vocab_size, *ids, tok.vocab_size + 61]) == "One day"
    pieces = tok.pieces([tok.vocab_size, *ids, tok.vocab_size + 61])
    assert pieces[0] == pieces[-1] == "" and "".join(pieces) == "One day"


def test_pieces_join_to_the_text_of_any_ids(tok):
    draw = random.Random(1)
    sequences = [tok.encode(text) for text in ODD + random_texts(200)]
    sequences += [[draw.randrange(tok.vocab_size) for _ in range(draw.randrange(40))] for _ in range(500)]
    for ids in sequences:    # the random ones are mostly not UTF-8
        pieces = tok.pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == tok.decode(ids)


def test_a_character_is_in_the_piece_that_completes_it():
    tok = tokenizer.word_level([])    # one token per byte
    assert tok.pieces(tok.encode("aé🦔b")) == ["a", "", "é", "", "", "", "🦔", "b"]
    assert tok.pieces(tok.encode("🦔")[:3]) == ["", "", "\ufffd"]


def test_a_saved_tokenizer_is_the_same_tokenizer(tok, tmp_path):
    tok.save(tmp_path / "new" / "folder")
    again = tokenizer.load(tmp_path / "new" / "folder")
    assert (again.eot, again.vocab_size) == (tok.eot, tok.vocab_size)
    assert again.encode_batch(ODD) == tok.encode_batch(ODD)
    assert again.to_json() == tok.to_json()
    assert os.listdir(tmp_path / "new" / "folder") == ["bpe.json"]


def test_a_save_that_fails_leaves_the_old_file(tok, tmp_path, monkeypatch):
    tok.save(tmp_path)
    before = (tmp_path / "bpe.json").read_bytes()

    def torn(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="disk full"):
        tokenizer.train_bpe(CORPUS, 280).save(tmp_path)
    assert os.listdir(tmp_path) == ["bpe.json"] and (tmp_path / "bpe.json").read_bytes() == before


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"bpe\.json is missing.*copy it"):
        tokenizer.load(tmp_path)
    good = json.loads(tokenizer.word_level([]).to_json())
    tokens = good["tokens"]
    broken = [b"", b"\xff\xfe", b"[1]", b'{"pattern": "."}', json.dumps(good)[:-40].encode()]
    changes = [
        {"tokens": tokens[:-1]}, {"tokens": tokens[:-1], "eot": 255},
        {"tokens": [*tokens, "QQ=="], "eot": 257}, {"tokens": ["?" + tokens[0], *tokens[1:]]},
        {"tokens": [*tokens[:-1], 5]}, {"eot": 300}, {"pattern": "("}, {"pattern": 5},
    ]
    for content in broken + [json.dumps({**good, **change}).encode() for change in changes]:
        (tmp_path / "bpe.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"bpe\.json is not a tokenizer file .*copy it again"):
            tokenizer.load(tmp_path)


def test_training_is_deterministic_and_learns_its_text():
    one, two = (tokenizer.train_bpe(iter(CORPUS), 300) for _ in range(2))
    assert one.to_json() == two.to_json() and one.vocab_size == 300
    assert len(one.encode(" sat")) == 1
    smaller = tokenizer.train_bpe(CORPUS, 280)    # merges are in the order they were learned, after the bytes
    ids = range(smaller.eot)
    assert [one.encoding.decode_single_token_bytes(i) for i in ids] == [
        smaller.encoding.decode_single_token_bytes(i) for i in ids]
    assert len(one.encode(CORPUS[0])) < len(smaller.encode(CORPUS[0]))


def test_a_small_text_gives_a_small_vocabulary():
    tok = tokenizer.train_bpe(["abab"], 1000)
    assert tok.vocab_size == 256 + 2 + 1 and tok.eot == 258    # ab, abab
    assert tokenizer.train_bpe([], 1000).vocab_size == tokenizer.train_bpe(CORPUS, 257).vocab_size == 257
    with pytest.raises(ValueError, match="256 ids is too small.*need 257"):
        tokenizer.train_bpe(CORPUS, 256)


def test_each_given_word_is_one_token_and_other_words_are_bytes():
    tok = tokenizer.word_level(WORDS)
    for word in WORDS:
        assert len(tok.encode(word)) == 1 and tok.decode(tok.encode(word)) == word
    assert tok.pieces(tok.encode("One day, Zoë")) == ["One", " day", ",", " Zoë"]
    assert tok.encode("gull") == list(b"gull")
    assert tok.vocab_size == 256 + len(set(WORDS) - {",", ".", "\n"}) + 1    # those three are bytes already
    assert tokenizer.word_level(WORDS + WORDS).to_json() == tok.to_json()


def test_a_token_that_the_pattern_would_split_is_refused():
    for token in ("don't", "two words", "a.", "  x", ""):
        with pytest.raises(ValueError, match=f"{token!r} cannot be one token: expected.*split it"):
            tokenizer.word_level(["One", token])


def test_gpt2_is_the_one_of_the_checkpoints(gpt2, tmp_path):
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]    # as in OpenAI's release
    for text in ODD + random_texts(100):
        assert gpt2.decode(gpt2.encode(text)) == text and "".join(gpt2.pieces(gpt2.encode(text))) == text
    gpt2.save(tmp_path)
    assert tokenizer.load(tmp_path).encode_batch(ODD) == gpt2.encode_batch(ODD)


def test_gpt2_without_network_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="cannot be downloaded.*connect once, or point TIKTOKEN_CACHE_DIR"):
        tokenizer.gpt2()


@pytest.mark.parametrize("name", ["bpe", "words", "story world", "shipped"])
def test_transformers_has_the_same_ids(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if name == "story world":
        tok = tokenizer.word_level(story_world_tokens())
    elif name == "shipped":
        tok = tokenizer.load(Path(__file__).parents[2] / "model/pretrained")
    else:
        tok = vocabularies()[name]
    tok.save_for_transformers(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tok.vocab_size and theirs.eos_token_id == theirs.bos_token_id == tok.eot
    texts = [text for text in ODD + random_texts(500) + CORPUS if "<|endoftext|>" not in text]
    texts += [story_world.story(i) for i in range(20)]
    for text in texts:
        ids = tok.encode(text)
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    ours = tokenizer.load(tmp_path)
    assert ours.encode_batch(ODD) == tok.encode_batch(ODD) and ours.ends == tok.eot


def test_gpt2_for_transformers_has_the_same_ids(gpt2, tmp_path):
    gpt2.save_for_transformers(tmp_path)
    ours = tokenizer.load(tmp_path)
    texts = ODD + random_texts(300)
    assert ours.encode_batch(texts) == gpt2.encode_batch(texts) and ours.ends == gpt2.eot


# a checkpoint's tokenizer.json ------------------------------------------------------------------------

def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it, learned from a few sentences."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]))
    return tok


def space_first(folder) -> Tokenizer:
    """As Llama 2 has it: a space before each text, and bytes for what has no token of its own."""
    single_bytes = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "\n<s>\n", "\n</s>\n", *single_bytes, "he", " t", " the", *" thea"]
    packed = struct.pack("<i", 9)
    for i, token in enumerate(tokens):
        packed += struct.pack("<fi", -float(i), len(token.encode())) + token.encode()
    (folder / "tok.bin").write_bytes(packed)
    return sentence_pieces(folder / "tok.bin")


@pytest.fixture(params=["byte level", "SentencePiece"])
def checkpoint_folder(request, tmp_path):
    """A folder with a tokenizer.json that would also cut, pad and put a token before a text."""
    tok = byte_level() if request.param == "byte level" else space_first(tmp_path)
    tok.enable_truncation(4)
    tok.enable_padding(length=9)
    special_tokens = [("<s>", tok.token_to_id("<s>"))]
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=special_tokens)
    tok.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_every_text_decodes_to_itself_with_a_checkpoint_s_tokenizer(checkpoint_folder):
    tok = tokenizer.load(checkpoint_folder)
    texts = [*ODD, "<s> and </s>", " the hat", "the  the", *random_texts(200)]
    assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]
    for text in texts:
        ids = tok.encode(text)
        assert tok.decode(ids) == tok.decode([tok.eot, *ids, tok.eot]) == text
        assert all(0 <= i < tok.vocab_size and i != tok.eot for i in ids), f"{text!r} became {ids}"
        assert "".join(tok.pieces([tok.eot, *ids])) == text


def test_a_piece_in_the_middle_of_a_text_keeps_its_space(checkpoint_folder):
    tok = tokenizer.load(checkpoint_folder)
    ids = tok.encode("the hat the")
    assert "".join(tok.pieces([tok.eot, *ids])[3:]).endswith(" the")
    assert tok.pieces(tok.encode("the"))[0].strip(" ")
    assert tok.pieces([tok.vocab_size, tok.vocab_size + 9]) == ["", ""]


def test_a_saved_checkpoint_s_tokenizer_is_the_same_tokenizer(checkpoint_folder, tmp_path):
    loaded = tokenizer.load(checkpoint_folder)
    tok = tokenizer.HubTokenizer(loaded.tok, eot=2)    # not the one that the folder names
    tok.save(tmp_path / "new" / "folder")
    again = tokenizer.load(tmp_path / "new" / "folder")
    assert (again.eot, again.vocab_size, again.to_json()) == (tok.eot, tok.vocab_size, tok.to_json())
    assert again.encode_batch(ODD) == tok.encode_batch(ODD)


ENDS = {        # config.json, tokenizer_config.json, and the id that begins a text and those that end one
    "the config's first": (
        {"bos_token_id": 1, "eos_token_id": 0, "vocab_size": 320}, {"bos_token": "<s>"}, 1, (0,)),
    "the tokenizer's": ({"eos_token_id": 1}, {"bos_token": "<s>"}, 0, (1,)),
    "an end": ({"bos_token_id": None, "eos_token_id": [1, 0]}, {"bos_token": None}, 1, (1, 0)),
    "the tokenizer's end": ({}, {"eos_token": "</s>"}, 1, (1,)),
    "not one that the vocabulary does not have": (
        {"bos_token_id": 50256, "eos_token_id": 1}, {}, 1, (1,)),
    "a begin alone": ({"bos_token_id": 1}, {}, 1, (1,)),
    "a begin that is one of the ends": (
        {"bos_token_id": 0, "eos_token_id": [1, 0]}, {"eos_token": "</s>"}, 0, (0, 1)),
    "ends of all files": ({"bos_token_id": 0, "eos_token_id": 0}, {"eos_token": "</s>"}, 0, (0, 1)),
    "ordinary ids of the config": (
        {"bos_token_id": 2, "eos_token_id": 3}, {"bos_token": "<s>", "eos_token": "</s>"}, 0, (1,)),
    "a Llama's defaults": (
        {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2},
        {"bos_token": "<s>", "eos_token": "<s>"}, 0, (0,)),
}


@pytest.mark.parametrize("case", ENDS)
def test_texts_begin_and_end_with_what_the_checkpoint_says(tmp_path, case):
    config, tokenizer_config, bos, eos = ENDS[case]
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (tmp_path / name).write_text(json.dumps(content))
    tok = tokenizer.load(tmp_path)
    assert (tok.bos, tok.eos, tok.eot) == (bos, eos, eos[0])
    tok.save(tmp_path / "again")
    again = tokenizer.load(tmp_path / "again")
    assert (again.bos, again.eos, again.to_json()) == (tok.bos, tok.eos, tok.to_json())


def test_what_lies_between_texts(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    hub = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for bos, eot, others, ends, between in (
        (0, 0, (), 0, [0]), (None, 1, (), 1, [1]), (0, 1, (), (1, 0), [1, 0]), (0, 0, (1,), (0, 1), [0]),
        (0, 1, (5,), (1, 5, 0), [1, 0]),
    ):
        tok = tokenizer.HubTokenizer(hub, eot, bos, others)
        assert (tok.ends, tok.between) == (ends, between)


@pytest.mark.parametrize("special", [["<|endoftext|>"], []], ids=["special", "none"])
def test_an_ordinary_token_is_no_end(tmp_path, special):
    """LlamaConfig's default ids 1 and 2 are "!" and another character of this vocabulary."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special))
    tok.save(str(tmp_path / "tokenizer.json"))
    for ids in ({"bos_token_id": 1, "eos_token_id": 2}, {"bos_token_id": 0, "eos_token_id": 1},
                {"bos_token_id": 150, "eos_token_id": [200, 300]}, {"bos_token_id": 10 ** 12}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **ids}))
        if special:
            loaded = tokenizer.load(tmp_path)
            assert (loaded.bos, loaded.eos) == (0, (0,))
        else:
            with pytest.raises(ValueError, match="does not say with which token texts begin or end"):
                tokenizer.load(tmp_path)


def test_the_ends_of_generation_config_count(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    assert tokenizer.load(tmp_path).ends == (0, 1)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    tok = tokenizer.load(tmp_path)
    assert (tok.bos, tok.eos) == (0, (0, 1))


ABSURD_IDS = [-1, 1.0, True, "1", "</s>", {}, {"a": 1}, [-1, 0], [None], [[0]], ["<s>"], [0.0], float("nan")]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_ids_that_are_none_are_one_sentence(tmp_path, name, key):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for value in ABSURD_IDS:
        (tmp_path / name).write_text(json.dumps({key: value}))
        with pytest.raises(ValueError, match=f"{name}: {key} should be the id of a token") as caught:
            tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [5, True, [], ["<s>"], {"content": 5}, 1.5])
def test_words_that_are_none_are_one_sentence(tmp_path, value):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": value}))
    with pytest.raises(ValueError, match="tokenizer_config.json: bos_token should be the text of a token"):
        tokenizer.load(tmp_path)


FILES = ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "bpe.json"]


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_one_sentence(tmp_path, name):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    for content in ("[" * 200_000, "[]", "5", '"x"', "", "{", "\0" * 100,
                    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
            tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    with pytest.raises(ValueError, match="git lfs pull"):
        tokenizer.load(tmp_path)


def test_byte_order_marks_do_not_matter(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "config.json").write_text("{}")
    before = tokenizer.load(tmp_path).to_json()
    for path in tmp_path.iterdir():
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert tokenizer.load(tmp_path).to_json() == before


def test_a_checkpoint_s_tokenizer_that_cannot_be_used_is_refused(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    message = "does not say with which token texts begin or end: write bos_token_id"
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON .*copy it again"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    pieces = byte_level()
    pieces.decoder = decoders.WordPiece()
    pieces.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="WordPiece.*: expected one of ByteLevel, ByteFallback, Metaspace"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer file .*copy it again"):
        tokenizer.load(tmp_path)


def test_gpt2_s_tokenizer_json_is_gpt2(gpt2, tmp_path):
    """Its tokenizer.json equals tiktoken's vocabulary; a folder of its size without a tokenizer gets it."""
    config = {"model_type": "gpt2", "vocab_size": 50257, "bos_token_id": 50256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tokenizer.load(tmp_path).to_json() == gpt2.to_json()
    small, large = sorted((SHARED / "tiktoken_cache").iterdir(), key=lambda path: path.stat().st_size)
    tok = Tokenizer(models.BPE.from_file(str(large), str(small)))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>"])
    tok.save(str(tmp_path / "tokenizer.json"))
    other = tokenizer.load(tmp_path)
    assert (other.eot, other.vocab_size) == (gpt2.eot, gpt2.vocab_size)
    for text in [*ODD, *random_texts(100)]:
        ids = gpt2.encode(text)
        assert other.encode(text) == ids and other.pieces(ids) == gpt2.pieces(ids)


def test_the_real_tokenizer_s_ids(stories260k):
    tok = tokenizer.load(stories260k)
    assert (tok.bos, tok.eos, tok.vocab_size) == (1, (2,), 512)
    assert tok.encode("Once upon a time") == [403, 407, 261, 378]    # as llama2.c has them
    assert tok.pieces([1, 403, 407, 261, 378]) == ["", "Once", " upon", " a", " time"]
