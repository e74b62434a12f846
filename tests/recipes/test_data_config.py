import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.data_config import DataConfig


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "a.txt", "held_out": 1.5}, r"held_out=1.5: a share is above 0 and below 1"),
        ({"source": "a.txt", "held_out": 0}, r"held_out=0: a share is above 0"),
        ({"source": "a.txt", "held_out": "a.txt"}, r"held_out='a.txt': is the source that is trained on"),
        ({"source": "a.txt", "held_out": "digits"}, r"held_out='digits': a built-in source is split by a share"),
        ({"source": "a.txt", "held_out": ""}, r"held_out='': names no source"),
        ({"source": "a.txt", "held_out": "b.txt", "group": "author"}, r"group='author': would be ignored"),
        ({"source": "a", "prompt": "question"}, r"prompt='question': goes with completion"),
        ({"source": "a", "completion": "answer"}, r"completion='answer': goes with prompt"),
        ({"source": "a", "messages": "m", "prompt": "p", "completion": "c"}, r"messages='m': would be ignored beside"),
        ({"source": "a", "messages": "m", "text": "t"}, r"text='t': would be ignored beside messages"),
        ({"source": "a", "prompt": "p", "completion": "c", "text": "t"}, r"text='t': would be ignored beside compl"),
        ({"source": "a.jsonl", "sample_by": "line"}, r"sample_by='line': would be ignored.*no \.txt file"),
        ({"source": "a", "lenght": 3}, r"lenght=3: is not a setting\. Known here: source, held_out, text"),
        ({"source": "a", "sequence_length": 1}, r"sequence_length=1: .*greater than or equal to 2"),
        ({"source": "a", "packing": "yes"}, r"packing='yes': is not allowed\. Allowed: true or false"),
        ({"source": ""}, r"source=''"),
        ({}, r"source"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig.build(data)


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        ({}, "text"),
        ({"text": "body"}, "text"),
        ({"messages": "turns"}, "messages"),
        ({"prompt": "question", "completion": "answer"}, "completion"),
    ],
)
def test_columns_say_what_a_row_is(columns: dict[str, str], form: str) -> None:
    assert DataConfig.build({"source": "rows.jsonl", **columns}).form == form


def test_label_column_has_the_usual_name_unless_told() -> None:
    assert DataConfig(source="a").label_column == "label"
    assert DataConfig(source="a", label="stars").label_column == "stars"


def test_config_survives_plain_data() -> None:
    config = DataConfig(source="a.txt", held_out="b.txt", sample_by="document", sequence_length=64, packing=False)
    assert DataConfig.build(config.model_dump(mode="json", exclude_unset=True)) == config
