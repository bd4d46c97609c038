"""The page of `breedline review`: what it shows of the suspects, what becomes of a decision, and whom it answers."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from ruamel.yaml import YAML
from starlette.testclient import TestClient

from breedline import review
from breedline.corrections import read_corrections
from breedline.decisions import KEPT
from breedline.errors import BreedlineError
from breedline.review import Review, Suspect
from breedline.shards import PRESIZED_COLUMNS, pack, write_index
from breedline.tables import read_csv, write_csv
from flows.cli import REVIEWED, _parser
from tests.conftest import picture

ROOT = Path(__file__).parents[2]
PORT, TOKEN = 8123, "a-token"
HERE = f"http://127.0.0.1:{PORT}"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Origin": HERE}
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
CANARY = "<img src=x onerror=window.canary=1>"
SECONDS_FOR_300 = 600


def content(number: int) -> str:
    """The sha256 of the original of image `number`."""
    return hashlib.sha256(b"%d" % number).hexdigest()


def suspect(number: int, **others: Any) -> Suspect:
    """Image `number`, labelled `pug`, which may be a beagle; like it are images 0 and 1."""
    values: dict[str, Any] = {
        "name": f"pug_{number}.jpg",
        "sha256": content(number),
        "split": "train",
        "label": "pug",
        "suggested": "beagle",
        "label_probability": 0.01,
        "suggested_probability": 0.97,
        "likely": True,
        "like_label": [content(0)],
        "like_suggested": [content(1)],
    }
    return Suspect(**values | others)


def project(suspects: list[Suspect], pictures: dict[str, bytes] | None = None, images: int = 12) -> None:
    """A folder with the suspects and what belongs to them: image 1 is a beagle, 2 a boxer, all others are pugs."""
    labels = pd.DataFrame({"sha256": [content(number) for number in range(images)]})
    labels["name"] = [f"pug_{number}.jpg" for number in range(images)]
    labels["label"] = "pug"
    labels["split"] = "train"
    labels.loc[[1, 2], "label"] = ["beagle", "boxer"]
    for one in suspects:
        labels.loc[labels["sha256"] == one.sha256, ["name", "label", "split"]] = [one.name, one.label, one.split]
    for folder in ("data/presized", "reports"):
        Path(folder).mkdir(parents=True)
    write_csv(labels, Path("data/labels.csv"))
    files = pictures or {sha256: picture(number % 256) for number, sha256 in enumerate(labels["sha256"])}
    entries = pack(
        ((f"{sha}.jpg", len(data), io.BytesIO(data)) for sha, data in files.items()), Path("data/presized"), "00"
    )
    index = pd.DataFrame(entries).assign(height=40, width=48, made="kept", origin=list(files))
    write_index(index[PRESIZED_COLUMNS], Path("data/presized"))
    write_suspects(suspects)
    Path("data/corrections.csv").write_text("name,sha256,action,label,reason\n")
    write_csv(pd.DataFrame(columns=KEPT), Path("data/kept.csv"))


def write_suspects(suspects: list[Suspect]) -> None:
    table = pd.DataFrame(suspects, columns=Suspect._fields)
    for column in ("like_label", "like_suggested"):
        table[column] = table[column].str.join(" ")
    table.insert(7, "score", 0.01)
    write_csv(table, Path(REVIEWED["suspects"]))


def opened() -> Review:
    paths = {name: Path(path) for name, path in REVIEWED.items()}
    return Review(**paths)


def client(made: Review | None = None) -> TestClient:
    return TestClient(review.application(made or opened(), PORT, TOKEN), base_url=HERE, headers=HEADERS)


def decide(page: TestClient, number: int, action: str, label: str = "", former: str | None = None) -> Any:
    return page.post("/decide", json={"sha256": content(number), "action": action, "label": label, "former": former})


def test_it_tells_what_there_is_to_decide() -> None:
    gone = content(99)
    project([suspect(5, name=CANARY, like_label=[content(0), gone]), suspect(3, likely=False, split="test")])
    told = client().get("/suspects").json()
    assert told["classes"] == ["beagle", "boxer", "pug"]
    first, second = told["suspects"]
    assert (first["name"], first["likely"], second["likely"], second["split"]) == (CANARY, True, False, "test")
    assert (first["label_probability"], first["suggested_probability"]) == (0.01, 0.97)
    assert (first["like_label"], first["like_suggested"]) == ([content(0)], [content(1)])
    assert first["decision"] is None


def test_a_decision_is_in_its_table_at_once_and_undo_takes_it_back() -> None:
    project([suspect(number) for number in (3, 4, 5)])
    page = client()
    assert decide(page, 3, "relabel", "boxer").json()["decision"]["label"] == "boxer"
    assert decide(page, 4, "drop").json()["decision"]["action"] == "drop"
    assert decide(page, 5, "keep").json()["decision"]["action"] == "keep"
    table = read_corrections(Path("data/corrections.csv"))
    reason = "review: beagle 97% against pug 1%"
    assert table.to_numpy().tolist() == [
        ["pug_3.jpg", content(3), "relabel", "boxer", reason],
        ["pug_4.jpg", content(4), "drop", "", reason],
    ]
    assert read_csv(Path("data/kept.csv"), KEPT).to_numpy().tolist() == [["pug_5.jpg", content(5), "pug", reason]]
    assert [one["decision"]["action"] for one in client().get("/suspects").json()["suspects"]] == [
        "relabel",
        "drop",
        "keep",
    ]
    assert page.post("/undo", json={}).json() == {"sha256": content(5), "decision": None}
    assert len(read_csv(Path("data/kept.csv"), KEPT)) == 0
    assert [page.post("/undo", json={}).json()["sha256"] for _ in range(3)] == [content(4), content(3), None]


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({"action": "relabel", "label": "cat"}, 422, "'cat' is none of the 3 classes"),
        ({"action": "relabel", "label": ""}, 422, "'' is none of the 3 classes"),
        ({"action": "relabel", "label": "pug"}, 422, "keep it"),
        ({"sha256": content(0)}, 404, "none of the suspects"),
        ({"sha256": "../../etc/passwd"}, 404, "none of the suspects"),
        ({"action": "burn"}, 422, "that is no decision"),
        ({"more": 1}, 422, "that is no decision"),
        ({"former": 7}, 422, "that is no decision"),
        ({"label": "x" * review.MAX_REQUEST}, 413, "larger than 0.1 MB"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, Any], status: int, said: str) -> None:
    project([suspect(3)])
    whole = {"sha256": content(3), "action": "drop", "label": "", "former": None}
    answer = client().post("/decide", json=whole | asked)
    assert answer.status_code == status
    assert said in answer.json()["error"]
    assert len(read_corrections(Path("data/corrections.csv"))) == 0


def test_what_somebody_else_has_decided_meanwhile_is_told() -> None:
    project([suspect(3)])
    page, other = client(), client()
    decide(other, 3, "drop")
    answer = decide(page, 3, "relabel", "beagle")
    assert answer.status_code == 409
    assert answer.json()["decision"]["action"] == "drop"
    assert decide(page, 3, "relabel", "beagle", former="").json()["decision"]["label"] == "beagle"
    answer = other.post("/undo", json={})
    assert (answer.status_code, "stays as it is" in answer.json()["error"]) == (409, True)


def test_tables_that_contradict_themselves_are_told_in_words() -> None:
    project([suspect(3)])
    page = client()
    with Path("data/corrections.csv").open("a") as table:
        table.write(f"a,{content(4)},drop,,\na,{content(4)},relabel,pug,\n")
    for answer in (decide(page, 3, "drop"), page.get("/suspects")):
        assert answer.status_code == 500
        assert "leave one of the lines 2 and 3" in answer.json()["error"]


def test_only_pictures_that_it_shows_are_given() -> None:
    project([suspect(3)])
    page = client()
    for number in (3, 0, 1):
        answer = page.get(f"/picture/{content(number)}")
        assert (answer.headers["content-type"], answer.content) == ("image/jpeg", picture(number))
    for name in (content(2), "0" * 64, "%2e%2e", "%2e%2e%2flabels.csv", f"{content(3)}.jpg", ""):
        assert page.get(f"/picture/{name}").status_code == 404, name


def test_a_picture_that_is_another_one_by_now_is_not_shown() -> None:
    project([suspect(3)])
    page = client()
    (volume,) = Path("data/presized").glob("*.tar")
    volume.write_bytes(bytes(volume.stat().st_size))
    answer = page.get(f"/picture/{content(3)}")
    assert answer.status_code == 500
    assert "start breedline review again" in answer.json()["error"]


@pytest.mark.parametrize("given", [None, "", "a-token", "Bearer ", "Bearer a-toke", "Bearer a-token2", "Bearer \xe9"])
def test_without_the_token_there_is_nothing_but_the_page(given: str | None) -> None:
    project([suspect(3)])
    page = TestClient(review.application(opened(), PORT, TOKEN), base_url=HERE)
    headers = {"Origin": HERE} | ({} if given is None else {"Authorization": given.encode("latin-1")})  # type: ignore[dict-item]
    assert page.get("/", headers=headers).status_code == 200
    for path in ("/suspects", f"/picture/{content(3)}", "/nothing"):
        assert page.get(path, headers=headers).status_code == 403
    asked = {"sha256": content(3), "action": "drop", "label": "", "former": None}
    for path in ("/decide", "/undo"):
        assert page.post(path, json=asked, headers=headers).status_code == 403
    assert len(read_corrections(Path("data/corrections.csv"))) == 0


@pytest.mark.parametrize("headers", [{"Host": f"evil.example:{PORT}"}, {"Host": "127.0.0.1"}])
def test_it_goes_by_no_other_name(headers: dict[str, str]) -> None:
    project([suspect(3)])
    assert [client().get(path, headers=headers).status_code for path in ("/", "/suspects")] == [421, 421]


def test_no_other_page_may_decide() -> None:
    project([suspect(3)])
    for path in ("/decide", "/undo"):
        assert client().post(path, json={}, headers={"Origin": "http://evil.example"}).status_code == 403


def test_the_page_is_whole_in_itself_and_guarded() -> None:
    project([suspect(3)])
    answer = client().get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert TOKEN not in answer.text
    assert re.findall(r"""(?:src|href|action)="([^"]*)""", answer.text) == ["data:,"]
    assert not re.search(r"https?://|@import|url\(|innerHTML|\sstyle=|\son\w+=", answer.text)


def test_without_suspects_the_stage_that_finds_them_is_named() -> None:
    project([])
    Path(REVIEWED["suspects"]).unlink()
    with pytest.raises(BreedlineError, match=r"^reports/suspects\.csv is missing: `dvc repro suspects` makes it$"):
        opened()


def test_an_image_is_asked_about_once_and_only_as_it_is_now() -> None:
    project([suspect(3), suspect(4), suspect(3), suspect(5)])
    write_suspects([suspect(3), suspect(4, label="boxer"), suspect(3), suspect(50), suspect(5)])
    made = opened()
    assert list(made.suspects) == [content(3), content(5)]
    assert made.outdated == 2


@pytest.mark.parametrize("probability", ["nan", "inf", "-0.1", "2", "x", ""])
def test_a_table_that_is_damaged_is_one_line(probability: str) -> None:
    project([suspect(3)])
    write_suspects([suspect(3, label_probability=probability)])
    with pytest.raises(BreedlineError, match="a label_probability is no probability; `dvc repro suspects`"):
        opened()


def test_it_reads_and_writes_what_the_pipeline_does() -> None:
    pipeline = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    assert {REVIEWED["labels"], REVIEWED["presized"]} <= {*pipeline["label"]["outs"], *pipeline["presize"]["outs"]}
    assert REVIEWED["suspects"] in pipeline["suspects"]["outs"]
    assert REVIEWED["corrections"] in pipeline["label"]["deps"]
    assert all((ROOT / REVIEWED[name]).is_file() for name in ("corrections", "kept"))
    assert vars(_parser().parse_args(["review"]))["port"] is None


# In a browser


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The address of `breedline review` in this folder, token and all; it must end quietly by Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = [sys.executable, "-c", "from flows.cli import main; main()", "review", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            told = process.stdout.readline()
            found = re.fullmatch(rf"Decide on (http://127\.0\.0\.1:{port}/#[\w-]{{43}}) \(Ctrl-C ends this\)\n", told)
            assert found, (told, process.stderr and process.stderr.read())
            yield found[1]
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == ("", "")
            assert process.returncode == 0
        finally:
            process.kill()


@contextlib.contextmanager
def browsed(**options: Any) -> Iterator[Page]:
    """A browser's page of a review; in the end nothing has gone wrong in it, and nobody else was asked for anything."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.fail("there is no Chromium, which `apt-get install chromium` brings, so nobody knows what the page does")
    expect.set_options(timeout=60_000)  # other tests compute at the same time
    with (
        running() as address,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=FLAGS.split()) as browser,
    ):
        page = browser.new_page(**options)
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(address)
        yield page
        assert wrong == []
        here = address.partition("#")[0]
        assert {url for url in asked if not url.startswith((here, f"blob:{here}", "data:"))} == set()
        assert all("#" not in url.removeprefix(address) for url in asked)


