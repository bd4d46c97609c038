"""Nobody but who has the secret of `breedline serve` can use its server, least of all a web page; and its UI works."""

import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import BrowserContext, sync_playwright

from tests.flows.served import Served, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
FORGED = """
async ([address, secret]) => {
    const body = JSON.stringify({parameters: {overrides: {"train.epochs": 77}}});
    const headers = [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json"},
        {"Content-Type": "application/json", "Authorization": "Basic " + btoa(secret)},
        {"Content-Type": "application/json", "Prefect-Csrf-Token": "x", "Prefect-Csrf-Client": "x"},
    ];
    const said = [];
    for (const mode of ["no-cors", "cors"])
        for (const some of headers)
            said.push(await fetch(address, {method: "POST", mode, body, headers: some, credentials: "include"})
                .then(answer => `${answer.type} ${answer.status}`, error => error.name));
    const form = document.createElement("form");
    Object.assign(form, {action: address, method: "POST", enctype: "text/plain", target: "frame"});
    const field = document.createElement("input");
    Object.assign(field, {name: '{"parameters": {}, "x": "', value: '"}'});
    document.body.append(Object.assign(document.createElement("iframe"), {name: "frame"}), form);
    form.append(field);
    form.submit();
    return said;
}
"""


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The address of a web page of another origin."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<title>A harmless page</title><body></body>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def browser() -> Iterator[BrowserContext]:
    """A browser of nobody's, without cookies."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.fail(
            "there is no Chromium, which `apt-get install chromium` brings, so nobody knows what web pages can do"
        )
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=FLAGS.split()) as browser,
    ):
        yield browser.new_context()


def _runs(served: Served) -> int:
    """How many runs on demand there are."""
    return int(served.ask("flow_runs/count", deployments={"name": {"any_": ["on-demand"]}}))


def test_who_lacks_the_secret_or_the_token_is_refused(served: Served) -> None:
    secret = tuple(served.exported["PREFECT_API_AUTH_STRING"].split(":"))
    assert httpx.get(f"{served.api}/admin/settings").status_code == 401
    assert httpx.post(f"{served.api}/flows/filter", json={}, auth=("breedline", "guess")).status_code in (401, 403)
    assert httpx.post(f"{served.api}/flows/filter", json={}, auth=secret).json() == {"detail": "Missing CSRF token."}
    assert served.ask("flows/filter")


def test_the_secret_is_for_its_owner_alone(served: Served) -> None:
    secret = served.exported["PREFECT_API_AUTH_STRING"].partition(":")[2]
    assert len(secret) >= 32
    file = served.folder / f"cache/serve/{served.port}.env"
    assert file.stat().st_mode & 0o777 == 0o600
    running = served.processes("")
    assert len(running) > 3
    assert not [process for process in running if secret in " ".join(process.cmdline())]
    assert secret not in (served.folder / "cache/logs/server.log").read_text()


def test_a_page_of_another_origin_starts_no_run(served: Served, browser: BrowserContext, elsewhere: str) -> None:
    deployment = served.deployment("retrain/on-demand")["id"]
    before = _runs(served)
    page = browser.new_page()
    page.goto(elsewhere)
    said = page.evaluate(
        FORGED, [f"{served.api}/deployments/{deployment}/create_flow_run", served.exported["PREFECT_API_AUTH_STRING"]]
    )
    page.frame_locator("iframe").locator("body").filter(has_text="Missing CSRF token").wait_for()
    # an opaque answer is all that a page may see of a request without leave, which the server has refused
    assert set(said) == {"opaque 0", "TypeError"}
    assert _runs(served) == before


def test_a_person_logs_in_and_sees_the_runs_and_nothing_asks_the_internet(
    served: Served, browser: BrowserContext, elsewhere: str
) -> None:
    run = served.start(overrides={"train.epochs": 40})
    assert served.ended(run) == "Completed"
    origin = served.api.removesuffix("/api")
    asked: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(origin)
    page.locator("input[type=password]").fill("breedline:guess")
    with page.expect_response(lambda answer: answer.status == 401):
        page.keyboard.press("Enter")
    # the page forgets the password when it is refused, and would forget one that was typed in the meantime
    page.wait_for_function("() => localStorage.getItem('prefect-password') === null")
    page.locator("input[type=password]").fill(served.exported["PREFECT_API_AUTH_STRING"])
    page.keyboard.press("Enter")
    page.get_by_text("Dashboard", exact=True).first.wait_for()
    page.goto(f"{origin}/runs")
    page.get_by_text("on-demand main: train.epochs=40").first.wait_for()
    page.goto(f"{origin}/runs/flow-run/{run}")
    page.get_by_text("not published, as publish is off").first.wait_for()
    assert {httpx.URL(url).netloc.decode() for url in asked if url.startswith("http")} == {
        httpx.URL(origin).netloc.decode()
    }
    test_a_page_of_another_origin_starts_no_run(served, browser, elsewhere)  # of somebody who is logged in


def test_in_another_terminal_the_printed_line_finds_the_server(served: Served, tmp_path: Path) -> None:
    (line,) = (line for line in served.log.read_text().splitlines() if "source " in line)
    command = f"{line[line.index('source ') :]} && prefect deployment run retrain/on-demand --param force='[]'"
    started = subprocess.run(
        ["bash", "-c", command],
        cwd=served.work,
        env={"PATH": served.environment["PATH"], "HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path / "prefect")},
        capture_output=True,
        text=True,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    assert f"{served.api.removesuffix('/api')}/runs/flow-run/" in started.stdout
    assert "temporary server" not in started.stdout + started.stderr
    assert not list((tmp_path / "prefect").glob("*.db"))
    until(lambda: not served.runs("retrain/on-demand", "Scheduled", "Pending", "Running"))


def test_a_server_that_is_configured_is_used_as_it_is(served: Served) -> None:
    environment = {**served.environment, **served.exported, "BREEDLINE_CACHE": str(served.folder / "other")}
    with subprocess.Popen(
        ["breedline", "serve"], cwd=served.work, env=environment, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout
            said = [next(other.stdout), next(other.stdout)]
            assert said[0].startswith("Serving retrain/nightly")
            assert said[1] == f"Look at {served.api.removesuffix('/api')}\n"
            assert not os.path.lexists(served.folder / "other/serve")
        finally:
            other.terminate()
            other.wait(60)
