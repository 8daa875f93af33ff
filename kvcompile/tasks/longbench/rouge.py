"""ROUGE-L as LongBench scores it: that of the package rouge, over sets of words.

Source: Lin, "ROUGE: a package for automatic evaluation of summaries" (2004), section 3; the details are those of
`rouge_l_summary_level` of the package rouge 1.0.1 (github.com/pltrdy/rouge), which LongBench calls.
"""

from __future__ import annotations

EPSILON = 1e-8  # keeps the harmonic mean of two zeros defined


def rouge_l(said: str, wanted: str) -> float:
    """F of the words that the sentences of both have in the same order, 0 to 1; 0 where one of them has no sentence.

    U: the set of words of the longest common subsequences of each sentence of one with each of the other. With the sets
    of all words S (said) and W (wanted),

        P = |U| / |S|,  R = |U| / |W|,  F = 2 P R / (P + R + 1e-8).

    A sentence ends at a full stop, words at white space; nothing is made lower case, no punctuation removed. A
    sentence of white space alone counts as one empty word.
    """
    ours, theirs = _sentences(said), _sentences(wanted)
    if not ours or not theirs:
        return 0.0
    common = {word for reference in theirs for sentence in ours for word in common_subsequence(reference, sentence)}
    precision = len(common) / len({word for sentence in ours for word in sentence})
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    return 2 * precision * recall / (precision + recall + EPSILON)


def common_subsequence(a: list[str], b: list[str]) -> list[str]:
    """A longest common subsequence, from the ends of both; of several the one that leaves words of `b` out first."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if x == y else max(lengths[i - 1][j], lengths[i][j - 1])
    words, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            words.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words[::-1]


def _sentences(text: str) -> list[list[str]]:
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]
