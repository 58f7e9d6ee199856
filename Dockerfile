# An image for `featnorm serve` on a CPU; compose.yaml runs it.
ARG PYTHON=3.13
FROM docker.io/library/python:${PYTHON}-slim AS build
ARG EXTRAS=images,text,serve
# PyTorch's own index has builds for the CPU. Those of PyPI contain several gigabytes of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/featnorm && /opt/featnorm/bin/pip install --index-url ${TORCH_INDEX} torch torchvision
WORKDIR /source
COPY LICENSE README.md pyproject.toml ./
COPY src src
RUN /opt/featnorm/bin/pip install ".[${EXTRAS}]"

FROM docker.io/library/python:${PYTHON}-slim
COPY --from=build /opt/featnorm /opt/featnorm
# matplotlib's cache and copies of scorers that are loaded again are the only files that a service writes.
ENV PATH=/opt/featnorm/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin featnorm
USER 10001
WORKDIR /scorers
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["featnorm"]
CMD ["serve", "/scorers/scorer.featnorm", "--host", "0.0.0.0"]