def shown(page: Page, number: int) -> None:
    expect(page.locator("#card")).to_have_attribute("data-shown", content(number))


@pytest.mark.slow
def test_a_browser_decides_by_keyboard() -> None:
    """Each key; a filter; names are text, however they are meant; and what is not saved keeps its card."""
    project(
        [
            suspect(3, name=CANARY, suggested=CANARY, label_probability=0.0, suggested_probability=1.0),
            suspect(2, label="boxer", split="test"),
            *(suspect(number, likely=number < 6) for number in range(4, 8)),
        ]
    )
    corrections, kept = Path("data/corrections.csv"), Path("data/kept.csv")
    with browsed(viewport={"width": 360, "height": 740}) as page:
        count, error, done = page.locator("#count"), page.get_by_role("alert"), page.locator("#done")
        expect(count).to_have_text("0 of 6 decided")
        shown(page, 3)
        card = page.get_by_role("region", name="Suspect")
        expect(card.locator("#stage img")).to_have_js_property("naturalWidth", 48)
        expect(card.locator(".alike img")).to_have_count(2)
        expect(card.locator("#file")).to_have_text(CANARY)
        assert card.locator(".name").all_inner_texts() == ["pug", CANARY]
        widths = card.locator(".bar").evaluate_all(
            "all => all.map(bar => bar.offsetWidth / bar.parentElement.offsetWidth)"
        )
        assert widths == pytest.approx([0, 1], abs=0.02)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        page.keyboard.press("r")  # its suggestion is no class of the data
        expect(error).to_contain_text("is none of the 3 classes")
        shown(page, 3)
        page.keyboard.press("s")
        shown(page, 2)
        page.keyboard.press("ArrowLeft")
        shown(page, 3)
        page.keyboard.press("d")
        expect(done).to_have_text(f"\u2068{CANARY}\u2069: dropped.")
        expect(error).to_have_text("")
        shown(page, 2)
        page.keyboard.press("Enter")
        expect(done).to_contain_text("relabelled \u2068beagle\u2069")
        expect(page.locator("#upcoming")).to_contain_text(
            "labelled \u2068pug\u2069, suggested \u2068beagle\u2069 97.0%"
        )
        shown(page, 4)
        page.keyboard.press("k")
        expect(count).to_have_text("3 of 6 decided")
        shown(page, 5)
        assert len(read_csv(kept, KEPT)) == 1
        page.keyboard.press("u")
        shown(page, 4)
        expect(done).to_contain_text("undone")
        assert len(read_csv(kept, KEPT)) == 0

        page.keyboard.press("/")
        expect(page.get_by_label("Another label")).to_be_focused()
        assert page.locator("#class").evaluate("box => getComputedStyle(box).outlineStyle") == "solid"
        page.keyboard.type("dk")  # no keys of the card, here
        page.keyboard.press("Enter")
        expect(error).to_contain_text("\u2068dk\u2069 is none of the 3 classes")
        page.get_by_label("Another label").fill("boxer")
        page.keyboard.press("Enter")
        shown(page, 5)
        expected = [["drop", ""], ["relabel", "beagle"], ["relabel", "boxer"]]
        assert read_corrections(corrections)[["action", "label"]].to_numpy().tolist() == expected

        contradiction = corrections.read_text()
        corrections.write_text(contradiction + f"x,{content(3)},relabel,pug,\n")
        page.keyboard.press("d")
        expect(error).to_contain_text("Not saved: ")
        expect(error).to_contain_text("more than one decision")
        shown(page, 5)
        expect(count).to_have_text("3 of 6 decided")
        corrections.write_text(contradiction + f"pug_5.jpg,{content(5)},relabel,beagle,by another\n")
        page.keyboard.press("d")
        expect(error).to_contain_text("somebody else has decided")
        expect(page.locator("#decided")).to_have_text("Decided: relabelled \u2068beagle\u2069 (\u2068by another\u2069)")
        shown(page, 5)

        page.get_by_label("likely wrong only").check()
        expect(count).to_have_text("4 of 4 decided")
        expect(page.locator("#over")).to_have_text("All decided.")
        page.get_by_label("likely wrong only").uncheck()
        shown(page, 6)
        page.get_by_label("Split").select_option("test")
        expect(count).to_have_text("1 of 1 decided")
        page.get_by_label("Show").select_option("decided")
        shown(page, 2)
        expect(page.locator("#decided")).to_contain_text("relabelled \u2068beagle\u2069")
        page.get_by_label("Split").select_option("")
        page.locator("#filters [id=label]").select_option("boxer")
        shown(page, 2)
        page.get_by_label("Show").select_option("open")
        page.locator("#filters [id=label]").select_option("")
        page.evaluate("document.activeElement.blur()")
        shown(page, 6)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#over")).to_have_text("2 skipped.")
        page.keyboard.press("s")
        shown(page, 6)
        page.route("**/decide", lambda route: route.abort())
        page.keyboard.press("k")
        expect(error).to_have_text("Not saved: breedline does not answer; is it still running?")
        shown(page, 6)
        page.unroute("**/decide")
        page.get_by_role("button", name="Keep pug").click()
        shown(page, 7)
        page.reload()
        shown(page, 7)
        expect(count).to_have_text("5 of 6 decided")
        assert page.evaluate("window.canary") is None


