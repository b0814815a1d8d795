"""
The words that rendered pages are made of, and which split may use which.

    train          words of the list and prose, some of them replaced by random strings
    heldout        other pages of the same kinds of words and of prose from held-out topics, no
                   random strings
    heldout_words  only words that no training text contains: there is nothing to recall, they have
                   to be read
    random_chars   only random letters and digits: no language prior helps at all

Words: words.txt (license in words.LICENSE). Prose: the topics of Python's own help, which differ a
little from one Python version to the next. Which words are held out is therefore decided by hash
alone, and is the same everywhere.
"""
import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

from nanochat.common import stable_hash

SPLITS = ("train", "heldout", "heldout_words", "random_chars")
ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyz0123456789"
RANDOM_SHARE = 0.15  # of the training words: with none the model guesses words, not letters
PROSE_SHARE = 0.2  # of the word pages, and of the sentences of whole pages in train
NUMBER_SHARE = 0.08  # of the words
FUNCTION_SHARE = 0.3  # of the words of a sentence
ZIPF_OFFSET = 20
# Among the words of a sentence; those that stand here more than once are more frequent.
FUNCTION_WORDS = (
    "the the the of of and and to to in in a is for with on by as at from it was that are or be"
).split()

# -----------------------------------------------------------------------------
# The word list


def letters(text):
    """The words of a text as the splits see them: its runs of letters, in lower case."""
    return re.findall("[a-z]+", text.lower())


@lru_cache(None)
def word_list():
    folder = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(folder, "words.txt"), encoding="ascii") as f:
        return tuple(f.read().split())


@lru_cache(None)
def held_out_words():
    """frozenset of a tenth of the list, by hash."""
    # No short words: "able" and "ment" are syllables that BPE may well merge into one token.
    long_words = [word for word in word_list() if len(word) >= 5]
    return frozenset(word for word in long_words if stable_hash(word) % 10 == 0)


@lru_cache(None)
def held_out_list():
    """The held-out words in alphabetical order: random.choice needs a fixed one."""
    return tuple(sorted(held_out_words()))


@lru_cache(None)
def train_words():
    """All other words, the most common first. Which ones are common is decided by hash."""
    words = [word for word in word_list() if word not in held_out_words()]
    return tuple(sorted(words, key=stable_hash))


def ranked(rng, words):
    """
    One of `words`, rank r with odds 1 / (r + 20): Zipf's law without its peak. A third of all draws
    are among the first hundred words.
    """
    # Inverse of the cumulative distribution, which grows as log(r + 20).
    rank = ZIPF_OFFSET * ((len(words) / ZIPF_OFFSET + 1) ** rng.random() - 1)
    return words[int(rank)]


def random_string(rng):
    """2 to 8 letters and digits that spell no held-out word."""
    while True:
        string = "".join(rng.choices(ALPHANUMERIC, k=rng.randint(2, 8)))
        if held_out_words().isdisjoint(letters(string)):
            return string


# -----------------------------------------------------------------------------
# Prose

# A word with inner hyphens or apostrophes and one mark after it, or a short number.
PLAIN_WORD = re.compile(r"[A-Za-z]+(?:[-'][A-Za-z]+)*[.,;:]?|[0-9]{1,4}[.,]?")
# Of reStructuredText: quotes, asterisks, backticks, and parentheses that stand around whole words.
MARKUP = re.compile(r'["*`]|\(\)|(?<!\S)\(|\)(?!\w)')


def paragraphs(held_out):
    """list of one-line paragraphs without markup, from a tenth of the topics (True) or the rest."""
    # Whole topics are held out: paragraphs of one topic repeat each other's phrases.
    found = []
    for name in sorted(topics):
        topic_is_held_out = stable_hash(name) % 10 == 0
        if topic_is_held_out == held_out:
            for paragraph in re.split(r"\n\s*\n", topics[name]):
                found.append(" ".join(MARKUP.sub("", paragraph).split()))
    return found


def plain_runs(paragraph):
    """list of the runs of 8 or more plain words between code, tables, long and held-out words."""
    runs = [[]]
    for word in paragraph.split():
        is_plain = PLAIN_WORD.fullmatch(word) and len(word) <= 12
        if is_plain and held_out_words().isdisjoint(letters(word)):
            runs[-1].append(word)
        else:
            runs.append([])
    return [run for run in runs if len(run) >= 8]


