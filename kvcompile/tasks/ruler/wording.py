"""What RULER says around a context: part of the definition of each of its tasks, to the letter.

Source: RULER (Hsieh et al., arXiv 2404.06654), `scripts/data/synthetic/constants.py` of github.com/NVIDIA/RULER.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.tasks.prompt import Prompt


@dataclass(frozen=True)
class Wording:
    """The three parts of a prompt, with blanks.

    Attributes:
        before: what stands before the question, `{context}` in it.
        question, start: the question, and how the answer begins.
        tokens: of an answer, at most.
        any: one of the answers is enough (RULER's `string_match_part`), where else the score is the share of the
            answers that was found (`string_match_all`).
    """

    before: str
    question: str
    start: str
    tokens: int
    any: bool = False

    def draft(self, context: str, answers: tuple[str, ...], example: str = "", **blanks: str) -> Draft:
        """The prompt with its blanks filled. example: what stands before everything."""
        prompt = Prompt(
            example + self.before.format(context=context, **blanks),
            self.question.format(**blanks),
            self.start.format(**blanks),
        )
        return Draft(prompt, answers, self)


@dataclass(frozen=True)
class Draft:
    """A prompt, the right answers to it, and the wording it is made of."""

    prompt: Prompt
    answers: tuple[str, ...]
    wording: Wording


NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE_NEEDLE = Wording(
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n",
    "What is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
    128,
)
NEEDLES = Wording(
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n",
    "What are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
    128,
)
VARIABLES = Wording(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n",
    "Question: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: ",
    30,
)
COMMON_WORDS = Wording(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n",
    "Question: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
    120,
)
FREQUENT_WORDS = Wording(
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n",
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    50,
)
DOCUMENTS = Wording(
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n",
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}",
    " Answer:",
    32,
    any=True,
)
WORDINGS = (ONE_NEEDLE, NEEDLES, VARIABLES, COMMON_WORDS, FREQUENT_WORDS, DOCUMENTS)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
