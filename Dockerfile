# Serves a model folder on the CPU:
#   docker build -t sidetuning .
#   docker run -p 8000:8000 -e SIDETUNING_TOKEN -v "$PWD/my-model:/model:ro" -v hub:/home/app/.cache sidetuning
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 app
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# torch of the CPU alone: the default one brings gigabytes of CUDA. What may be installed stands in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    ".[serve,cli,timm,transformers]" \
    && rm -rf /src

USER 1000
WORKDIR /home/app
EXPOSE 8000
# Two seconds until it is looked at first; a base may have to be downloaded.
HEALTHCHECK --start-period=120s --interval=10s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz')"]
# Not through a shell, which would keep SIGTERM to itself.
ENTRYPOINT ["sidetuning"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
