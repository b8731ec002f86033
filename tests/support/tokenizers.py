"""Small tokenizers of the kinds that make detokenising hard, built in memory."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

WORDS = ["Hello", "world", "stop", "here", "a", "b", "�", ".", "é", "世"]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<pad>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: a token for each byte, words, and halves of characters."""
    alphabet = sorted(ByteLevel.alphabet())
    splitter = ByteLevel(add_prefix_space=False, use_regex=False)
    words = [splitter.pre_tokenize_str(word)[0][0] for word in [*WORDS, *(f" {w}" for w in WORDS), "🙂", "👩‍👩"]]
    halves = [splitter.pre_tokenize_str(word)[0][0][:-1] for word in ("🙂", "a世", "é€")]
    tokens = list(dict.fromkeys([*alphabet, *words, *halves]))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: spaces are a character of their own, the first is dropped, and bytes are decoded by runs."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, *(f"▁{word}" for word in WORDS), "▁"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: a space before everything that is not a continuation."""
    tokens = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.WordPiece(vocab={t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """T5's kind."""
    tokens = ["<unk>", *WORDS, *(f"▁{word}" for word in WORDS), "▁"]
    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer)


def spell(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """`text` byte by byte, in a byte-level or byte-fallback tokenizer."""
    names = {chr(b): f"<0x{b:02X}>" for b in range(256)}
    if "<0x00>" not in tokenizer.get_vocab():
        alphabet = dict(zip(map(chr, _byte_order()), _byte_characters(), strict=True))
        names = alphabet
    return [tokenizer.convert_tokens_to_ids(names[chr(byte)]) for byte in text.encode()]


def _byte_order() -> Sequence[int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*printable, *(byte for byte in range(256) if byte not in printable)]


def _byte_characters() -> list[str]:
    printable = _byte_order()[:188]
    return [*map(chr, printable), *(chr(256 + i) for i in range(68))]
