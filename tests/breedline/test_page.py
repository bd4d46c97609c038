"""What the pages of the project share: the port that they are at."""

import socket

import pytest

from breedline import page
from breedline.errors import BreedlineError


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(BreedlineError, match="leave --port out"):
            page.listener(other.getsockname()[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(page, "PORT", other.getsockname()[1])
            with page.listener(None) as listener:
                assert listener.getsockname()[0] == "127.0.0.1"
