# syntax=docker/dockerfile:1
# LoRA Easel in a container. TORCH names a folder of PyTorch's wheel index, and with it the hardware:
# cpu (default), cu130 or cu126 for NVIDIA, rocm6.4 for AMD, xpu for Intel.
#   docker build --build-arg TORCH=cu130 --tag lora-easel .
ARG PYTHON=3.13
FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist . \
    && sed -n 's/^ *"\(torch[<>=][^"]*\)",$/\1/p' pyproject.toml >/dist/torch.txt

FROM python:${PYTHON}-slim-bookworm
ARG TORCH=cpu
# eight-bit is for NVIDIA cards: --build-arg EXTRAS=all,eight-bit
ARG EXTRAS=all
ENV PYTHONUNBUFFERED=1 LORA_EASEL_HOME=/workspace HF_HOME=/workspace/hub
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --requirement /dist/torch.txt --index-url "https://download.pytorch.org/whl/${TORCH}" \
    && pip install --no-cache-dir "$(echo /dist/*.whl)[${EXTRAS}]" \
    && useradd --create-home --uid 1000 easel \
    && install --directory --owner easel --group easel /workspace
USER 1000
WORKDIR /workspace
VOLUME /workspace
EXPOSE 7860
STOPSIGNAL SIGINT
HEALTHCHECK --interval=10s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:7860/easel', timeout=5)"]
# Beyond the container means beyond this computer: without LORA_EASEL_PASSWORD or --password-file it refuses to start.
ENTRYPOINT ["lora-easel-window", "--host", "0.0.0.0", "--port", "7860", "--no-browser"]
