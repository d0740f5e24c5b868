# dheads on a server without a GPU. To build, and to make a video of files in the current folder:
#
#   docker build -t dheads .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" dheads sample face.jpg speech.wav -o out.mp4
#
# Weights that are downloaded are kept with -v dheads-cache:/cache.
FROM python:3.12-slim

# What OpenCV needs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# PyTorch without CUDA, which would take 4 GB more. Both from one index: torchaudio of PyPI needs CUDA's libraries.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch==2.11.*" "torchaudio==2.11.*"

COPY pyproject.toml README.md LICENSE weights.toml /src/
COPY dheads /src/dheads
RUN pip install --no-cache-dir /src

# Any user may run it, and keep weights in /cache.
RUN useradd --system dheads && mkdir --mode 1777 /cache
ENV DHEADS_HOME=/cache
USER dheads
WORKDIR /work
ENTRYPOINT ["dheads"]
CMD ["--help"]
