"""Tests of support/tokenizer.py and of the words that mrm.py hides, against a naive byte-pair
encoding and tiktoken's own loader."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken.load
import torch
from test_script import fails

from mrm import hide_words
from support.tokenizer import (
    SPECIAL, encode_reports, load_tokenizer, save_tokenizer, split_words, train_tokenizer)

REAL = Path(__file__).resolve().parents[1] / "../shared/openi/reports.txt"
TEXTS = [
    "The heart is normal in size. The lungs are clear.", "aaaa aaaaa aa abab ababab",
    "Small left pleural effusion; no pneumothorax.", "2.5 cm nodule, right upper lobe (RUL).",
    "Épanchement pleural gauche.\n\nNo   edema", "心影增大 <mask> <pad>", "the the the theth"]


def generator():
    return torch.Generator().manual_seed(0)


def naive_tokens(texts, size):
    """Byte-pair encoding as the definition says it, counting everything again before each merge."""
    words = [[bytes([b]) for b in word.encode()] for text in texts for word in split_words(text)]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < size:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda p: (-pairs[p], tokens.index(p[0]), tokens.index(p[1])))
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return tokens


def naive_encode(tokens, word):
    """Merges the neighbours that make the earliest token until none do."""
    parts, rank = [bytes([b]) for b in word.encode()], {token: i for i, token in enumerate(tokens)}
    while True:
        joined = [a + b for a, b in zip(parts, parts[1:])]
        ranked = [(rank[token], i) for i, token in enumerate(joined) if token in rank]
        if not ranked:
            return [rank[part] for part in parts]
        i = min(ranked)[1]
        parts[i : i + 2] = [joined[i]]


def random_texts(seed, count):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("aab .b"), 12)) for _ in range(count)]


@pytest.mark.parametrize("texts", [TEXTS, TEXTS * 3, random_texts(0, 40), random_texts(1, 200)],
                         ids=["texts", "thrice", "few", "many"])
def test_tokenizer_equals_a_naive_one(texts):
    enc, tokens = train_tokenizer(texts, 340), naive_tokens(texts, 340 - len(SPECIAL))
    assert [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - len(SPECIAL))] == tokens
    places = [len(tokens) + i for i in range(len(SPECIAL))]
    assert [enc.encode_single_token(name) for name in SPECIAL] == places
    rows, owners = encode_reports(enc, texts, 120)
    for text, row, owner in zip(texts, rows, owners):
        words = split_words(text)
        expected = [(t, i) for i, word in enumerate(words) for t in naive_encode(tokens, word)]
        row = [(token, i) for token, i in zip(row.tolist(), owner.tolist()) if i >= 0]
        assert row == expected
        assert [token for token, _ in row] == enc.encode_ordinary("".join(words))
        assert enc.decode([token for token, _ in row]).strip() == " ".join(text.lower().split())


@pytest.mark.parametrize("report, words", [
    ("No  Edema, (2.5 cm)\nÉtat", [
        " no", " edema", ",", " (", "2", ".", "5", " cm", ")", " état"]),
    ("", []), (" \n", []), ("폐 음영 정상", [" 폐", " 음영", " 정상"]),
    ("Ангина ñandú", [" ангина", " ñandú"])])
def test_words_are_split_off_their_punctuation(report, words):
    assert split_words(report) == words


@pytest.mark.parametrize("report, count", [
    ("双肺纹理清晰，心影大小正常。", 14), ("右侧胸腔积液 约3cm", 9),
    ("両肺野に異常陰影", 8), ("ปอดปกติ", 7), ("no 积液", 3)])
def test_a_word_of_an_unspaced_language_is_a_character(report, count):
    assert len(split_words(report)) == count
    enc = train_tokenizer([report] * 3, 300)
    tokens, owners = encode_reports(enc, [report], 80)
    whole = enc.encode_ordinary("".join(split_words(report)))
    assert whole == tokens[0][owners[0] >= 0].tolist()
    hidden = hide_words(enc, tokens, owners, 0.5)[1]
    assert len({int(w) for w in owners[hidden]}) == round(count / 2)


def test_tokenizer_file(tmp_path):
    enc, path = train_tokenizer(TEXTS * 2, 300), tmp_path / "t.tiktoken"
    save_tokenizer(enc, path)
    again = load_tokenizer(path)
    assert again.n_vocab == enc.n_vocab == 300
    assert tiktoken.load.load_tiktoken_bpe(str(path)) == again._mergeable_ranks
    assert torch.equal(encode_reports(enc, TEXTS, 50)[0], encode_reports(again, TEXTS, 50)[0])
    assert train_tokenizer(TEXTS * 2, 300)._mergeable_ranks == enc._mergeable_ranks
    lines = path.read_text().splitlines()
    for wrong, part in ((lines[:270] + ["!!! 270"], "base64"), (lines[:200], "256 bytes"),
                        (lines + ["", "x"], "base64")):
        path.write_text("\n".join(wrong) + "\n")
        fails(lambda: load_tokenizer(path), path, part)
    fails(lambda: load_tokenizer(tmp_path / "none"), "no such file")
    fails(lambda: train_tokenizer(TEXTS, 200), "vocabulary size", "200")
    assert train_tokenizer([], 1000).n_vocab == 256 + len(SPECIAL)


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 1.0])
def test_hidden_words(ratio):
    enc = train_tokenizer(TEXTS, 280)
    tokens, owners = encode_reports(enc, TEXTS + ["", "one"], 60)
    inputs, hidden = hide_words(enc, tokens, owners, ratio, generator())
    mask = enc.encode_single_token("<mask>")
    assert torch.equal(inputs, torch.where(hidden, mask, tokens)) and hidden.dtype == torch.bool
    assert not hidden[owners < 0].any()
    for owner, row in zip(owners, hidden):
        count, chosen = int(owner.max()) + 1, {int(w) for w in owner[row]}
        assert len(chosen) == min(count, max(1, round(ratio * count)))
        assert all(row[owner == w].all() for w in chosen)  # all pieces together
    assert torch.equal(hidden, hide_words(enc, tokens, owners, ratio, generator())[1])
    assert hide_words(enc, tokens[-2:-1], owners[-2:-1], ratio)[1].sum() == 0  # an empty report


def test_every_word_is_hidden_equally_often():
    enc = train_tokenizer(TEXTS, 280)
    tokens, owners = encode_reports(enc, ["one two three four five"] * 4000, 40)
    hidden = hide_words(enc, tokens, owners, 0.4, generator())[1].float()
    shares = torch.stack([hidden[:, owners[0] == w].mean() for w in range(5)])
    assert ((shares - 0.4).abs() < 0.03).all()


def test_training_a_tokenizer_on_many_words_is_quick():
    rng = np.random.default_rng(0)
    reports = ["".join(rng.choice(list("abcdefgh "), 60)) for _ in range(1000)]
    start = time.process_time()
    assert train_tokenizer(reports, 2500).n_vocab == 2500
    assert time.process_time() - start < 10  # counting anew at each merge takes a minute


@pytest.mark.shared
@pytest.mark.skipif(not REAL.is_file(), reason="no ../shared")
def test_tokenizer_on_real_reports():
    reports = REAL.read_text().splitlines()
    enc = train_tokenizer(reports, 2000)
    tokens, owners = encode_reports(enc, reports, 100)
    count = (owners.max(1).values + 1).sum()
    assert enc.n_vocab == 2000 and (owners >= 0).sum() / count < 1.35  # tokens a word
    for report, row in zip(reports[::200], tokens[::200]):
        full = enc.encode_ordinary("".join(split_words(report)))[:100]
        assert row[: len(full)].tolist() == full
