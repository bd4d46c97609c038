"""What a flow run is called."""

from types import SimpleNamespace

import pytest

from flows.names import run_name


def test_a_name_shows_no_secret_of_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [{"url": "https://user:s3cret@host/pets.tgz?token=s3cret"}]
    given = {"ref": "main", "overrides": {"download.sources": sources}}
    monkeypatch.setattr("flows.names.flow_run", SimpleNamespace(tags=[], parameters=given))
    monkeypatch.setattr("flows.names.deployment", SimpleNamespace(name="on-demand"))
    assert run_name() == "on-demand main: download.sources=[{'url': 'https://host/pets.tgz?…'}]"
