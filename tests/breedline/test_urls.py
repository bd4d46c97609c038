"""What of a url may be said: never a user, a password, a token or a signature."""

import pytest

from breedline.errors import BreedlineError, NetworkError
from breedline.urls import redacted

SECRET = "s3cret"  # noqa: S105
SIGNED = f"X-Amz-Credential={SECRET}%2F20261124&X-Amz-Signature={SECRET}"
WITH_SECRETS = {
    f"https://user:{SECRET}@host/pets.tgz": "https://host/pets.tgz",
    f"https://{SECRET}@host/pets.tgz": "https://host/pets.tgz",
    f"https://user:{SECRET}@host:8080/pets.tgz": "https://host:8080/pets.tgz",
    f"HTTPS://user:{SECRET}@host/pets.tgz": "HTTPS://host/pets.tgz",
    f"https://host/pets.tgz?token={SECRET}": "https://host/pets.tgz?…",
    f"https://host/pets.tgz?{SECRET}": "https://host/pets.tgz?…",
    f"https://host/pets.tgz?token={SECRET}==": "https://host/pets.tgz?…",
    f"https://host/pets.tgz#{SECRET}": "https://host/pets.tgz#…",
    f"https://host?sig={SECRET}/{SECRET}?{SECRET}": "https://host?…",
    f"https://bucket.s3.amazonaws.com/a/pets.tgz?{SIGNED}": "https://bucket.s3.amazonaws.com/a/pets.tgz?…",
    f"s3://key:{SECRET}@bucket/pets.tgz?versionId={SECRET}": "s3://bucket/pets.tgz?…",
    f"https://user:p@{SECRET}@host/x?a=b&token={SECRET}#{SECRET}": "https://host/x?…",
    f"https://user:{SECRET}/{SECRET}@host/x": "https://host/x",
    f"https://user:{SECRET}?{SECRET}@host/x": "https://host/x",
    f"https://user:{SECRET}#{SECRET}@host/x": "https://host/x",
    f"https://user:a {SECRET}@host/x": "https://host/x",
    f"https:/user:{SECRET}@host/x": "https:/host/x",
    f"zip://a.jpg::https://user:{SECRET}@host/x.zip?sig={SECRET}": "zip://host/x.zip?…",
}
WITHOUT = [
    "digits",
    "did you mean https://host/pets.tgz?",
    "/data/what?.csv",
    "../photos@home",
    "https://host/a/pets.tgz",
    "https://host:8080/pets.tgz",
    "https://cdn.host/npm/pets@1.2/pets.tgz",
    "http://[::1]:8080/pets.tgz",
    "s3://bucket/a folder/pets.tgz",
    r"label.pattern = '(?P<label>colou?r=.+)@\d+'",
]


@pytest.mark.parametrize(("url", "shown"), WITH_SECRETS.items())
def test_a_secret_in_a_url_is_not_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize("text", WITHOUT)
def test_what_holds_no_secret_is_shown_as_it_is(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("text", ["{}: no answer", "no '{}', mend it", 'at "{}".', "({}): it", "[URL('{}')]", "{}"])
@pytest.mark.parametrize(("url", "shown"), WITH_SECRETS.items())
def test_a_url_within_a_text_is_redacted_and_the_text_around_it_stays(text: str, url: str, shown: str) -> None:
    assert redacted(text.format(url)) == text.format(shown)


def test_every_url_of_a_text_is_redacted() -> None:
    one, other = f"https://a:{SECRET}@host/1?x={SECRET}", f"http://host/2?x={SECRET}"
    assert redacted(f"{one} -> {other}") == "https://host/1?… -> http://host/2?…"


@pytest.mark.parametrize("kind", [BreedlineError, NetworkError])
def test_no_expected_error_shows_a_secret(kind: type[BreedlineError]) -> None:
    assert str(kind(f"https://user:{SECRET}@host/x: no answer")) == "https://host/x: no answer"


@pytest.mark.timeout(5)
@pytest.mark.parametrize("text", ["a{}", "http://a{}b", "http://{}@", "http://@{}", "http://h?{}a", "http://h?{}@"])
@pytest.mark.parametrize("filler", ["a", ":", "@", "!", "?", "/", "a:", "://", "a://", "?a@"])
def test_a_long_text_takes_no_long_time(text: str, filler: str) -> None:
    whole = text.format(filler * 100_000)
    assert len(redacted(whole)) <= len(whole) + len("…")
