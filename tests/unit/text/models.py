"""Small tokenizers in the forms that real ones have, made from a page of text."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog; user, assistant, system: hello, goodbye, weather and tools.",
    "def f(x):\n    return {'a': [1, 22, 333], \"b\": x}\n\n\n1. one\n2. two\n\t- three",
    "日本語のテキスト 中文文本 한국어 кирилиця العربية हिन्दी 🙂👍 Ünïcödé e\u0301",
    "You are a helpful AI assistant. Nothing. Think about it. get_weather city Zürich days unit",
] * 3

# fmt: off
SPECIALS = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<start_of_turn>", "<end_of_turn>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<｜User｜>", "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "[INST]", "[/INST]", "[gMASK]", "<sop>", "<|im_sep|>",
    "<|tool_list_start|>",
]
# fmt: on
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def byte_level(directory: Path, template: str | None = None, pattern: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of many families, saved to `directory` and loaded from there."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pattern is None:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    else:
        from tokenizers import Regex

        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    return _saved(tokenizer, directory, template)


def sentencepiece_like(directory: Path, scheme: str | None, template: str | None = None) -> PreTrainedTokenizerFast:
    """A BPE with byte fallback: spaces become ▁ by the normalizer (`scheme` None) or by Metaspace with a scheme."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [AddedToken(f"<0x{byte:02X}>", normalized=False) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>"], limit_alphabet=90)
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    # byte tokens are ordinary entries of the vocabulary
    import json

    document = json.loads(tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    for token in bytes_:
        vocabulary[token.content] = len(vocabulary)
    return _saved(Tokenizer.from_str(json.dumps(document)), directory, template)


def _saved(tokenizer: Tokenizer, directory: Path, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    # as Phi-3 has it: a token that takes in the white space behind it
    tokenizer.add_special_tokens([AddedToken("<|rstrip|>", normalized=False, special=True, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<|lstrip|>", normalized=False, special=True, lstrip=True)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)