# WCAG 2.1, 1.4.3: the contrast of each text that is shown, with what is behind it
CONTRASTS = """
() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = colour.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      if (colour.length === 3) return colour;
    }
  };
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    const written = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!written || !element.checkVisibility() || element.matches("script, option")) continue;
    const [one, other] = [numbers(getComputedStyle(element).color), behind(element)].map(light).sort((a, b) => b - a);
    found[`${element.tagName}.${element.className}#${element.id} ${element.textContent}`] = (one + 0.05) / (other + 0.05);
  }
  return found;
}
"""


@pytest.mark.slow
def test_all_text_has_contrast_in_both_themes() -> None:
    project([suspect(3), suspect(4)])
    Path("data/corrections.csv").write_text(f"name,sha256,action,label,reason\nx,{content(4)},drop,,\n")
    with browsed() as page:
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
            page.get_by_label("Show").select_option("decided")
            shown(page, 4)
            page.locator("#error").evaluate("error => { error.textContent = 'an error'; }")
            contrasts = page.evaluate(CONTRASTS)
            assert len(contrasts) > 20
            assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}
            page.get_by_label("Show").select_option("open")


# how long each card took from the key to its picture, and whether that was there in the first frame of its card
STOPWATCH = """
() => {
  window.took = [];
  window.late = 0;
  addEventListener("keydown", () => {
    const card = document.getElementById("card"), before = card.dataset.shown, started = performance.now();
    let frames = 0;
    const look = () => {
      const image = document.querySelector("#stage img"), changed = card.dataset.shown !== before;
      if (changed && (card.hidden || image && image.complete && image.naturalWidth)) {
        took.push(performance.now() - started);
        late += frames;
      } else {
        frames += changed;
        requestAnimationFrame(look);
      }
    };
    requestAnimationFrame(look);
  }, true);
}
"""


