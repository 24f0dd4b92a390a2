"""What the rows that teach a memory are made of."""

from dataclasses import dataclass

from .needles import MOST_DIGITS, NAMES, WORDS


@dataclass(frozen=True)
class MemoryRowStyle:
    """What the rows are made of.

    Args:
        least_segments (`int`, *optional*, defaults to `2`): segments of the shortest row.
        most_segments (`int`, *optional*, defaults to `8`): segments of the longest row.
        grass_fraction (`float`, *optional*, defaults to `0.3`): share of rows in the benchmark's filler.
        passkey_fraction (`float`, *optional*, defaults to `0.7`): share of rows with one passkey; the others have
            named facts, all of them asked for. Of the rows that `ruler_fraction` leaves.
        word_fraction (`float`, *optional*, defaults to `0.5`): share of the rows with named facts that hold words; the
            others hold keys.
        ruler_fraction (`float`, *optional*, defaults to `0.0`): share of the rows with facts that state them in the
            sentences of RULER, of a pair of words each, `most_facts` at most. In a quarter of them a fact is alone.
        ruler_word_fraction (`float`, *optional*, defaults to `0.5`): share of these whose values are pairs of words;
            the others have numbers.
        most_facts (`int`, *optional*, defaults to `4`): the most named facts in a row; in a short row, what it has
            room for.
        dilute_named (`bool`, *optional*, defaults to `True`): whether the writes of rows with named facts may be
            scaled too. A scaled segment drowns the facts of others, which no long stream does: there, filler is long.
        dense (`bool`, *optional*, defaults to `False`): as many facts in a row as it has room for, up to `most_facts`:
            the most questions for the time.
        most_gap (`int`, *optional*, defaults to `0`): up to so many tokens of filler before each question but the
            first, as if each had been asked alone after a text.
        brief_fraction (`float`, *optional*, defaults to `0.0`): share of the rows with named facts whose facts and
            questions are as brief as can be: what is said of a name is told apart by it sooner.
        alike_fraction (`float`, *optional*, defaults to `0.0`): share of the rows with named keys that are all made of
            the same two digits: what is said of a name can then be told apart by the name alone. Digits that differ
            find the next one by the last, whoever is asked for.
        distinct_keys (`bool`, *optional*, defaults to `False`): no two names of a row have the same key. Of two digits
            there are few keys: else every third row of twelve such facts has a name that another's key is right for.
            (Facts in the sentences of RULER are drawn from many, and may share a value.)
        number_fraction (`float`, *optional*, defaults to `0.0`): share of the rows with facts whose filler holds a few
            numbers that nobody asks for, of four digits at most: a long stream of novels holds hundreds, a short row
            hardly any.
        most_digits (`int`, *optional*, defaults to `7`): digits of the longest key; the shortest has five.
        rows_alike (`int`, *optional*, defaults to `16`): so many rows in turn are equally long: a batch of them
            holds no padding.
        answer_weight (`float`, *optional*, defaults to `2.0`): how often the mean loss of the answers counts beside
            the mean loss of all tokens.
        first_token_weight (`float`, *optional*, defaults to `1.0`): how often the first token of an answer counts
            beside each of the others, which can be found by what they follow, whoever is asked for; with 0 an only
            token counts all the same.
        mark_ends (`bool`, *optional*, defaults to `False`): the full stop after an answer counts as its last token.
            Keys of one length end where they always end; of several, where to stop has to be remembered too. It
            counts for the accuracy that drives memory dilution as other tokens of the answer do.
        novel_lanes (`int`, *optional*, defaults to `0`): of every `rows_alike` rows the first so many read on in a
            novel, where the last `rows_alike` rows left it; for `carry_memory`, batches of `rows_alike` rows, and
            `train_sampling_strategy="sequential"`.
        longest_reading (`int`, *optional*, defaults to `65536`): tokens of the longest such reading; their lengths are
            log-uniform from the longest row on.
    """

    least_segments: int = 2
    most_segments: int = 8
    grass_fraction: float = 0.3
    passkey_fraction: float = 0.7
    word_fraction: float = 0.5
    ruler_fraction: float = 0.0
    ruler_word_fraction: float = 0.5
    most_facts: int = 4
    dilute_named: bool = True
    dense: bool = False
    most_gap: int = 0
    brief_fraction: float = 0.0
    alike_fraction: float = 0.0
    distinct_keys: bool = False
    number_fraction: float = 0.0
    most_digits: int = 7
    rows_alike: int = 16
    answer_weight: float = 2.0
    first_token_weight: float = 1.0
    mark_ends: bool = False
    novel_lanes: int = 0
    longest_reading: int = 65_536

    def __post_init__(self):
        """Refuse what no row can be drawn of.

        Raises:
            ValueError: names the value and what it may be.
        """
        least = {"least_segments": 1, "most_facts": 1, "most_gap": 0, "rows_alike": 1, "longest_reading": 1}
        # Shorter keys have too few numbers.
        least |= {"most_digits": 5, "most_segments": self.least_segments, "novel_lanes": 0}
        least |= {"answer_weight": 0.0, "first_token_weight": 0.0}
        most = dict.fromkeys((name for name in vars(self) if name.endswith("_fraction")), 1.0)
        least |= dict.fromkeys(most, 0.0)
        # Names and words of a row are distinct.
        most |= {"most_facts": min(len(NAMES), len(WORDS)), "novel_lanes": self.rows_alike - 1}
        most |= {"most_digits": MOST_DIGITS}
        for name, low in least.items():
            value, high = getattr(self, name), most.get(name)
            if value < low or (high is not None and value > high):
                bound = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name}={value}: must be {bound}")
