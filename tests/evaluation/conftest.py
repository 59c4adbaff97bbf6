"""A small random model with a byte-level tokenizer, on disk as a user would have it."""

import pytest

from tests.evaluation.tiny import TEXT, make_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(folder):
    from kvfold.integrations.models import load

    return load(folder)


@pytest.fixture(scope="session")
def text():
    return TEXT
