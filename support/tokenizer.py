"""The tokenizer of reports: byte-pair encoding trained on the reports at hand and run by tiktoken.

Reports are put in lower case, since case says little in them, and runs of white space become one
space. A word is a run of letters (any character beyond ASCII is a letter), of digits, or of
punctuation, with the space before it; no token crosses words. In scripts without spaces (Chinese,
Japanese, Thai, Lao, Burmese, Khmer) each character is a word. The vocabulary is the 256 bytes, the
merges, then the special tokens.

Shapes: n reports, L tokens of a report.
"""

import base64
import functools
import heapq
import re
from collections import Counter, defaultdict

import tiktoken
import torch

from support.script import InputError, atomic_write, read_text

UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef"
            "\U00020000-\U0003ffff")
WORD = (rf" ?[{UNSPACED}]| ?[^\x00-@\[-`{{-\x7f{UNSPACED}]+| ?[0-9]+"
        r"| ?[\x00-\x1f!-/:-@\[-`{-\x7f]+")
SPECIAL = ("<pad>", "<mask>", "<eot>")


def split_words(report):
    """The words of a report in lower case, each with the space before it."""
    return re.findall(WORD, " " + " ".join(report.lower().split()))


def make_encoding(merges):
    """The tiktoken encoding of a list of byte strings, whose places are their ids."""
    return tiktoken.Encoding(
        "reports", pat_str=WORD, mergeable_ranks={token: i for i, token in enumerate(merges)},
        special_tokens={name: len(merges) + i for i, name in enumerate(SPECIAL)})


def train_tokenizer(reports, vocab_size):
    """Learns a byte-pair encoding (Sennrich et al. 2016) of at most `vocab_size` tokens, special
    ones included: merges the most frequent pair of neighbours within words, ties to the smaller
    ids, until none occurs twice. Returns a tiktoken.Encoding."""
    if vocab_size < 256 + len(SPECIAL):
        expected = f"at least {256 + len(SPECIAL)}, the bytes and {', '.join(SPECIAL)}"
        raise InputError("vocabulary size", expected, vocab_size)
    counted = Counter(word for report in reports for word in split_words(report))
    words, counts = [list(word.encode()) for word in counted], list(counted.values())
    tokens = [bytes([i]) for i in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs; the words that held it
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in pairs.items()]  # most frequent, smallest ids first
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - len(SPECIAL):
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair] or count > -2:
            continue  # the count changed since, and the heap holds the new one; or it is below 2
        token = tokens[pair[0]] + tokens[pair[1]]
        new = ids.setdefault(token, len(tokens))  # another pair may have made the same bytes
        if new == len(tokens):
            tokens.append(token)
        changed = Counter()
        for w in where.pop(pair):
            for old in zip(words[w], words[w][1:]):
                changed[old] -= counts[w]
            words[w] = merge(words[w], pair, new)
            for fresh in zip(words[w], words[w][1:]):
                changed[fresh] += counts[w]
                where[fresh].add(w)
        for other, change in changed.items():
            pairs[other] += change
            if change and pairs[other] > 1:
                heapq.heappush(heap, (-pairs[other], other))
    return make_encoding(tokens)


def merge(word, pair, new):
    """The token ids `word` with each neighbouring `pair` replaced by `new`."""
    merged = []
    for token in word:
        merged.append(token)
        if tuple(merged[-2:]) == pair:
            merged[-2:] = [new]
    return merged


def save_tokenizer(enc, path):
    """Writes tiktoken's format: a line per token, its bytes in base64 and its id."""
    tokens = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - len(SPECIAL))]
    text = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    atomic_write(path, lambda file: file.write(text))


def load_tokenizer(path):
    """Reads what `save_tokenizer` wrote."""
    try:  # tiktoken's own loader keeps a copy by path and would miss that the file changed
        lines = [line.split() for line in read_text(path).splitlines()]
        tokens = [base64.b64decode(token, validate=True) for token, _ in lines]
    except ValueError:
        raise InputError(path, "a token in base64 and its rank on each line", "others") from None
    if len(set(tokens)) < len(tokens) or not set(tokens) >= {bytes([i]) for i in range(256)}:
        raise InputError(path, "different tokens, all 256 bytes among them", "a damaged file")
    return make_encoding(tokens)


def encode_reports(enc, reports, length):
    """Encodes reports, cut to `length` tokens: (tokens (n, L), words (n, L)), both int64.
    words[i, j] is the number, from 0, of the word of report i that holds token j. Behind the end of
    a report tokens are <pad> and words -1."""
    tokens = torch.full((len(reports), length), enc.encode_single_token("<pad>"))
    words = torch.full((len(reports), length), -1)
    pieces = functools.cache(enc.encode_ordinary)
    for i, report in enumerate(reports):
        coded = [(token, w) for w, word in enumerate(split_words(report)) for token in pieces(word)]
        coded = torch.tensor(coded[:length]).reshape(-1, 2)
        tokens[i, : len(coded)], words[i, : len(coded)] = coded.T
    return tokens, words
