# syntax=docker/dockerfile:1
# rlqwen with CUDA, from the lock requirements/cuda.txt (Python 3.11, x86-64, torch 2.13.0, vLLM 0.32.0).
#
#   docker build -t rlqwen .
#   docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/workspace/runs" -v rlqwen-cache:/cache rlqwen \
#       run grpo_gsm8k_qwen3_0.6b resume=auto
#
# Not built by its authors, who had no Docker. A test checks that the paths and commands below exist.
# The wheels bring CUDA 13.0 and nvcc, so that the image needs no CUDA of its own, and the host a driver of 580 or newer with
# the NVIDIA Container Toolkit. The base has gcc, which Triton and DeepSpeed call.
FROM python:3.11-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends tini && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /opt/rlqwen
COPY requirements/build.txt requirements/cuda.txt requirements/
RUN pip install --require-hashes --no-deps -r requirements/build.txt
# deepspeed is a source package that looks at the installed torch, so it comes after the rest, without build isolation.
RUN sed '/^deepspeed==/,/[^\\]$/d' requirements/cuda.txt > /tmp/first.txt \
    && pip install --require-hashes --no-deps -r /tmp/first.txt \
    && pip install --require-hashes --no-deps --no-build-isolation -r requirements/cuda.txt \
    && rm /tmp/first.txt

COPY pyproject.toml README.md LICENSE ./
COPY rlqwen rlqwen
COPY rewards rewards
COPY recipes recipes
RUN pip install --no-deps --no-build-isolation .

# Rewards and rollout workers run as this user, too.
RUN useradd --create-home --uid 1000 trainer && mkdir -p /workspace/runs /cache && chown -R trainer /workspace /cache
USER trainer
ENV HF_HOME=/cache/huggingface RLQWEN_CACHE=/cache/rlqwen RLQWEN_DISPLAY=plain
WORKDIR /workspace

# tini passes SIGTERM on, at which a run saves and ends with 75, and reaps what Ray leaves.
ENTRYPOINT ["tini", "--", "rlqwen"]
CMD ["recipes"]
