r"""How a text is cut before byte-pair merges, for each value of `tokenizer.ggml.pre`.

A GGUF file names its splitting and does not hold it. The names are those of llama.cpp (src/llama-vocab.cpp); which model's
tokenizer each was made for stands in its convert_hf_to_gguf_update.py. The rules are data: expressions that cut one after the
other, each inside the pieces that the ones before it left, matches and gaps alike. Where the published tokenizer.json is known it
is followed, also where llama.cpp approximates it (normalisation to NFC, contractions in any case): docs/GGUF.md has the sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The contractions, words, numbers, symbols and blanks of each family; "(?!\S)" leaves the last blank to the next word.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_BLANKS}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_BLANKS}"
_QWEN35 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}|{_BLANKS}"
_YOUTU = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}|{_SLASHED}|{_BLANKS}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED}|{_BLANKS}"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_ASCII_SYMBOL = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = rf"{_ASCII_SYMBOL}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
# deepseek-llm's cased letters by number: written out, an editor that normalises text would turn some into their twins.
_CASED_LETTERS = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5 3F7-481
48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45
1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4
1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B
2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A
10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""


def _characters(ranges: str) -> str:
    """A class of characters from ranges of their hexadecimal numbers."""
    return "[" + "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in ranges.split()) + "]"


_DEEPSEEK_LETTERS = rf"\s?{_characters(_CASED_LETTERS)}+"
_DEEPSEEK_SYMBOLS = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_CJK = "[一-龥\u0800-一가-퟿]+"


@dataclass(frozen=True)
class Splitting:
    """One rule.

    Attributes:
        expressions: regular expressions (Oniguruma's, as in tokenizer.json), applied in turn.
        digits: cut every digit off first (`Digits` of tokenizers), as the published tokenizers of this kind do.
        gpt2: end with GPT-2's own splitting, built into `ByteLevel`.
        nfc: the text is brought to Unicode's form NFC first.
        whole_words: a piece that is a token is taken without merging (`ignore_merges`).
        adds_bos: the tokenizer puts BOS before a text where the file does not say.
    """

    expressions: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False

    def normalizer(self) -> Any:
        from tokenizers import normalizers

        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> Any:
        from tokenizers import Regex, pre_tokenizers

        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        steps += [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in self.expressions]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=self.gpt2))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_PLAIN = Splitting(gpt2=True)
_DIGITS = Splitting(gpt2=True, digits=True)
_LLAMA = Splitting((_LLAMA3,), whole_words=True, adds_bos=True)
_DEEPSEEK_V3 = Splitting((r"\p{N}{1,3}", _CJK, _DEEPSEEK3))
_CASED_NUMBERS = Splitting((_GPT4O,))
_ONE_DIGIT = Splitting((_QWEN2,))
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

_RULES: dict[Splitting, tuple[str, ...]] = {
    # llama.cpp's own default: of no published model.
    Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): ("default",),
    _PLAIN: (
        "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code", "roberta-bpe",
        "gigachat", "a.x-4.0", "mellum", "exaone4", "jais", "trillion", "granite-docling",
    ),
    Splitting(gpt2=True, nfc=True): ("mpt", "olmo", "modern-bert"),  # GPT-NeoX's tokenizer
    _DIGITS: ("starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
    Splitting(gpt2=True, digits=True, nfc=True): ("command-r",),
    _LLAMA: ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    Splitting((_LLAMA3,)): ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"),
    Splitting((_QWEN2,), nfc=True): ("qwen2", "deepseek-r1-qwen", "f2llmv2"),
    Splitting((_QWEN35,), nfc=True): ("qwen35",),
    _ONE_DIGIT: ("stablelm2", "hunyuan", "solar-open", "grok-2", "megrez", "kormo"),
    Splitting((_TEKKEN,), whole_words=True, adds_bos=True): ("tekken",),
    _CASED_NUMBERS: ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    Splitting((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)): ("tiny_aya", "cohere2moe"),
    Splitting(
        ("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CJK, _YOUTU), whole_words=True
    ): ("youtu",),
    Splitting(("[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_SYMBOLS, r"\s+$", _DEEPSEEK_CJK, r"\p{N}+")): ("deepseek-llm",),
    Splitting(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")): ("deepseek-coder",),
    _DEEPSEEK_V3: ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
    Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): ("falcon",),
    Splitting((_BLOOM,)): ("poro-chat", "bloom", "gpt3-finnish"),
    Splitting((_BLOOM, r"\p{N}")): ("viking",),
    Splitting((_BAILING,)): ("bailingmoe", "bailingmoe2", "llada-moe"),
    Splitting((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}",)): ("seed-coder",),
    Splitting((rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_BLANKS}",)): ("ufakzeka",),
    Splitting((r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_BLANKS}"), whole_words=True): ("minicpm5",),
    Splitting((r"\p{N}+", r"(?=(\d{3})+(?!\d))")): ("superbpe",),
}  # fmt: skip

SPLITTINGS: dict[str, Splitting] = {name: rule for rule, names in _RULES.items() for name in names}
