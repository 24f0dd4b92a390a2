"""ROUGE-1, -2 and -L of summaries, and the geometric mean that the paper calls "overall"."""

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge_scores(predictions, references):
    """Mean F-measures over pairs, in percent.

    Args:
        predictions (`list[str]`): the summaries.
        references (`list[str]`): what each should have been, in the same order.

    Returns:
        `dict[str, float]`: `rouge1`, `rouge2`, `rougeL`, and `overall`, the geometric mean of the three means.

    Raises:
        ValueError: when the lists are empty or of different length, or a reference is empty.
        ImportError: when `rouge-score` is not installed (`pip install rouge-score`).
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: give at least one pair, with a "
            "reference for each prediction"
        )
    empty = [index for index, reference in enumerate(references) if not reference.strip()]
    if empty:
        raise ValueError(f"references {empty} are empty: there is nothing to compare with, leave these pairs out")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the package rouge-score: pip install rouge-score") from error
    scorer = RougeScorer(KINDS, use_stemmer=True)
    pairs = [scorer.score(reference, said) for said, reference in zip(predictions, references, strict=True)]
    means = {kind: 100 * sum(pair[kind].fmeasure for pair in pairs) / len(pairs) for kind in KINDS}
    return {**means, "overall": (means["rouge1"] * means["rouge2"] * means["rougeL"]) ** (1 / 3)}
