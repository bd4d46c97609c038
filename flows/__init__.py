"""The pipeline under Prefect: plan, tasks, unattended runs and deployments. Nothing here is sent home."""

import os

os.environ.setdefault("DO_NOT_TRACK", "1")  # prefect.toml says it to servers; a server elsewhere may say otherwise
