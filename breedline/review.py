"""A page on this machine alone, on which a person decides about the suspects: keep the label, change it, or drop the image.

Each decision is at once a line of one of two tables (decisions.py). page.py guards the page (review.html), and it needs a
token, since it shows images and changes files.
"""

import asyncio
import hashlib
import secrets
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from breedline import page
from breedline.decisions import Decision, Decisions, Meanwhile
from breedline.errors import BreedlineError
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.tables import read_csv

MAX_REQUEST = 100_000
"""Bytes of a decision that the page sends."""


class Suspect(NamedTuple):
    """An image whose label may be wrong, as reports/suspects.csv lists it."""

    name: str
    sha256: str
    split: str
    label: str
    suggested: str
    """The label that it may have instead."""
    label_probability: float
    suggested_probability: float
    likely: bool
    """Whether it is among those that are more likely wrong than not."""
    like_label: list[str]
    """The sha256 of the images most similar to it that have its label …"""
    like_suggested: list[str]
    """… and of those that have the suggested one."""


class Asked(BaseModel):
    """A decision as the page sends it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    action: Literal["keep", "relabel", "drop"]
    label: str
    """What to relabel the image to; "" otherwise."""
    former: str | None
    """The label of the decision that the page shows; "" if that is to drop it, None if there is none."""


def main(suspects: Path, presized: Path, labels: Path, corrections: Path, kept: Path, port: int | None) -> None:
    """Show the page until Ctrl-C.

    Args:
        suspects: the table of what to decide about, which the stage of that name makes.
        presized: the shard set of the images.
        labels: the table of their labels.
        corrections: the table of labels to change and images to drop.
        kept: the table of labels that somebody has found right.

    Raises:
        BreedlineError: one of the inputs is missing or damaged, or the port is taken.
    """
    review = Review(suspects, presized, labels, corrections, kept)
    review.decisions.read()  # tells a mistake of the tables at once
    if review.outdated:
        print(
            f"left out are {review.outdated} suspects whose label or picture has changed since: "
            "`dvc repro suspects` looks again",
            file=sys.stderr,
        )
    token = secrets.token_urlsafe()
    page.serve(lambda number: application(review, number, token), port, f"Decide on {{}}/#{token} (Ctrl-C ends this)")


class Review:
    """The suspects, their pictures, and what is decided about them."""

    def __init__(self, suspects: Path, presized: Path, labels: Path, corrections: Path, kept: Path) -> None:
        """Raises BreedlineError if one of the inputs is missing or damaged."""
        if not suspects.is_file():
            raise BreedlineError(f"{suspects} is missing: `dvc repro suspects` makes it")
        if not labels.is_file():
            raise BreedlineError(f"{labels} is missing: `dvc repro label` makes it, `dvc checkout` restores it")
        table = read_csv(labels, ["sha256", "label"])
        self.labels: dict[str, str] = dict(zip(table["sha256"], table["label"], strict=True))
        self.classes = sorted(set(self.labels.values()))
        self.decisions = Decisions(corrections, kept, self.labels)
        self._images = ShardSet(presized, PRESIZED_COLUMNS)
        index = self._images.index.drop_duplicates("origin").set_index("origin")
        listed = {suspect.sha256: suspect for suspect in reversed(read_suspects(suspects))}
        self.suspects = {
            sha256: suspect
            for sha256, suspect in reversed(listed.items())
            if self.labels.get(sha256) == suspect.label and sha256 in index.index
        }
        self.outdated = len(listed) - len(self.suspects)
        shown = {*self.suspects}.union(*(one.like_label + one.like_suggested for one in self.suspects.values()))
        places = index.loc[index.index.isin(shown), ["shard", "offset", "size", "sha256"]]
        self._places = {row[0]: row[1:] for row in places.itertuples(name=None)}

    def told(self) -> dict[str, object]:
        """Everything that the page needs but for the pictures; worst suspects first."""
        decided = self.decisions.read()
        return {
            "classes": self.classes,
            "suspects": [
                one._asdict()
                | {
                    "like_label": [sha256 for sha256 in one.like_label if sha256 in self._places],
                    "like_suggested": [sha256 for sha256 in one.like_suggested if sha256 in self._places],
                    "decision": _told(decided.get(one.sha256)),
                }
                for one in self.suspects.values()
            ],
        }

    def picture(self, sha256: str) -> bytes | None:
        """The JPEG of an image that the page shows, by its sha256; None for any other."""
        if sha256 not in self._places:
            return None
        shard, offset, size, expected = self._places[sha256]
        data = self._images.read(shard, offset, size)
        if hashlib.sha256(data).hexdigest() != expected:
            raise BreedlineError(f"{self._images.folder} has changed meanwhile: start breedline review again")
        return data

    def decide(self, asked: Asked) -> Decision:
        """Write what the page sends; returns the decision that is then in the tables.

        Raises:
            HTTPException: the page asks for what makes no sense.
            Meanwhile: the tables say something else than the page.
            BreedlineError: they cannot be read or written.
        """
        one = self.suspects.get(asked.sha256)
        if one is None:
            raise HTTPException(404, "it is none of the suspects: load the page again")
        if asked.action == "relabel" and asked.label not in self.classes:
            raise HTTPException(422, f"{asked.label!r} is none of the {len(self.classes)} classes")
        if asked.action == "relabel" and asked.label == one.label:
            raise HTTPException(422, "it has that label already: keep it")
        label = {"keep": one.label, "relabel": asked.label, "drop": ""}[asked.action]
        reason = (
            f"review: {one.suggested} {one.suggested_probability:.0%} against {one.label} {one.label_probability:.0%}"
        )
        return self.decisions.decide(Decision(one.name, one.sha256, asked.action, label, reason), asked.former)


def read_suspects(path: Path) -> list[Suspect]:
    """The suspects that a table lists, worst first. Raises BreedlineError if it is damaged."""
    table = read_csv(path, Suspect._fields)
    for column in ("label_probability", "suggested_probability"):
        table[column] = pd.to_numeric(table[column], errors="coerce")
        if not table[column].between(0, 1).all():
            raise BreedlineError(f"{path} is damaged: a {column} is no probability; `dvc repro suspects` makes it anew")
    table["likely"] = table["likely"] == "True"
    for column in ("like_label", "like_suggested"):
        table[column] = table[column].str.split()
    return [Suspect(*row) for row in table[list(Suspect._fields)].itertuples(index=False, name=None)]


def application(review: Review, port: int, token: str) -> Starlette:
    """The page and what it asks, for a server at that port; whoever asks needs the token."""

    def suspects(request: Request) -> Response:
        return JSONResponse(review.told())

    def picture(request: Request) -> Response:
        data = review.picture(request.path_params["sha256"])
        return (
            page.refusal(404, "it is none of the pictures") if data is None else Response(data, media_type="image/jpeg")
        )

    async def decide(request: Request) -> Response:
        try:
            asked = Asked.model_validate_json(await page.body(request, MAX_REQUEST))
        except ValidationError:
            raise HTTPException(422, "that is no decision: load the page again") from None
        try:
            decision = await asyncio.to_thread(review.decide, asked)
        except Meanwhile as error:
            return JSONResponse({"error": str(error), "decision": _told(error.decision)}, 409)
        return JSONResponse({"decision": _told(decision)})

    def undo(request: Request) -> Response:
        try:
            sha256 = review.decisions.undo()
        except Meanwhile:
            return page.refusal(409, "somebody else has changed your last decision meanwhile: it stays as it is")
        if sha256 is None:
            return JSONResponse({"sha256": None})
        return JSONResponse({"sha256": sha256, "decision": _told(review.decisions.read().get(sha256))})

    routes = [
        Route("/suspects", suspects),
        Route("/picture/{sha256}", picture),
        Route("/decide", decide, methods=["POST"]),
        Route("/undo", undo, methods=["POST"]),
    ]
    return page.application(Path(__file__).with_name("review.html"), routes, port, token)


def _told(decision: Decision | None) -> dict[str, str] | None:
    return decision and {"action": decision.action, "label": decision.label, "reason": decision.reason}
