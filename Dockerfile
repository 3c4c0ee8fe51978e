# quack_lm with CUDA: docker build -t quack . && docker run --gpus all -it quack
# The tag names the CUDA of torch's wheels; nothing is compiled here, so the runtime image is enough.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# git: a run writes down its commit. gcc and g++: torch.compile needs a compiler. Their versions are the base image's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git gcc g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3 -m venv "$VIRTUAL_ENV"

WORKDIR /opt/quack_lm
COPY . .
RUN pip install -e .

WORKDIR /work
CMD ["quack-lm", "--help"]
