"""What the exactness matrix asks: two hundred prompts from templates, of kinds that take different ways through the
engine."""

from dataclasses import dataclass

_THINGS = (
    *("a lighthouse", "the ocean", "a small dog", "the moon", "an old clock", "a train", "the forest", "bread"),
    *("a river", "the desert", "a violin", "winter"),
)
_CHATS = (
    "Tell me a short story about {}.",
    "Explain to a child what {} is.",
    "Write the first line of a poem about {}.",
    "Why do people like {}? Answer in two sentences.",
    "Describe {} to someone who has never seen it.",
)
_LISTS = (
    "List five facts about {}.",
    "Give three questions that a journalist would ask about {}.",
    "Name four words that rhyme with or sound like {}, one on each line.",
    "Make a table with two columns that compares {} with a bicycle.",
    "Write the steps of a plan to paint a picture of {}, numbered from 1.",
)
_CODE = (
    "def count_{0}(words):\n    # How often is {0} among the words?\n",
    "class {1}:\n    def __init__(self, name, size):\n",
    "# Reads lines from a file and prints those that name {0}.\nimport sys\n\nfor line in sys.stdin:\n",
    "SELECT name, price FROM {0}s WHERE price <",
    'function draw{1}(canvas) {{\n  const context = canvas.getContext("2d");\n',
)
_ARITHMETIC = (
    "If {2} costs {0} dollars and I buy {1} of them, how much do I pay? Show each step.",
    "What is {0} plus {1}, and then minus 9?",
    "Count from {0} upwards, one number at a time.",
    "A train leaves with {0} passengers and {1} get off. How many are left? Explain.",
    "Write the multiplication table of {1} up to {0}.",
)
_TRANSLATIONS = (
    ("French", "I would like to see {} tomorrow morning."),
    ("Spanish", "My sister wrote a letter about {}."),
    ("German", "There was nothing there but {} and the wind."),
    ("Italian", "We talked about {} for a long time."),
    ("Portuguese", "Do you remember {}?"),
)
_ARCHIVES = ("weather", "trade", "travel", "music", "bridges")
_ARCHIVE_SENTENCES = (14, 4, 12, 7, 10)
_ARCHIVE_TASKS = (
    "Sum this up in one sentence.",
    "Which years are named?",
    "Who would read these records?",
    "Invent one more record of the same kind.",
    "What does the first record say?",
    "What does the last record say?",
    "Continue the list.",
    "Write a headline for this.",
    "Translate the first record into French.",
    "How many records are there?",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with what is asked beside it.

    Attributes:
        kind: ``archive`` (long, in groups of ten that begin alike), ``chat``, ``list``, ``code``, ``arithmetic`` or
            ``translation``.
        max_tokens: longest answer, tokens; they vary, so that batches change all the time.
        seed: of the sampled answer.
    """

    kind: str
    prompt: str
    max_tokens: int
    seed: int


def questions() -> tuple[Question, ...]:
    """Two hundred different questions, always the same ones, the kinds in turn; every fourth is an ``archive``."""
    archives = [("archive", _archive(group, task)) for group in range(5) for task in _ARCHIVE_TASKS]
    others = [
        (kind, prompt)
        for number in range(30)
        for kind, prompt in (
            ("chat", _chat(_pick(_CHATS, number).format(_pick(_THINGS, number)))),
            ("list", _chat(_pick(_LISTS, number).format(_pick(_THINGS, number + 1)))),
            ("code", _code(number)),
            ("arithmetic", _chat(_arithmetic(number))),
            ("translation", _chat(_translation(number))),
        )
    ]
    turns = [prompt for i, archive in enumerate(archives) for prompt in (archive, *others[3 * i : 3 * (i + 1)])]
    return tuple(Question(kind, prompt, 16 + 7 * i % 17, 1000 + 37 * i) for i, (kind, prompt) in enumerate(turns))


def _chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _pick(texts: tuple[str, ...], number: int) -> str:
    return texts[number % len(texts)]


def _archive(group: int, task: str) -> str:
    topic = _ARCHIVES[group]
    records = [
        f"Record {number}: in the year {1800 + 7 * number + group} the archive of {topic} grew by {number + 11} pages."
        for number in range(_ARCHIVE_SENTENCES[group])
    ]
    return _chat(f"{' '.join(records)} {task}")


def _code(number: int) -> str:
    noun = _pick(_THINGS, number).split()[-1]
    return _pick(_CODE, number).format(noun, noun.capitalize())


def _arithmetic(number: int) -> str:
    return _pick(_ARITHMETIC, number).format(12 + 5 * number, 3 + number, _pick(_THINGS, number))


def _translation(number: int) -> str:
    language, sentence = _TRANSLATIONS[number % len(_TRANSLATIONS)]
    return f'Translate into {language}: "{sentence.format(_pick(_THINGS, number))}"'
