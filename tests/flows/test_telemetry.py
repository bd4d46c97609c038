"""Nothing is sent home, whatever starts Prefect in the project's folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOW = "from prefect.settings import get_current_settings as now; print(now().server.analytics_enabled)"


@pytest.mark.parametrize(("folder", "enabled"), [(ROOT, "False"), (Path("/"), "True")], ids=["here", "elsewhere"])
def test_prefect_in_this_folder_sends_nothing(folder: Path, enabled: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    shown = subprocess.run([sys.executable, "-c", SHOW], cwd=folder, env=environment, capture_output=True, text=True)
    assert shown.stdout.strip() == enabled, shown.stderr


def test_flows_and_what_they_start_send_nothing_whatever_a_server_elsewhere_says(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    code = "import flows, os; print(os.environ['DO_NOT_TRACK'])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert shown.stdout.strip() == "1", shown.stderr


def test_dvc_in_this_repository_sends_nothing() -> None:
    assert "analytics = false" in (ROOT / ".dvc/config").read_text()
