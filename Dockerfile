# nemo_trd on an image that has the heavy packages. The base decides what it is for:
#
#   docker build -t nemo_trd .                                                          # training
#   docker build -t nemo_trd-server --build-arg BASE=vllm/vllm-openai:v0.32.0 .         # servers
#
# docs/containers.md is about using both. `python3` is the interpreter of either.
ARG BASE=nvcr.io/nvidia/nemo:26.06
FROM ${BASE}

ARG BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="nemo_trd" \
      org.opencontainers.image.description="Trajectory-Refined Distillation for the Megatron/NeMo stack" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"


# What the base has stays as it is: nothing is installed with its dependencies, and of the pinned
# packages only those that the base lacks. The base's own constraints (NVIDIA's images set
# PIP_CONSTRAINT) are about its packages, and would also bind the tool that builds ours.
RUN --mount=type=bind,target=/src \
    export PIP_CONSTRAINT="" PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
    && python3 -m pip install --no-deps /src \
    && python3 /src/containers/install_absent.py /src/containers \
    && python3 -m nemo_trd.doctor --packages-only

# Programs that answer a problem are run where the trainer is, in bubblewrap. Its version is the one of
# the base's distribution.
# hadolint ignore=DL3008
RUN if python3 -c 'from nemo_trd.doctor.main import role_here as r; exit(r() == "server")' \
    && ! command -v bwrap; then \
        apt-get update && apt-get install -y --no-install-recommends bubblewrap \
        && rm -rf /var/lib/apt/lists/*; \
    fi

# A container may run as any user, with a home that does not exist or cannot be written. Caches of
# compiled code are not in /tmp, which Pyxis takes from the host: other users could write them.
ENV HF_HOME=/var/cache/nemo_trd/huggingface \
    MPLCONFIGDIR=/var/cache/nemo_trd/matplotlib \
    NUMBA_CACHE_DIR=/var/cache/nemo_trd/numba \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/nemo_trd/inductor \
    TRITON_CACHE_DIR=/var/cache/nemo_trd/triton \
    VLLM_CACHE_ROOT=/var/cache/nemo_trd/vllm \
    XDG_CACHE_HOME=/var/cache/nemo_trd/cache \
    PYTHONDONTWRITEBYTECODE=1
RUN install -d -m 1777 /var/cache/nemo_trd

WORKDIR /workspace
HEALTHCHECK --interval=5m --timeout=90s --start-period=2m --retries=2 \
    CMD ["python3", "-m", "nemo_trd.doctor"]
# Of the base, vLLM's image would take every command for arguments of `vllm serve`.
ENTRYPOINT []
CMD ["python3", "-m", "nemo_trd.doctor"]
