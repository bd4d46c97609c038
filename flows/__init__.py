"""The pipeline under Prefect: plan, tasks, unattended runs and deployments. Nothing here is sent home."""

import os

os.environ.setdefault("DO_NOT_TRACK", "1")  # prefect.toml says it to servers; a server elsewhere may say otherwise
os.environ.setdefault("AWS_MAX_ATTEMPTS", "2")  # by default 5, times 5 of s3fs: hours, where S3 accepts and is silent
