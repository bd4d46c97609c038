# Two images; docs/deploy.md says how they are used. BuildKit builds only what the target needs:
#   docker build --target predict --tag breedline:predict .   a published model at work, without torch (about 0.5 GB)
#   docker build --target worker --tag breedline:worker .     what runs the deployments, on a GPU or without one (about 7 GB)
# Where pip fetches from is its own default, or what a pip.conf of yours says: --secret id=pip,src=pip.conf, which no layer keeps.
# The locks are whole (--no-deps): pip, which would resolve them again, asks for hashes of sqlalchemy[asyncio] beside sqlalchemy's.

FROM python:3.11.15-slim-trixie AS base
# What we ship sends nothing home; the rest is for pip, whose cache would only make a layer larger.
ENV DO_NOT_TRACK=1 \
    DVC_NO_ANALYTICS=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
# /srv is where it works, /cache is for a volume, which takes over the owner.
RUN useradd --uid 10001 --user-group --create-home breedline \
    && install --directory --owner=breedline --group=breedline /srv /cache
WORKDIR /srv


FROM base AS predict
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=bind,source=requirements-predict.txt,target=/requirements.txt \
    pip install --no-deps --require-hashes --requirement /requirements.txt
RUN --mount=type=bind,target=/source,rw \
    pip install --no-index --no-deps --no-build-isolation /source
USER 10001:10001
# It answers and ends. The page of `breedline app` is on the loopback address on purpose, for whoever started it to look at.
HEALTHCHECK NONE
ENTRYPOINT ["breedline"]
CMD ["--help"]


# The environment only: the code comes with each run, from the branch that the deployment names.
FROM base AS worker
# Debian keeps only the latest version of a package, so none can be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=bind,source=requirements.txt,target=/requirements.txt \
    pip install --no-deps --require-hashes --requirement /requirements.txt
# Downloads, presized images and DVC's cache outlive the container on the volume; torch needs the driver's compute part.
ENV BREEDLINE_CACHE=/cache/breedline \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 \
    PREFECT_WORKER_WEBSERVER_HOST=127.0.0.1
RUN dvc config --system cache.dir /cache/dvc
USER 10001:10001
# 503 when the worker has not asked the server for runs for a while.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=5)"]
CMD ["prefect", "worker", "start", "--pool", "breedline", "--type", "process", "--with-healthcheck"]
