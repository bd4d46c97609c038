"""The remote, object by object: what it lacks is found, sent again, or reported lost."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from breedline.errors import BreedlineError, NetworkError
from flows import verify_remote
from flows.git_command import git
from flows.publish import verified, verify
from flows.remote import _md5_reported, check_remote, get_model, has_remote, stored, upload
from flows.repo import metrics, recorded
from tests.flows.faulty import Fault, Proxy

pytestmark = pytest.mark.slow
BUNDLE = {"bundle", "bundle/README.md", "bundle/breedline.json", "bundle/model.onnx"}
"""Its objects: two of its files have the content of another."""


@pytest.fixture
def oids(project: Any) -> dict[str, str]:
    """The object of each file."""
    return {item.name: item.oid for item in stored(project.work)}


def lose(project: Any, oid: str, *, cached: bool = False) -> None:
    """Remove an object from the remote, and from the cache too."""
    project.s3.rm_file(project.remote(oid))
    if cached:
        in_cache(project, oid).unlink()


def in_cache(project: Any, oid: str) -> Path:
    return project.work / ".dvc/cache/files/md5" / oid[:2] / oid[2:]


def test_what_dvc_lock_names_is_what_dvc_pushed(project: Any, oids: dict[str, str]) -> None:
    assert set(oids) == {"raw", "raw/a.txt", "raw/b.txt", "models", "models/weights", "models/bundle", *BUNDLE}
    assert set(oids.values()) == project.objects()
    assert {item.bytes for item in stored(project.work) if item.name == "raw/a.txt"} == {len("a picture\n")}
    assert verify(project.work) == (10, [], [])


def test_a_machine_without_the_cache_knows_the_objects_too(project: Any, oids: dict[str, str]) -> None:
    objects = stored(project.clone("fresh"))
    assert {item.name: item.oid for item in objects} == oids
    assert {item.bytes for item in objects} == {None}


def test_a_file_lost_inside_a_folder_is_sent_again_although_dvc_push_misses_it(
    project: Any, oids: dict[str, str]
) -> None:
    lose(project, oids["models/weights"])
    assert "up to date" in project.run("dvc", "push")
    assert oids["models/weights"] not in project.objects()
    result = verify(project.work)
    assert [item.name for item in result.repaired] == ["models/weights"]
    assert str(result) == "10 objects: 1 were missing or altered and sent again, 0 are lost"
    assert set(oids.values()) == project.objects()


def test_an_object_of_another_size_is_sent_again(project: Any, oids: dict[str, str]) -> None:
    project.s3.pipe_file(project.remote(oids["raw/a.txt"]), b"a pic")
    assert [item.name for item in verify(project.work).repaired] == ["raw/a.txt"]
    assert project.s3.cat_file(project.remote(oids["raw/a.txt"])) == b"a picture\n"


ALTERED = {"raw/a.txt": (b"picture", b"torture"), "raw": (b"a.txt", b"b.txt")}


def alter(path: Path, name: str) -> None:
    """Other bytes of the same number, in a file that is as read-only as DVC makes its own."""
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole.replace(*ALTERED[name]))
    assert path.read_bytes() != whole
    path.chmod(0o444)


def alter_on_s3(project: Any, oid: str, name: str) -> bytes:
    """The bytes that were there before they were changed for as many others."""
    whole = project.s3.cat_file(project.remote(oid))
    project.s3.pipe_file(project.remote(oid), whole.replace(*ALTERED[name]))
    assert project.s3.cat_file(project.remote(oid)) != whole
    return whole


@pytest.mark.parametrize("name", ALTERED)
@pytest.mark.parametrize("deep", [False, True])
def test_an_object_with_other_bytes_of_the_same_size_is_sent_again(
    project: Any, oids: dict[str, str], name: str, deep: bool
) -> None:
    whole = alter_on_s3(project, oids[name], name)
    assert [item.name for item in verify(project.work, deep=deep).repaired] == [name]
    assert project.s3.cat_file(project.remote(oids[name])) == whole
    assert verify(project.work, deep=deep) == (10, [], [])


def test_an_altered_object_whose_copy_in_the_cache_is_altered_too_is_lost_and_not_sent(
    project: Any, oids: dict[str, str]
) -> None:
    alter_on_s3(project, oids["raw/a.txt"], "raw/a.txt")
    altered = project.s3.cat_file(project.remote(oids["raw/a.txt"]))
    alter(in_cache(project, oids["raw/a.txt"]), "raw/a.txt")
    assert [item.name for item in verify(project.work).lost] == ["raw/a.txt"]
    assert project.s3.cat_file(project.remote(oids["raw/a.txt"])) == altered
    assert not in_cache(project, oids["raw/a.txt"]).exists(), "DVC would take it for whole"


def test_the_altered_list_of_a_folder_is_not_believed(project: Any, oids: dict[str, str]) -> None:
    alter_on_s3(project, oids["raw"], "raw")
    fresh = project.clone("fresh")
    assert {item.name for item in stored(fresh)} == {"raw", "models", "models/weights", "models/bundle", *BUNDLE}
    assert [item.name for item in verify(fresh).lost] == ["raw"]


@pytest.mark.parametrize("name", ALTERED)
def test_a_folder_as_remote_tells_only_when_it_is_read(project: Any, oids: dict[str, str], name: str) -> None:
    store = project.work.parent / "store"
    (project.work / ".dvc/config").write_text(f"[core]\nremote = store\n['remote \"store\"']\nurl = {store}\n")
    path = store / "files/md5" / oids[name][:2] / oids[name][2:]
    whole = path.read_bytes()
    alter(path, name)
    assert verify(project.work) == (10, [], [])
    assert [item.name for item in verify(project.work, deep=True).repaired] == [name]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("altered", [False, True])
def test_what_was_sent_in_parts_has_no_checksum_and_is_read_when_asked_for(
    project: Any, oids: dict[str, str], altered: bool
) -> None:
    content = b"A picture\n" if altered else b"a picture\n"
    bucket, _, key = project.remote(oids["raw/a.txt"]).partition("/")
    place = {"Bucket": bucket, "Key": key}
    upload_id = project.s3.call_s3("create_multipart_upload", **place)["UploadId"]
    etag = project.s3.call_s3("upload_part", **place, PartNumber=1, UploadId=upload_id, Body=content)["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    project.s3.call_s3("complete_multipart_upload", **place, UploadId=upload_id, MultipartUpload=parts)
    assert project.s3.info(f"{bucket}/{key}")["ETag"].endswith('-1"')
    assert verify(project.work).repaired == []
    assert [item.name for item in verify(project.work, deep=True).repaired] == (["raw/a.txt"] if altered else [])


def test_a_checksum_of_another_kind_is_no_damage(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.remote._md5_reported", lambda _: "0" * 32)  # as with keys of KMS
    assert verify(project.work) == (10, [], [])


@pytest.mark.parametrize(
    ("info", "md5"),
    [
        ({"ETag": '"1B2M2Y8AsgTpgAmY7PhCfg=="'}, None),
        ({"ETag": '"d41d8cd98f00b204e9800998ecf8427e"'}, "d41d8cd98f00b204e9800998ecf8427e"),
        ({"ETag": '"d41d8cd98f00b204e9800998ecf8427e-2"'}, None),
        ({"md5Hash": "1B2M2Y8AsgTpgAmY7PhCfg==", "etag": "CPj"}, "d41d8cd98f00b204e9800998ecf8427e"),
        ({"size": 3}, None),
    ],
)
def test_the_md5_that_a_remote_tells(info: dict[str, Any], md5: str | None) -> None:
    assert _md5_reported(info) == md5


def test_the_command_line_reads_every_object_if_asked_to(project: Any, oids: dict[str, str]) -> None:
    store = project.work.parent / "store"
    (project.work / ".dvc/config").write_text(f"[core]\nremote = store\n['remote \"store\"']\nurl = {store}\n")
    alter(store / "files/md5" / oids["raw"][:2] / oids["raw"][2:], "raw")
    project.run(str(Path(sys.executable).with_name("breedline")), "verify-remote")
    said = project.run(str(Path(sys.executable).with_name("breedline")), "verify-remote", "--deep")
    assert said.splitlines() == [
        f"raw ({oids['raw']}): sent again",
        "10 objects: 1 were missing or altered and sent again, 0 are lost",
    ]


def test_the_list_of_a_folder_is_sent_again(project: Any, oids: dict[str, str]) -> None:
    lose(project, oids["models"])
    assert [item.name for item in verify(project.work).repaired] == ["models"]
    assert set(oids.values()) == project.objects()


def test_what_nobody_has_is_lost(project: Any, oids: dict[str, str]) -> None:
    lose(project, oids["models/weights"], cached=True)
    lose(project, oids["raw/b.txt"])
    result = verify(project.work)
    assert [item.name for item in result.lost] == ["models/weights"]
    assert [item.name for item in result.repaired] == ["raw/b.txt"]
    with pytest.raises(BreedlineError, match=r"1 of 10 objects are neither .* \(models/weights.*dvc repro --force"):
        verified(project.work)


def test_a_damaged_object_of_the_cache_is_not_sent(project: Any, oids: dict[str, str]) -> None:
    lose(project, oids["models/weights"])
    damaged = in_cache(project, oids["models/weights"])
    damaged.chmod(0o644)
    damaged.write_text("damaged")
    assert [item.name for item in verify(project.work).lost] == ["models/weights"]
    assert oids["models/weights"] not in project.objects()


def test_a_folder_whose_list_nobody_has_is_lost(project: Any, oids: dict[str, str]) -> None:
    lose(project, oids["models"], cached=True)
    result = verify(project.work)
    assert [item.name for item in result.lost] == ["models"]
    assert result.objects == len(oids) - 2  # the files in the list


def test_uploading_says_what_it_could_not(project: Any, oids: dict[str, str]) -> None:
    objects = stored(project.work)
    lose(project, oids["models/weights"], cached=True)
    assert [item.name for item in upload(project.work, objects)] == ["models/weights"]


@pytest.mark.parametrize(
    ("lost", "code", "said"),
    [
        ([], 0, ["10 objects: 0 were missing or altered and sent again, 0 are lost"]),
        (
            [False],
            0,
            ["models/weights ({oid}): sent again", "10 objects: 1 were missing or altered and sent again, 0 are lost"],
        ),
        (
            [True],
            1,
            [
                "models/weights ({oid}): lost: in no cache either",
                "10 objects: 0 were missing or altered and sent again, 1 are lost",
            ],
        ),
    ],
)
def test_the_command_line_says_what_it_found_and_did(
    project: Any,
    oids: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    lost: list[bool],
    code: int,
    said: list[str],
) -> None:
    for cached in lost:
        lose(project, oids["models/weights"], cached=cached)
    assert verify_remote.main(deep=False) == code
    assert capsys.readouterr().out.splitlines() == [line.format(oid=oids["models/weights"]) for line in said]


@pytest.mark.parametrize("cached", [True, False])
def test_a_server_that_is_away_is_one_line_and_75(project: Any, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    config = project.work / ".dvc/config"
    config.write_text(re.sub("endpointurl = .*", "endpointurl = http://127.0.0.1:9", config.read_text()))
    if not cached:
        shutil.rmtree(".dvc/cache")
    command = [Path(sys.executable).with_name("breedline"), "verify-remote"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 75, done.stderr
    assert done.stdout == ""
    assert re.fullmatch("error: DVC remote: .*\n", done.stderr)


@pytest.fixture
def proxy(project: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What stands before the remote."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy = Proxy(project.s3.endpoint_url)
    config = project.work / ".dvc/config"
    config.write_text(re.sub("endpointurl = .*", f"endpointurl = {proxy.url}", config.read_text()))
    yield proxy
    proxy.close()


@pytest.mark.parametrize("fault", [Fault("cuts", "GET"), Fault("answers a page", "LIST")], ids=str)
def test_answers_that_are_cut_off_or_make_no_sense_are_one_line(
    project: Any, oids: dict[str, str], proxy: Proxy, fault: Fault
) -> None:
    lose(project, oids["raw/a.txt"])
    proxy.misbehave(fault)
    with pytest.raises(NetworkError, match=r"DVC remote: .*run it again"):
        verify(project.work, deep=True)


def test_a_remote_that_keeps_nothing_of_what_it_is_sent_is_no_loss_of_ours(
    project: Any, oids: dict[str, str], proxy: Proxy
) -> None:
    lose(project, oids["raw/a.txt"])
    proxy.misbehave(Fault("loses", "PUT"))
    with pytest.raises(NetworkError, match=r"1 of 10 objects were sent, but .* \(raw/a.txt, …\): run it again"):
        verify(project.work)
    proxy.heal()
    assert [item.name for item in verify(project.work).repaired] == ["raw/a.txt"]


def test_a_model_that_is_altered_on_the_remote_is_not_taken(project: Any, oids: dict[str, str], tmp_path: Path) -> None:
    path = project.remote(oids["bundle/model.onnx"])
    project.s3.pipe_file(path, project.s3.cat_file(path)[:-1] + b"?")
    shutil.rmtree(".dvc/cache")
    with pytest.raises(NetworkError, match=r"bundle/\S+ of .* is altered, on its way or on the DVC remote"):
        get_model(project.work, git(project.work, "rev-parse", "HEAD"), tmp_path)


@pytest.mark.parametrize("fault", [Fault("alters", "GET"), Fault("cuts", "GET"), Fault("answers 500", "GET")], ids=str)
def test_a_model_that_does_not_arrive_whole_is_there_the_next_time(
    project: Any, proxy: Proxy, tmp_path: Path, fault: Fault
) -> None:
    shutil.rmtree(".dvc/cache")
    commit = git(project.work, "rev-parse", "HEAD")
    proxy.misbehave(fault)
    with pytest.raises(BreedlineError):
        get_model(project.work, commit, tmp_path)
    proxy.heal()
    get_model(project.work, commit, tmp_path)


def test_a_bucket_that_is_not_there_is_one_line(project: Any) -> None:
    config = project.work / ".dvc/config"
    config.write_text(re.sub("s3://.*", "s3://nowhere", config.read_text()))
    with pytest.raises(BreedlineError, match=r"DVC remote.*\.dvc/config") as error:
        verify(project.work)
    assert not isinstance(error.value, NetworkError)


@pytest.mark.parametrize("setting", ["version_aware", "worktree"])
def test_a_remote_that_keeps_files_by_name_is_refused(project: Any, setting: str) -> None:
    with (project.work / ".dvc/config").open("a") as config:
        config.write(f"{setting} = true\n")
    for refuse in (check_remote, verify):
        with pytest.raises(BreedlineError, match="the DVC remote store keeps files by name"):
            refuse(project.work)


def test_no_remote(project: Any) -> None:
    assert has_remote(project.work)
    check_remote(project.work)
    (project.work / ".dvc/config").write_text("")
    assert not has_remote(project.work)
    for refuse in (check_remote, verify):
        with pytest.raises(BreedlineError, match="remote"):
            refuse(project.work)


def test_what_git_keeps_of_a_run(project: Any) -> None:
    assert recorded(project.work) == ["dvc.lock", "metrics/evaluate.json", ".gitignore"]


def test_metrics_are_those_of_the_last_commit_and_the_present_ones(project: Any) -> None:
    name = "metrics/evaluate.json:test.accuracy"
    old = 1 - 1 / 13
    assert metrics(project.work) == {name: (old, old)}
    (project.work / "metrics/evaluate.json").write_text('{"test": {"accuracy": 0.5, "note": "a word"}}')
    assert metrics(project.work) == {name: (old, 0.5)}
    (project.work / "metrics/evaluate.json").unlink()
    assert metrics(project.work) == {name: (old, None)}
