# coffey in a container.
#
#   docker build -t coffey .
#   docker run --rm --read-only -v coffey-runs:/data coffey train -c configs/quickstart.toml -s train.output=/data/quickstart
#
# For NVIDIA GPUs, on a host with the driver for CUDA 13 and the NVIDIA container toolkit (docs/gpu.md; it has been built, and has not run on a GPU yet):
#
#   docker build -t coffey:cuda --build-arg FEATURES=cuda,cudnn .
#   docker run --rm --gpus all -v coffey-runs:/data coffey:cuda train -c … -s train.device=cuda:0
#
# The CUDA toolkit comes from PyPI; the final image has of it the libraries that coffey loads.
ARG BUILD_BASE=rust:1-slim-bookworm
ARG FINAL_BASE=debian:bookworm-slim

FROM ${BUILD_BASE} AS build
ARG FEATURES=""
WORKDIR /build

# The CUDA toolkit, and the libraries for the final image: cuBLAS, cuRAND, cuDNN without what attention and recurrent networks need
# (libcudnn_adv), and the compiler that cuDNN loads for kernels it makes on the card (nvrtc).
COPY tools/cuda tools/cuda
RUN set -eu; \
    mkdir -p /libraries /toolkit; \
    case "$FEATURES" in *cuda*) \
        apt-get update -qq; \
        apt-get install -y -qq --no-install-recommends g++ python3-pip; \
        rm -rf /var/lib/apt/lists/*; \
        tools/cuda/toolkit.sh /toolkit; \
        cd /toolkit/python/nvidia; \
        cp cu13/lib/libcublas.so.* cu13/lib/libcublasLt.so.* cu13/lib/libcurand.so.* cudnn/lib/libcudnn*.so.* \
            cu13/lib/libnvrtc.so.* cu13/lib/libnvrtc-builtins.so.* /libraries/; \
        rm /libraries/libcudnn_adv.so.*;; \
    *) touch /toolkit/env.sh;; \
    esac

# Dependencies have their own layer, which is built again only when a manifest or the lock file changes. cargo needs the source
# files of all targets in the manifests, so each gets an empty file.
COPY Cargo.toml Cargo.lock ./
COPY pipeline/Cargo.toml pipeline/
RUN set -eu; \
    mkdir -p src pipeline/src; \
    echo 'fn main() {}' > src/main.rs; \
    touch src/lib.rs pipeline/src/lib.rs; \
    for crate in . pipeline; do \
        awk -F '"' '/^\[/ { folder = "" } /^\[\[test\]\]/ { folder = "tests" } /^\[\[bench\]\]/ { folder = "benches" } \
            folder && /^name *=/ { print folder "/" $2 ".rs" }' "$crate/Cargo.toml" \
        | while read -r file; do \
            mkdir -p "$crate/${file%/*}"; \
            echo 'fn main() {}' > "$crate/$file"; \
        done; \
    done; \
    . /toolkit/env.sh; \
    cargo build --release --locked --bin coffey --features "$FEATURES"

# build.rs compiles the kernels in src; `coffey init` has the files of configs.
COPY build.rs* LICENSE ./
COPY configs configs
COPY src src
COPY pipeline/src pipeline/src
# cargo compares modification times, and the copied sources may be older than the build of the empty files.
RUN set -eu; \
    find src pipeline/src -name '*.rs' -exec touch {} +; \
    . /toolkit/env.sh; \
    cargo build --release --locked --bin coffey --features "$FEATURES"; \
    strip -o /coffey target/release/coffey

FROM ${FINAL_BASE}
LABEL org.opencontainers.image.title="coffey" \
      org.opencontainers.image.description="Streams captioned images out of S3 and distils latent diffusion models into Latent Consistency Models" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin coffey \
    && install -d -o coffey -g coffey /data
COPY --from=build /libraries /usr/local/lib/coffey
COPY --from=build /coffey /usr/local/bin/coffey
ARG FEATURES=""
# The last two are the container toolkit's: all GPUs, none without the feature, and of the driver what computes.
ENV LD_LIBRARY_PATH=/usr/local/lib/coffey NVIDIA_VISIBLE_DEVICES=${FEATURES:+all} NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/coffey
COPY LICENSE ./
COPY configs configs
COPY assets/quickstart assets/quickstart

# The only writable folder: -s train.output=/data/… or -s latents.output=/data/…
VOLUME ["/data"]
USER 10001:10001
ENTRYPOINT ["coffey"]
CMD ["--help"]
