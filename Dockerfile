# coffey in a container.
#
#   docker build -t coffey .
#   docker run --rm --read-only -v coffey-runs:/data coffey train -c configs/quickstart.toml -s train.output=/data/quickstart
#
# CUDA: the code is type-checked, but this image has not been built with it and nothing has run on a GPU. The build base needs
# the CUDA toolkit, Rust 1.95 or newer, gcc and ca-certificates; the final base needs the CUDA runtime libraries and cuDNN.
#
#   docker build -t coffey:cuda --build-arg FEATURES=cuda,cudnn --build-arg BUILD_BASE=… --build-arg FINAL_BASE=… .
ARG BUILD_BASE=rust:1-slim-bookworm
ARG FINAL_BASE=debian:bookworm-slim

FROM ${BUILD_BASE} AS build
ARG FEATURES=""
WORKDIR /build

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
    cargo build --release --locked --bin coffey --features "$FEATURES"

COPY src src
COPY pipeline/src pipeline/src
# cargo compares modification times, and the copied sources may be older than the build of the empty files.
RUN set -eu; \
    find src pipeline/src -name '*.rs' -exec touch {} +; \
    cargo build --release --locked --bin coffey --features "$FEATURES"; \
    strip -o /coffey target/release/coffey

FROM ${FINAL_BASE}
LABEL org.opencontainers.image.title="coffey" \
      org.opencontainers.image.description="Streams captioned images out of S3 and distils latent diffusion models into Latent Consistency Models" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin coffey \
    && install -d -o coffey -g coffey /data
COPY --from=build /coffey /usr/local/bin/coffey
WORKDIR /opt/coffey
COPY LICENSE ./
COPY configs configs
COPY assets/quickstart assets/quickstart

# The only writable folder: -s train.output=/data/… or -s latents.output=/data/…
VOLUME ["/data"]
USER 10001:10001
ENTRYPOINT ["coffey"]
CMD ["--help"]
