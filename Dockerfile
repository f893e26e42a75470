# The base needs python3 3.11 to 3.13 with venv and pip; both stages use the same one.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
WORKDIR /build
COPY requirements.lock requirements-build.lock ./
RUN python3 -m venv /opt/build \
    && python3 -m venv --without-pip /opt/kachery-lab \
    && /opt/build/bin/pip install --quiet --require-hashes -r requirements-build.lock \
    && /opt/build/bin/pip --python /opt/kachery-lab/bin/python install --quiet --no-compile --require-hashes \
        -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY kachery_lab kachery_lab
# Bytecode that is never checked against its source: a read-only image needs no other, whatever its files' times.
RUN /opt/build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/build/bin/pip --python /opt/kachery-lab/bin/python install --quiet --no-compile --no-deps --no-index \
        /wheels/*.whl \
    && /opt/kachery-lab/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/kachery-lab/lib \
    && install -d -o 10001 -g 10001 -m 0755 /volumes/data \
    && install -d -o 10001 -g 10001 -m 0700 /volumes/meta

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="kachery-lab" \
      org.opencontainers.image.description="One lab server that every kachery client can use" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/kachery-lab /opt/kachery-lab
COPY --from=build /volumes /
ENV PATH=/opt/kachery-lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    KACHERY_STORAGE_DIR=/data \
    KACHERY_DAEMON_PORT=20431 \
    KACHERY_LAB_METADATA_DIR=/meta \
    KACHERY_LAB_BIND=0.0.0.0,:: \
    KACHERY_LAB_ALLOW_HALT=false \
    KACHERY_LAB_LOG_FORMAT=json
VOLUME ["/data", "/meta"]
EXPOSE 20431
USER 10001:10001
WORKDIR /
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
    CMD ["/opt/kachery-lab/bin/python", "-I", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['KACHERY_DAEMON_PORT'] + '/readyz', timeout=8)"]
ENTRYPOINT ["kachery-lab"]
CMD ["start"]
