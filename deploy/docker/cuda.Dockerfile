# The CUDA image: the CPU image, NVRTC, which compiles the kernels for the card found, and NCCL, which cards of one group
# speak. The driver (libcuda) comes from the host, through the container runtime; cuBLAS is not used. Build the CPU image first, then, from the root of the repository:
# docker build -f deploy/docker/cuda.Dockerfile --build-arg COHORT_IMAGE=cohort -t cohort:cuda .
ARG COHORT_IMAGE=cohort
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

# NVIDIA publishes its libraries as wheels; they are only unpacked here.
FROM ${PYTHON_IMAGE} AS cuda
ARG NVRTC_VERSION=13.0.88
ARG NCCL_VERSION=2.28.9
RUN pip install --no-cache-dir --no-deps --target /wheels \
        "nvidia-cuda-nvrtc==${NVRTC_VERSION}" "nvidia-nccl-cu13==${NCCL_VERSION}" \
    && mkdir -p /libraries \
    && find /wheels \( -name 'libnvrtc*.so*' -o -name 'libnccl.so*' \) ! -name '*.alt.so*' -exec cp -P {} /libraries/ \;

# hadolint ignore=DL3006
FROM ${COHORT_IMAGE}
COPY --from=cuda /libraries /usr/lib/x86_64-linux-gnu/
# What the container runtime has to bring in.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
