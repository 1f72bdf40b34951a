# titan_dp for a machine with GPUs (its driver and the NVIDIA container toolkit) or without:
#
#   docker build -t titan-dp .
#   docker build -t titan-dp --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .    # CPUs only, 3 GB smaller
#   docker run --gpus all --ipc host -v $PWD/data:/workspace/data -v $PWD/outputs:/workspace/outputs titan-dp \
#       titan-dp train --config 800m.toml
FROM python:3.11-slim
# Triton compiles its launchers with gcc, and the recurrence on a CPU is compiled at first use.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/titan_dp
ARG TORCH_INDEX=
COPY constraints.txt .
# That index need not hold what torch depends on in the versions of constraints.txt: the usual one does.
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --constraint constraints.txt --no-deps --index-url "$TORCH_INDEX" torch; \
    fi && pip install --no-cache-dir --constraint constraints.txt torch
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[data,eval,scaling,hf]'
WORKDIR /workspace
CMD ["titan-dp", "--help"]