@lru_cache(None)
def prose(held_out):
    """tuple of words: the plain sentences of the held-out topics (True) or of the rest."""
    # Topics quote each other: training drops every paragraph that a held-out topic has too.
    quoted = set() if held_out else set(paragraphs(True))
    words = []
    for paragraph in dict.fromkeys(paragraphs(held_out)):  # each once, in order
        if paragraph not in quoted:
            for run in plain_runs(paragraph):
                words.extend(run)
    return tuple(words)


@lru_cache(None)
def prose_sentences(held_out):
    """list of the sentences of that prose, each a list of words, none twice."""
    sentences = re.split(r"(?<=\.) ", " ".join(prose(held_out)))
    return [sentence.split() for sentence in dict.fromkeys(sentences)]


# -----------------------------------------------------------------------------
# Phrases, numbers and sentences of whole pages


def draw_words(rng, split, low, high, own=()):
    """
    low to high words of the split, or of `own`, the words of a user's text: a heading, a label, a
    cell. The first has a capital, except in random_chars.
    """
    n = rng.randint(low, high)
    if split == "random_chars":
        return [random_string(rng) for _ in range(n)]

    if split == "heldout_words" and not own:
        own = held_out_list()
    if own:
        words = [rng.choice(own) for _ in range(n)]
    else:
        words = [ranked(rng, train_words()) for _ in range(n)]
    # Not str.capitalize, which would lower the other letters of a user's own words.
    first = words[0]
    words[0] = first[0].upper() + first[1:]
    return words


def draw_number(rng):
    """A whole number, decimal, percentage, price, year or time of day, as printed."""
    n = rng.randrange(10 ** rng.randint(1, 4))
    forms = (
        f"{n}",
        f"{n:,}",
        f"{n / 10:.1f}",
        f"{n % 100}%",
        f"${n}",
        f"{1900 + n % 130}",
        f"{n % 24}:{n % 60:02}",
    )
    return rng.choice(forms)


def draw_sentence(rng, split):
    """list of 5 to 18 words, with function words, numbers and punctuation as the split allows."""
    words = draw_words(rng, split, 5, 18)
    if split == "random_chars":
        return words

    last = len(words) - 1
    for k in range(len(words)):
        # One draw decides between random string, function word, number and the word as it is.
        u = rng.random()
        if split == "train" and u < RANDOM_SHARE:
            words[k] = random_string(rng)
        elif split != "heldout_words" and k > 0:  # the first word stays, it has the capital
            if u > 1 - NUMBER_SHARE:
                words[k] = draw_number(rng)
            elif u > 1 - FUNCTION_SHARE - NUMBER_SHARE:
                words[k] = rng.choice(FUNCTION_WORDS)

        if k == last:
            words[k] += rng.choice("........?!")
        elif rng.random() < 0.06:
            words[k] += rng.choice(",,,;:")
    return words


# -----------------------------------------------------------------------------
# A user's own text


def read_paragraphs(paths, split):
    """
    list of one-line paragraphs of UTF-8 files, cut at blank lines, no paragraph twice. One in ten,
    by its hash, is in the split heldout, the others are in train; no other split has any.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    found = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # -sig: with or without a BOM
        except UnicodeDecodeError as error:
            raise ValueError(
                f"text file {path} is not UTF-8 ({error}): "
                "convert it, e.g. iconv -f latin1 -t utf-8"
            ) from error
        if not text.strip():
            raise ValueError(f"text file {path} is empty: leave it out")
        # NFC: an accent and its letter become one character, which has a glyph of its own.
        for paragraph in re.split(r"\n\s*\n", unicodedata.normalize("NFC", text)):
            if paragraph.strip():
                found.append(" ".join(paragraph.split()))

    # By hash, so that a paragraph stays in its split when files are added or put in another order.
    part = []
    for paragraph in dict.fromkeys(found):
        split_of_paragraph = "train" if stable_hash(paragraph) % 10 else "heldout"
        if split_of_paragraph == split:
            part.append(paragraph)
    return part