@pytest.mark.slow
@pytest.mark.long
def test_three_hundred_cards_in_ten_minutes(long: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """As fast as a browser goes by keyboard; each decision is in its table before the next card."""
    cards = 300 if long else 40
    names = {number: f"pug_{number}.jpg" for number in range(3, 3 + cards)}
    likes = {"like_label": [content(0), *map(content, range(cards + 3, cards + 5))], "like_suggested": [content(1)]}
    photos = {content(number): picture(number % 256, (640, 480)) for number in range(cards + 6)}
    project([suspect(number, **likes) for number in names], photos, images=cards + 6)
    keys = ["r", "k", "d", "Enter"]
    with browsed(viewport={"width": 1200, "height": 800}) as page:
        shown(page, 3)
        page.evaluate(STOPWATCH)
        started = time.perf_counter()
        for place, number in enumerate(names):
            page.keyboard.press(keys[place % 4])
            page.wait_for_function("number => took.length === number", arg=place + 1)
            assert f",{content(number)}," in Path(f"data/{'kept' if place % 4 == 1 else 'corrections'}.csv").read_text()
        seconds = time.perf_counter() - started
        expect(page.locator("#over")).to_have_text("All decided.")
        took, late = page.evaluate("took"), page.evaluate("late")
    with capsys.disabled():
        print(
            f"\nreview: {cards} cards in {seconds:.1f} s, {60 * cards / seconds:.0f} a minute; from a key to the next picture "
            f"{statistics.median(took):.0f} ms (the longest {max(took):.0f}), {late} frames without it"
        )
    assert seconds < SECONDS_FOR_300 * cards / 300
    assert late <= cards / 10  # on a machine that does much else meanwhile
    decided = read_corrections(Path("data/corrections.csv")).set_index("name")["action"].to_dict()
    decided |= dict.fromkeys(read_csv(Path("data/kept.csv"), KEPT)["name"], "keep")
    actions = ["relabel", "keep", "drop", "relabel"]
    assert decided == {name: actions[place % 4] for place, name in enumerate(names.values())}
