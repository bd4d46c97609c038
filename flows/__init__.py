"""The pipeline of dvc.yaml under Prefect: compiled into tasks, run in private workspaces, published, scheduled."""
