# textlora serve. Adapters are mounted at /adapters; the base model comes with the image (--build-arg BASE=none leaves it out).
#   docker build -t textlora . && docker run -p 8000:8000 -v ./adapters:/adapters:ro textlora
FROM python:3.13-slim AS build
ARG BASE=demo
WORKDIR /src
# textlora/kernels is compiled where there is a compiler; none goes into the image
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE CHANGELOG.md ./
COPY textlora textlora
RUN if [ "$BASE" = none ]; then extras=serve; else extras=serve,$BASE; fi \
    && pip install --no-cache-dir --constraint constraints.txt ".[$extras]"

FROM python:3.13-slim
RUN useradd --uid 10001 --no-create-home textlora && mkdir /adapters
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 \
    TEXTLORA_HOST=0.0.0.0 TEXTLORA_PORT=8000 TEXTLORA_ADAPTER_DIR=/adapters
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["textlora", "serve"]
